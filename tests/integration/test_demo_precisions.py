"""What `precision: auto` may choose makes no difference that the demo's seeds don't make too."""

import pytest
from places import ROOT

from pipeline.clips.stage import shard
from pipeline.config import load_config
from pipeline.distill.stage import distill
from pipeline.targets.stage import cache

STEPS = 200


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_bf16_learns_the_demo_as_fp32_does(local_ray, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)  # the demo's teacher and backbones are named from there

    def config(*overrides):
        shorter = [f"storage.root={tmp_path}", f"distill.steps={STEPS}", "distill.warmup_steps=20"]
        shorter += ["distill.validate_every=0", "distill.measure_bound_every=0"]
        return load_config("configs/demo.yaml", [*shorter, *overrides])

    def final(seed, precision):
        run = distill(config(f"distill.seed={seed}", f"distill.precision={precision}"))
        assert not run["reused"]
        return run["losses"]["total"]

    shard(config())
    cache(config())
    exact = [final(seed, "fp32") for seed in (0, 1, 2)]
    rounded = final(0, "bf16")
    assert abs(rounded - exact[0]) < max(exact) - min(exact)

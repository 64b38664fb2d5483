"""Real H.264 files, three of them broken, from a folder to a segmented video, with `configs/videos.yaml`."""

import json
import shutil
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from places import CONFIGS, GOLDEN

from pipeline.clips.stage import shard
from pipeline.clips.table import ClipSet
from pipeline.config import ConfigError, load_config
from pipeline.distill.stage import distill
from pipeline.models import load_slot_model
from pipeline.registry.stage import pull, register
from pipeline.segment.stage import segment
from pipeline.storage import IncompleteError
from pipeline.targets.stage import cache

OVERRIDES = (f"teacher.checkpoint={GOLDEN / 'slotcontrast_tiny.ckpt'}", "teacher.num_heads=3")
OVERRIDES += (
    "student.backbone={patch_size: 14, embed_dim: 32, depth: 1, num_heads: 2}",
    "clips.short_side=64",
)
OVERRIDES += ("student.backbone_weights=random", "student.decoder_hidden_sizes=[32]", "student.image_size=56")
OVERRIDES += ("distill.steps=20", "distill.warmup_steps=5", "distill.batch_size=4", "distill.workers=2")
OVERRIDES += ("distill.log_every=5",)


@pytest.fixture(scope="module")
def videos(tmp_path_factory, real_videos):
    folder = tmp_path_factory.mktemp("videos")
    for name in ("bikes", "bigbuckbunny", "carphone_pristine"):
        shutil.copy(real_videos[name], folder / f"{name}.mp4")
    (folder / "text.mp4").write_text("not a video")
    (folder / "empty.mp4").touch()
    content = (folder / "bikes.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(content[: len(content) // 2])
    return folder


def test_from_a_folder_of_real_videos_to_a_segmented_one(videos, tmp_path, local_ray):
    places = [f"dataset.path={videos}", f"storage.root={tmp_path / 'out'}"]
    config = load_config(CONFIGS / "videos.yaml", [*places, *OVERRIDES])
    with pytest.raises(ConfigError, match=r"jobs\.shard"):
        cache(config)
    sharded = shard(config)
    assert {entry["video"] for entry in sharded["bad"]} == {"text.mp4", "empty.mp4", "cut.mp4"}
    for video in ClipSet(sharded["uri"]).videos:
        with av.open(str(videos / f"{video.video_id}.mp4")) as container:
            assert video.frames == sum(1 for _ in container.decode(video=0))
    with pytest.raises(IncompleteError, match="targets"):
        distill(config)
    assert cache(config)["rows"] == sharded["clips"]
    assert distill(config)["steps"] == 20
    assert register(config)["champion"]

    pull("models:/slotmatch@champion", tmp_path / "champion", config.tracking_uri)
    model = load_slot_model(tmp_path / "champion")
    done = segment(model, videos / "bikes.mp4", tmp_path / "segmented")
    with av.open(done["overlay"]) as container:
        assert sum(1 for _ in container.decode(video=0)) == done["frames"] == 250
    labels = sorted(Path(done["labels"]).glob("*.png"))
    assert len(labels) == 250
    with Image.open(labels[100]) as image:
        assert np.asarray(image).max() < model.config.num_slots
        assert image.size == (640, 272)
    with Image.open(done["sheet"]) as image:
        assert image.width > 600
    json.dumps(sharded)  # the summary is one line of JSON

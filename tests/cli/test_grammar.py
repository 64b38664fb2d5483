"""One grammar for all jobs: the list, the help, the schema, and what a command line means before it runs."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from jobs import __main__ as command
from jobs._main import STAGES, find_job, parse, run
from pipeline.config import Config, ConfigError, run_details

ROOT = Path(__file__).parents[2]
DEMO = str(ROOT / "configs" / "demo.yaml")
EVIDENCE = str(ROOT / "configs" / "sweeps" / "evidence.yaml")
RIVALS = str(ROOT / "configs" / "systems" / "demo_rivals.yaml")


@pytest.fixture
def slotmatch(monkeypatch, capsys):
    """The console command, in this process."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["/somewhere/bin/slotmatch", *words])
        try:
            code = command.main()
        except SystemExit as end:
            code = end.code or 0
        done = capsys.readouterr()
        return code, done.out, done.err

    return call


# --- the list, the help, the schema ---------------------------------------------------------------------


@pytest.mark.parametrize("words", [[], ["--help"]])
def test_the_list_names_every_stage_in_the_order_of_the_flow(slotmatch, words):
    code, out, _ = slotmatch(*words)
    named = [line.split()[0] for line in out.splitlines() if line.startswith("  ") and "--" not in line]
    assert (code, named) == (0, list(STAGES))
    assert {path.stem for path in ROOT.glob("jobs/[a-z]*.py")} == set(STAGES)
    assert max(map(len, out.splitlines())) <= 80
    assert "slotmatch STAGE --help" in out


def test_an_unknown_stage_names_the_nearest(slotmatch):
    code, out, err = slotmatch("distil", DEMO)
    assert code == 2
    assert "did you mean 'distill'?" in err
    assert json.loads(out)["status"] == "refused"


def test_the_version(slotmatch):
    code, out, _ = slotmatch("--version")
    assert (code, out.split()[0]) == (0, "slotmatch")


@pytest.mark.parametrize("stage", STAGES)
def test_help_fits_the_terminal(slotmatch, monkeypatch, stage):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = slotmatch(stage, "--help")
    assert code == 0
    assert out.startswith(f"usage: slotmatch {stage} ")
    assert "--dry-run" in out
    assert [line for line in out.splitlines() if len(line) > 80] == []


def test_help_lists_keys_with_type_default_and_a_line_each(slotmatch, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    out = " ".join(slotmatch("distill", "--help")[1].split())
    assert "distill.beta=0.2 weight of the slot distillation loss (float ≥ 0)" in out
    assert "distill.log_every=50 steps between two records of the losses (int ≥ 1; run detail)" in out
    assert "targets.crop=center of views 1, 2, … (center, random)" in out
    assert "student.num_slots=null slots of a frame (int ≥ 1, ≤ 256 or null)" in out
    assert "teacher.train.similarity=0.0" in out
    assert "Other sections, which --schema describes: dataset, clips, sweep, evidence, rivals." in out


def test_every_key_is_described_and_some_are_run_details(slotmatch):
    code, out, _ = slotmatch("distill", "--schema")
    assert code == 0
    schema = json.loads(out)
    for name, section in schema["$defs"].items():
        assert section["description"], name
        for key, field in section["properties"].items():
            assert field.get("description") or "$ref" in field, f"{name}.{key}"
    distill = {k for k, field in schema["$defs"]["Distill"]["properties"].items() if field.get("run_detail")}
    assert distill == run_details(Config.model_fields["distill"].annotation)
    assert {"log_every", "measure_bound_every"} < distill
    assert "seed" not in distill


@pytest.mark.parametrize(
    "words",
    [["distill", "--help"], ["sweep", DEMO, "--dry-run"], ["evidence", DEMO, EVIDENCE, "--dry-run"]],
)
def test_help_and_a_dry_run_load_none_of_the_big_libraries(words):
    code = (
        "import sys, jobs.__main__ as m; sys.argv = ['slotmatch', *sys.argv[1:]]\n"
        "try: m.main()\n"
        "except SystemExit: pass\n"
        "big = {'ray', 'torch', 'mlflow', 'pyarrow', 'matplotlib'} & set(sys.modules)\n"
        "assert not big, big"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) > 20, "the help, or a config"


# --- what a command line means ---------------------------------------------------------------------------


def test_words_config_presets_settings_and_flags_in_any_order(tmp_path):
    preset = str(ROOT / "configs" / "methods" / "no_kd.yaml")
    call = parse("report", [DEMO, "--latency-runs", "0", preset, f"storage.root={tmp_path}", "--folder", "x"])
    assert (call.config.distill.method, call.config.storage.root) == ("no_kd", str(tmp_path))
    assert call.arguments == {"folder": "x", "latency_runs": 0}
    assert not call.dry_run
    assert parse("report", []).config.dataset.name == "demo videos", "its config is the demo's by default"


@pytest.mark.parametrize("stage", [stage for stage in STAGES if not find_job(stage).words])
def test_presets_lie_over_the_config_of_every_stage(stage, capsys):
    presets = [EVIDENCE, RIVALS, str(ROOT / "configs" / "methods" / "slotmatch_mse.yaml")]
    assert run(find_job(stage), [DEMO, *presets, "--dry-run", "distill.beta=0.5"]) == 0
    distill = yaml.safe_load(capsys.readouterr().out)["distill"]
    assert (distill["method"], distill["beta"], distill["workers"]) == ("slotmatch_mse", 0.5, 0)


def test_a_registrys_jobs_take_its_place_from_a_config_too(tmp_path):
    (tmp_path / "mine.yml").write_text(f"storage: {{root: {tmp_path}/there}}\ndistill: {{seed: 3}}\n")
    call = parse("pull", ["models:/m@champion", str(tmp_path / "mine.yml"), "DIR"])
    assert call.arguments == {"model": "models:/m@champion", "folder": "DIR"}
    assert call.config.tracking_uri.endswith("/there/mlflow.db") or "MLFLOW_TRACKING_URI" in os.environ
    call = parse(
        "lineage", ["models:/m/1", str(tmp_path / "mine.yml"), f"storage.root={tmp_path}", "--videos"]
    )
    assert (call.config.storage.root, call.arguments["videos"]) == (str(tmp_path), True)


def test_segments_short_keys():
    words = [
        "a.mp4",
        "model=1.10",
        "out=2024",
        "max_side=640",
        "num_slots=7",
        "mean=[0.5, 0.5, 0.5]",
        "b.mp4",
    ]
    call = parse("segment", words)
    settings = call.arguments["settings"]
    assert call.arguments["videos"] == ["a.mp4", "b.mp4"]
    assert (settings.model, settings.out, settings.max_side) == ("1.10", "2024", 640), "names stay as typed"
    assert (settings.num_slots, settings.num_heads, settings.mean) == (7, None, (0.5, 0.5, 0.5))
    assert yaml.safe_load(call.to_yaml())["max_side"] == 640


@pytest.mark.parametrize(
    ("stage", "words", "message"),
    [
        ("shard", [], "no config given"),
        ("shard", [DEMO, "clips.clip_frame=3"], "did you mean 'clips.clip_frames'?"),
        ("shard", [DEMO, "clips.Codec=png"], "did you mean 'clips.codec'?"),
        ("shard", [DEMO, "png"], "override 'png' is not of the form section.key=value"),
        ("shard", [DEMO, "--dryrun"], "unrecognized arguments: --dryrun; did you mean '--dry-run'?"),
        ("distill", [DEMO, "--distill.seed=3"], "a setting has no dashes: distill.seed=…"),
        ("segment", ["a.mp4", "--model", "m", "out=x"], "a setting has no dashes: model=…"),
        (
            "shard",
            [DEMO, "nowhere.yaml"],
            "'nowhere.yaml' can't be read: No such file; shipped are coco.yaml, ",
        ),
        ("evidence", [DEMO], "evidence.split"),
        ("pull", [], "no model given"),
        ("pull", ["models:/m@champion"], "no dir given"),
        ("pull", ["models:/m@champion", "DIR", "more"], "'more' is not of the form key=value"),
        ("lineage", ["models:/m@champion", "storage.rot=x"], "did you mean 'storage.root'?"),
        ("lineage", ["models:/m@champion", "distill.seed=1"], "valid: mlflow.tracking_uri, storage.root"),
        ("report", ["--latency-runs", "-1"], "--latency-runs: -1 must be a whole number, at least 0"),
        ("segment", ["model=m", "out=x"], "no video given"),
        ("segment", ["a.mp4", "out=x"], "model: is missing; give model=…"),
        (
            "segment",
            ["a.mp4", "model=m", "out=x", "colour=red"],
            "(value 'red'); valid: model, out, max_side",
        ),
        ("segment", ["a.mp4", "model=m", "out=x", "num_heads=0"], "num_heads: 0 must be at least 1"),
        ("segment", ["a.mp4", "model=m", "out=x", "std=[1, 1, 0]"], "std.2: 0 must be more than 0"),
        ("segment", ["a.mp4", "model=m", "out=x", "max_side=big"], "max_side: 'big' is not a valid integer"),
        ("segment", ["a.mp4", "model=m", "out=x", "num_slots=300"], "num_slots: 300 must be at most 256"),
        ("segment", ["a.mp4", "b/a.mp4", "model=m", "out=x"], "two videos are named 'a'"),
        pytest.param(
            *("segment", ["clip=1.mp4", "model=m", "out=x"], "the file of this name is ./clip=1.mp4"),
            marks=pytest.mark.fault("a video called clip=1.mp4", "segment", "the error says ./clip=1.mp4"),
        ),
        ("segment", ["-dash.mp4", "model=m", "out=x"], "the file of this name is ./-dash.mp4"),
    ],
)
def test_what_is_refused_says_what_to_do(tmp_path, monkeypatch, capsys, stage, words, message):
    monkeypatch.chdir(tmp_path)
    for file in ("clip=1.mp4", "-dash.mp4"):
        (tmp_path / file).touch()
    with pytest.raises(ConfigError) as refused:
        parse(stage, words)
    assert message in str(refused.value)
    assert run(find_job(stage), words) == 2
    printed = capsys.readouterr()
    assert "teacher." not in printed.err, "a key is named as it was typed"
    summary = json.loads(printed.out)
    assert (summary["job"], summary["status"]) == (stage, "refused")


# --- the configs that are shipped ------------------------------------------------------------------------


def test_shipped_configs_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("demo.yaml", "configs/demo.yaml"):
        config = parse("pipeline", [name, "methods/feature_kd.yaml"]).config
        assert config.distill.method == "feature_kd"
        assert config.teacher.checkpoint == str(ROOT / "demo" / "teacher"), "beside it, as it names it"
        assert Path(config.student.backbone_weights).is_file()
        assert config.storage.root == str(tmp_path / "runs" / "demo"), "what is made stays here"


def test_what_lies_here_comes_before_what_is_shipped(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo.yaml").write_text("teacher: {checkpoint: demo/teacher}\n")
    assert parse("shard", ["demo.yaml"]).config.teacher.checkpoint == str(tmp_path / "demo" / "teacher")


def names(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*.yaml")}


@pytest.mark.slow
def test_a_wheel_brings_command_configs_and_models(tmp_path):
    """Built and installed without a network, with this environment's packages below it."""
    source, venv, away = (tmp_path / name for name in ("source", "venv", "away"))
    for name in ("pipeline", "jobs", "configs", "demo"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    away.mkdir()

    def pip(*words):
        done = subprocess.run(
            [sys.executable, "-m", "pip", *words], capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, done.stderr

    pip("wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(source))
    (wheel,) = tmp_path.glob("slotmatch-*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True, timeout=60)
    pip("--python", str(venv / "bin" / "python"), "install", "--quiet", "--no-deps", "--no-index", str(wheel))
    (packages,) = venv.glob("lib/python*/site-packages")
    (packages / "below.pth").write_text(f"{Path(yaml.__file__).parents[1]}\n")

    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    command = [str(venv / "bin" / "slotmatch"), "pipeline", "demo.yaml", "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=away, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr
    config = yaml.safe_load(done.stdout)
    assert config["teacher"]["checkpoint"] == str(venv / "share" / "slotmatch" / "demo" / "teacher")
    assert (Path(config["teacher"]["checkpoint"]) / "model.safetensors").is_file()
    assert Path(config["student"]["backbone_weights"]).is_file()
    assert names(venv / "share" / "slotmatch" / "configs") == names(ROOT / "configs")
    assert (packages / "pipeline" / "py.typed").is_file()
    page = Path("pipeline") / "registry" / "page"
    assert {path.name for path in (packages / page).iterdir()} == {
        path.name for path in (ROOT / page).iterdir()
    }

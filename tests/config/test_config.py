"""What a user reads who got a config wrong, and what a config gives who got it right."""

import pytest
import yaml
from places import CONFIGS

from pipeline.config import Config, ConfigError, ViT, checks, load_config, resolve_config
from pipeline.models import initialisation

SHIPPED = sorted(CONFIGS.glob("*.yaml"))


def problems(values=None, *overrides):
    with pytest.raises(ConfigError) as error:
        resolve_config(values or {}, overrides)
    return str(error.value).splitlines()


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_configs_load(path):
    config = load_config(path)
    assert load_config(path, ["distill.seed=7"]).distill.seed == 7
    assert Config.model_validate(yaml.safe_load(config.to_yaml())) == config


def test_defaults_are_the_papers():
    config = resolve_config({})
    assert (config.distill.alpha, config.distill.beta) == (1, 0.2)
    assert (config.distill.steps, config.distill.batch_size) == (300_000, 16)
    assert (config.distill.gradient_clip, config.distill.warmup_steps) == (0.05, 2500)
    assert config.student.backbone == "vit_small_patch14_dinov2"
    assert config.student.decoder_hidden_sizes == (1024, 1024, 1024)


# --- what is wrong is named, with the nearest that is right -------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "nearest"),
    [
        ("distil.steps", 3, "did you mean 'distill'?"),
        ("distill.stepz", 3, "did you mean 'distill.steps'?"),
        ("teacher.train.batchsize", 3, "did you mean 'teacher.train.batch_size'?"),
        ("dataset.synthetic.video", 3, "did you mean 'dataset.synthetic.videos'?"),
        ("storage.xyzzy", 3, "valid: root, cache, cache_gb"),
    ],
)
def test_unknown_key(key, value, nearest):
    (line,) = problems({}, f"{key}={value}")
    assert line.startswith((f"{key}: unknown key (value 3)", "distil: unknown key (value {'steps': 3})"))
    assert line.endswith(nearest)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("distill.steps=many", "distill.steps: 'many' is not a valid integer"),
        ("distill.steps=yes", "distill.steps: True is not a number or text"),
        ("distill.steps=[1]", "distill.steps: [1] is not a valid integer"),
        ("distill.fast_decoder=maybe", "distill.fast_decoder: 'maybe' is not a valid boolean"),
        ("dataset.path={a: b}", "dataset.path: {'a': 'b'} is not a valid string"),
        ("sweep.seeds=2", "sweep.seeds: 2 is not a valid tuple"),
        ("student.num_slots=2.5", "student.num_slots: 2.5 is not a valid integer"),
    ],
)
def test_wrong_type(override, line):
    (problem,) = problems({}, override)
    assert problem.startswith(line)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("distill.steps=-1", "distill.steps: -1 must be at least 1; nearest valid: 1"),
        ("clips.quality=101", "clips.quality: 101 must be at most 100; nearest valid: 100"),
        ("distill.learning_rate=0", "distill.learning_rate: 0 must be more than 0.0"),
        ("distill.learning_rate=.inf", "distill.learning_rate: inf is not a finite number"),
        ("sweep.seeds=[1, -1]", "sweep.seeds.1: -1 must be at least 0; nearest valid: 0"),
        ("clips.codec=jpg", "clips.codec: 'jpg' is not one of jpeg, png, raw; nearest: jpeg"),
        (
            "student.num_slots=7",
            "student.num_slots: 7 differs from the teacher's 15 (teacher.num_slots), and slot n is distilled to "
            "slot n; nearest valid: 15",
        ),
        (
            "student.image_size=335",
            "student.image_size: 335 is not a multiple of the patch size 14; nearest: 322 or 336",
        ),
        ("teacher.image_size=5", "teacher.image_size: 5 is not a multiple of the patch size 14; nearest: 14"),
        ("distill.workers=5", "distill.batch_size: 16 can't be shared equally by 5 workers; nearest: 15"),
        (
            "distill.workers=[5, 7]",
            "distill.batch_size: 16 can't be shared equally by any of 5 to 7 workers; nearest: 15",
        ),
        *(
            (
                f"distill.workers={value}",
                f"distill.workers: {shown} is not a number of workers, auto, or [fewest, most]; nearest valid: {near}",
            )
            for value, shown, near in [
                ("-1", "-1", "0"),
                ("2.0", "2.0", "2"),
                ("all", "'all'", "auto"),
                ("[8, 1]", "[8, 1]", "[1, 8]"),
                ("[0, 8]", "[0, 8]", "[1, 8]"),
                ("[1, 2, 4]", "[1, 2, 4]", "auto"),
                ("true", "True", "1"),
            ]
        ),
        (
            "distill.contrast=6",
            "distill.contrast: 6 shares of a batch of 16 would not be equal; nearest valid: 4",
        ),
        (
            "distill.contrast=0",
            "distill.contrast: 0 is not global, local, or a number of shares; nearest valid: 1",
        ),
        (
            "distill.contrast=each",
            "distill.contrast: 'each' is not global, local, or a number of shares; nearest valid: global",
        ),
    ],
)
def test_impossible_value(override, line):
    assert problems({}, override) == [line]


@pytest.mark.parametrize(
    ("workers", "value", "fewest"),
    [("auto", "auto", 1), ("[1, 8]", (1, 8), 1), ("[3, 9]", (3, 9), 4), ("0", 0, 0), ("4", 4, 4)],
)
def test_numbers_of_workers(workers, value, fewest):
    config = resolve_config({}, [f"distill.workers={workers}"])
    assert config.distill.workers == value
    assert config.distill.fewest_workers == fewest
    assert resolve_config(yaml.safe_load(config.to_yaml())) == config


@pytest.mark.parametrize("workers", ["auto", "[1, 8]"])
def test_workers_that_vary_learn_what_one_does(workers):
    (line,) = problems({}, f"distill.workers={workers}", "distill.contrast=local")
    assert line == (
        f"distill.workers: {workers} leaves open how many workers there are, and with contrast=local that decides "
        "what is learned; nearest valid: distill.contrast=2 (of two workers, whatever their number), or "
        "distill.contrast=global"
    )
    for way in ("contrast=2", "contrast=global"):
        resolve_config({}, [f"distill.workers={workers}", f"distill.{way}"])
    resolve_config({}, [f"distill.workers={workers}", "distill.contrast=local", "distill.alpha=0"])


def test_values_that_are_impossible_together():
    (line,) = problems({"clips": {"clip_frames": 1}})
    assert "clips.clip_frames: 1" in line
    assert "alpha=0" in line
    (line,) = problems({}, "student.predictor=false")
    assert line.startswith("distill.alpha: 1 contrasts neighbouring frames")
    resolve_config({}, ["student.predictor=false", "distill.alpha=0"])
    (line,) = problems({"dataset": {"split": "val"}, "evaluate": {"split": "val"}})
    assert line == "evaluate.split: 'val' is the training split (dataset.split)"
    # A model that is named was not trained on it; without a split there is nothing to compare.
    resolve_config({"dataset": {"split": "val"}, "evaluate": {"split": "val", "model": "models:/m@champion"}})
    resolve_config({"evaluate": {"model": "models:/m@champion"}})
    (line,) = problems({}, "teacher.slot_size=130")
    assert "130 must be a multiple of 4" in line
    assert "128" in line


def test_a_public_teacher_decides_its_own_sizes():
    """With a checkpoint file, the teacher's entries in the config are not what the teacher is."""
    config = resolve_config(
        {}, ["teacher.checkpoint=movi_e.ckpt", "student.num_slots=7", "teacher.image_size=335"]
    )
    assert config.student.num_slots == 7
    assert config.teacher.num_slots is None, "a default would count as said of a file that needs to be told"
    assert config.teacher.sizes == {"num_slots": 15, "slot_size": 128}


def test_all_problems_are_reported_at_once():
    lines = problems({"distill": {"stepz": 3, "workers": -1}, "clipz": {}, "clips": {"codec": "x"}})
    keys = {line.split(":")[0] for line in lines}
    assert keys == {"distill.stepz", "distill.workers", "clipz", "clips.codec"}
    assert len(problems({}, "student.num_slots=7", "student.image_size=335", "distill.workers=5")) == 3


def test_a_backbone_given_by_its_dimensions():
    vit = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
    config = resolve_config({"student": {"backbone": vit, "image_size": 32}})
    assert config.student.backbone == ViT(**vit)
    assert config.student.patch_size == 4
    (line,) = problems({"student": {"backbone": {**vit, "num_heads": 3}, "image_size": 32}})
    assert line == "student.backbone.num_heads: 3 does not divide embed_dim 32"
    (line,) = problems({"student": {"backbone": {**vit, "heads": 2}, "image_size": 32}})
    assert line.startswith("student.backbone.heads: unknown key")
    (line,) = problems({"student": {"backbone": {"patch_size": 4, "embed_dim": 32, "depth": 2}}})
    assert line.startswith("student.backbone.num_heads: is missing")


def test_sections_that_are_none():
    (line,) = problems({"distill": 3})
    assert line == "distill: 3 is not a section of keys and values"
    assert problems({"distill": {1: 2}}) == ["distill.1: keys must be text"]
    # `distill:` with nothing but comments below it
    assert resolve_config({"distill": None}) == Config()


# --- overrides ------------------------------------------------------------------------------------------


def test_overrides():
    values = {"distill": {"steps": 5, "seed": 1}, "clips": {"fps": 10}}
    overrides = ["distill.steps=6", "teacher.train.steps=1_000", "clips.fps=null", "sweep.seeds=[1, 2]"]
    overrides += ["dataset.path=/videos/a=b c", "distill.learning_rate=1e-3", "evaluate.split="]
    config = resolve_config(values, [*overrides, "mlflow.experiment=", "mlflow.experiment=my videos"])
    assert (config.distill.steps, config.distill.seed) == (6, 1)
    assert config.teacher.train.steps == 1000
    assert config.clips.fps is None
    assert config.sweep.seeds == (1, 2)
    assert config.dataset.path == "/videos/a=b c"
    assert config.distill.learning_rate == 1e-3
    assert config.mlflow.experiment == "my videos"
    assert config.evaluate.split is None
    assert values == {"distill": {"steps": 5, "seed": 1}, "clips": {"fps": 10}}, "the caller's values changed"


@pytest.mark.parametrize("override", ["steps=5", "distill.steps", "steps", ""])
def test_malformed_override(override):
    assert problems({}, override) == [f"override {override!r} is not of the form section.key=value"]


def test_override_below_a_value():
    (line,) = problems({"distill": {"steps": 5}}, "distill.steps.more=3")
    assert "'steps' is a value, not a section" in line


# --- files ------------------------------------------------------------------------------------------------


def test_round_trip(tmp_path):
    overrides = ["distill.steps=7", "clips.short_side=96", "student.mean=[0.5, 0.5, 0.5]"]
    config = resolve_config({}, [*overrides, "storage.root=/data"])
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "config.yaml") == config


def test_empty_file_is_the_defaults(tmp_path):
    (tmp_path / "config.yaml").write_text("# nothing yet\n")
    root = ["storage.root=/data"]
    assert load_config(tmp_path / "config.yaml", root) == resolve_config({}, root)


def test_local_paths_become_absolute_and_others_stay(tmp_path, monkeypatch):
    """Ray's workers run in folders of their own, where a relative path would mean something else."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(
        "dataset: {path: videos}\nstudent: {backbone_weights: vit.safetensors}\n"
    )
    config = load_config("config.yaml", ["teacher.checkpoint=s3://bucket/teacher.ckpt", "storage.root=out"])
    assert config.dataset.path == str(tmp_path / "videos")
    assert config.student.backbone_weights == str(tmp_path / "vit.safetensors")
    assert config.storage.root == str(tmp_path / "out")
    assert config.teacher.checkpoint == "s3://bucket/teacher.ckpt"
    assert config.teacher.backbone_weights == "timm"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("distill: [1, 2", "is not YAML"),
        ("- a\n- b\n", "must hold sections, not list"),
        ("just text", "must hold sections, not str"),
        (b"\xff\xfe\x00\x80", "is not YAML"),
    ],
)
def test_files_that_are_no_config(tmp_path, content, message):
    path = tmp_path / "broken.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=message) as error:
        load_config(path)
    assert "broken.yaml" in str(error.value)


def test_missing_file(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml' can't be read: No such file"):
        load_config(tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigError, match="can't be read: Is a directory"):
        load_config(tmp_path)


def test_tracking_uri(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    root = f"storage.root={tmp_path}"
    assert resolve_config({}, [root]).tracking_uri == f"sqlite:///{tmp_path}/mlflow.db"
    with pytest.raises(ConfigError, match=r"mlflow\.tracking_uri: must be set when storage\.root is remote"):
        _ = resolve_config({}, ["storage.root=s3://bucket/runs"]).tracking_uri
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://from-environment")
    assert resolve_config({}, [root]).tracking_uri == "http://from-environment"
    given = resolve_config({}, [root, "mlflow.tracking_uri=http://from-config"])
    assert given.tracking_uri == "http://from-config"


METHOD_PRESETS = sorted((CONFIGS / "methods").glob("*.yaml"))


@pytest.mark.parametrize("preset", METHOD_PRESETS, ids=lambda path: path.stem)
def test_a_methods_preset_goes_over_any_config(preset):
    base = CONFIGS / "movi_e.yaml"
    config = load_config(base, ["distill.beta=0.7"], presets=[preset])
    assert config.distill.method == preset.stem
    assert config.distill.beta == 0.7  # what is said last
    assert config.distill.steps == load_config(base).distill.steps


def test_there_is_a_preset_for_every_method():
    methods = Config.model_fields["distill"].annotation.model_fields["method"].annotation.__args__
    assert {path.stem for path in METHOD_PRESETS} == set(methods)


def test_the_last_preset_wins_and_a_missing_one_is_named(tmp_path):
    for name, steps in (("base", 5), ("one", 6), ("two", 7)):
        (tmp_path / f"{name}.yaml").write_text(f"distill: {{steps: {steps}, warmup_steps: 1}}")
    presets = [tmp_path / "one.yaml", tmp_path / "two.yaml"]
    assert load_config(tmp_path / "base.yaml", presets=presets).distill.steps == 7
    with pytest.raises(ConfigError, match=r"three\.yaml' can't be read"):
        load_config(tmp_path / "base.yaml", presets=[tmp_path / "three.yaml"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["distill.beta=0"],
            "distill.beta: 0 leaves nothing of distill.method=slotmatch; without distillation",
        ),
        (["distill.fresh_views=true"], "distill.fresh_views: cached targets hold"),
        (
            ["student.cached_features=true", "distill.live_teacher=true", "distill.fresh_views=true"],
            "student.cached_features: stored features are of targets.views views",
        ),
        (
            ["student.cached_features=true", "distill.live_teacher=true"],
            "student.cached_features: a live teacher",
        ),
        (
            ["student.cached_features=true", "targets.student_features=true"],
            "student.cached_features: the targets would hold the same features once more",
        ),
        (
            ["teacher.cached_features=true", "teacher.train.similarity=0.1", "teacher.decoder=slot_mixer"],
            "teacher.cached_features: teacher.train.similarity: 0.1 is made of the backbone's attention keys",
        ),
        (["distill.method=feature_kd"], "feature_kd needs the teacher's features: cache them"),
        (
            ["student.initialisation=fitted", "student.initial_slots=random"],
            "student.initialisation: fitted needs initial slots that are learned",
        ),
        (["student.initialisation=fitted", "student.slot_size=4"], "nearest valid: 8"),
        (["teacher.initialisation=teacher"], "teacher is a student's start; nearest valid: fitted"),
        (
            ["student.initialisation=teacher", "distill.initial_slots_from_teacher=false"],
            "is not to copy them; nearest valid: student.initialisation=soft_kmeans",
        ),
        (
            ["student.initialisation=teacher", "distill.method=no_kd"],
            "nearest valid: distill.initial_slots_from_teacher=true, or student.initialisation=soft_kmeans",
        ),
        (
            ["student.initialisation=teacher", "teacher.system=solv", "distill.method=slotmatch_hungarian"],
            "solv (teacher.system) groups in another way; nearest valid: student.initialisation=soft_kmeans",
        ),
        (
            ["student.initialisation=teacher", "teacher.corrector_mlp=false"],
            "student.corrector_mlp: True, but the teacher's, which it starts as, is False",
        ),
        (
            ["student.initialisation=teacher", "student.slot_size=64", "distill.slot_map=true"],
            "not of 64 numbers",
        ),
        (
            ["teacher.initialisation=fitted", "teacher.initial_slots=random"],
            "teacher.initialisation: fitted needs",
        ),
        (["dataset.split=train[abc]"], "dataset.split: 'train[abc]' is no split or slice"),
        (["evidence.split=val[abc]"], "evidence.split: 'val[abc]' is no split or slice"),
        (["dataset.splits={a: {off: val}}"], "dataset.splits.a.of: is missing"),
        (["distill.method=slotmach"], "nearest: slotmatch"),
        (["teacher.train.similarity=0.1"], "use teacher.decoder=slot_mixer"),
        (["teacher.train.reconstruction=0"], "leaves nothing to train for"),
        (["dataset.kind=synthetic", "evaluate.split=tests"], "'tests' is no generated split"),
        (["dataset.kind=synthetic", "evidence.split=tst"], "evidence.split: 'tst' is no generated split"),
        (["dataset.kind=synthetic", "evaluate.split=train"], "'train' is the training split"),
        (["evaluate.protocol=slotcontrst"], "evaluate.protocol: 'slotcontrst' "),
        (["evaluate.protocol=slotcontrst"], "nearest: slotcontrast"),
        (
            ["evaluate.protocol=diod", "evaluate.mask_size=64"],
            "use evaluate.mask_stride=1, or evaluate.mask_size=0",
        ),
    ],
)
def test_what_can_not_be_combined_says_what_to_do(overrides, message):
    with pytest.raises(ConfigError) as error:
        resolve_config({}, overrides)
    assert message in str(error.value)


def test_a_fitted_start_is_not_asked_of_a_teacher_that_is_there():
    overrides = ["teacher.checkpoint=a", "teacher.initialisation=fitted", "teacher.initial_slots=random"]
    assert resolve_config({}, overrides).teacher.initialisation == "fitted"


def test_places_are_as_the_start_has_them():
    assert checks.PLACES == initialisation.PLACES


def test_slots_of_two_sizes_need_a_map():
    sizes = ["teacher.slot_size=128", "student.slot_size=64"]
    with pytest.raises(ConfigError, match="slot_size: 64 differs"):
        resolve_config({}, sizes)
    assert resolve_config({}, [*sizes, "distill.slot_map=true"]).student.slot_size == 64

"""What decides an artifact's folder: pinned values, and what a setting changes and does not change."""

import json
from dataclasses import make_dataclass
from pathlib import Path

import pytest
from artifacts.worlds import (
    MadeUpVideos,
    at,
    fingerprints,
    publish_targets,
    use_one_decoder,
    world,
    write_model,
)
from pydantic import create_model

from pipeline import storage
from pipeline.artifacts.counted import distill_settings, protocol_rules
from pipeline.artifacts.identity import Artifacts
from pipeline.artifacts.subjects import model_identity
from pipeline.config import Config, Section, loading, resolve_config, with_overrides
from pipeline.config.protocols import Protocol
from pipeline.models import CheckpointHints

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "fingerprints.json").read_text())
CONFIGS = ("demo", "movi_e")
STUDENTS = {
    "student, no KD": {"distill.method": "no_kd"},
    "student, Hungarian": {"distill.method": "slotmatch_hungarian"},
    "student, live teacher": {"distill.live_teacher": True},
    "student, feature KD": {"distill.method": "feature_kd", "targets.teacher_features": True},
    "student, 2 views": {"targets.views": 2},
    "student, seed 7": {"distill.seed": 7},
}


SCORED = {"evaluation", "evaluation of the teacher", "evaluation of a grid", "protocol"}
STUDENT = {"student", "student: settings", "sweep"}
FROM_TARGETS = {"targets", *STUDENT}
FROM_TEACHER = {"teacher", *FROM_TARGETS}
ALL = {"clips", "evaluation clips", *FROM_TEACHER, *SCORED}


@pytest.fixture(autouse=True)
def _one_decoder(monkeypatch):
    use_one_decoder(monkeypatch)


@pytest.mark.parametrize("name", CONFIGS)
def test_fingerprints_are_those_of_the_first_release(name, tmp_path):
    """Nobody's clips, targets, students and scores are orphaned by an upgrade."""
    pinned = GOLDEN[name]
    artifacts = world(name, tmp_path)
    found = fingerprints(artifacts)
    assert found == {key: pinned[key] for key in found}
    for student, overrides in STUDENTS.items():
        if student not in pinned:
            continue  # a live teacher would have to be loaded
        other = at(with_overrides(artifacts.config, overrides))
        assert other.student.fingerprint == pinned[student], student
        if f"{student}: settings" in pinned:
            assert other.student_settings == pinned[f"{student}: settings"]


def test_generated_videos_keep_their_folders(tmp_path):
    from pipeline.clips.sources.synthetic import SyntheticSettings

    artifacts = world("demo", tmp_path)
    for number, split in enumerate(("train", "validation", "test")):
        settings = SyntheticSettings(videos=400 if split == "train" else 60, frames=24, size=96, seed=number)
        assert artifacts.generated(settings).fingerprint == GOLDEN["demo"][f"generated {split}"]


# --- a setting that a later version adds --------------------------------------------------------------


def later_version(section):
    """A section of the config, and all sections in it, with one more setting."""
    fields = {
        name: (later_version(type(value)), later_version(type(value))())
        for name, field in section.model_fields.items()
        if isinstance(value := field.get_default(call_default_factory=True), Section)
    }
    return create_model(section.__name__, __base__=section, later=(float, 0.5), **fields)


@pytest.fixture
def later_release(monkeypatch):
    """Configs with one more setting in every section."""
    monkeypatch.setattr(loading, "Config", later_version(Config))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_new_setting_changes_no_fingerprint(name, tmp_path, request):
    before = fingerprints(world(name, tmp_path))
    request.getfixturevalue("later_release")
    newer = world(name, tmp_path)
    settings = newer.config
    assert settings.distill.later == settings.teacher.train.later == settings.dataset.synthetic.later == 0.5
    assert fingerprints(newer) == before


@pytest.mark.parametrize(
    ("section", "changes"),
    [
        ("clips", ALL),
        ("dataset", ALL),
        ("teacher", {"teacher"}),
        ("teacher.train", {"teacher"}),
        ("targets", FROM_TEACHER),
        ("student", STUDENT),
        ("distill", STUDENT),
        ("evaluate", {"sweep"}),
        ("mlflow", set()),
    ],
)
def test_a_new_setting_counts_where_it_is_not_at_its_default(section, changes, tmp_path, later_release):
    before = fingerprints(world("movi_e", tmp_path))
    assert changed(before, fingerprints(world("movi_e", tmp_path, f"{section}.later=0.75"))) == changes


def test_new_settings_of_one_name_in_two_sections_are_two(tmp_path, later_release):
    """Clips are decided by `clips.*` and `dataset.*`, views by `targets.*` and `dataset.seed`."""
    of_clips = fingerprints(world("movi_e", tmp_path, "clips.later=0.75"))
    of_dataset = fingerprints(world("movi_e", tmp_path, "dataset.later=0.75"))
    assert of_clips["clips"] != of_dataset["clips"]


def test_a_new_rule_of_protocols_counts_where_it_is_not_at_its_default(tmp_path):
    Newer = make_dataclass("Newer", [("later", float, 0.5)], bases=(Protocol,), frozen=True)
    rules = protocol_rules(Protocol("paper", clip_frames=4))
    assert protocol_rules(Newer("paper", clip_frames=4)) == rules
    assert protocol_rules(Newer("paper", clip_frames=4, later=1.0)) == {**rules, "later": 1.0}


def test_a_new_hint_counts_where_it_is_not_at_its_default(tmp_path):
    file = tmp_path / "public.ckpt"
    file.write_bytes(b"weights")
    Newer = make_dataclass("Newer", [("later", float, 0.5)], bases=(CheckpointHints,), frozen=True)
    known = model_identity(str(file), CheckpointHints(num_slots=4))
    assert model_identity(str(file), Newer(num_slots=4)) == known
    assert model_identity(str(file), Newer(num_slots=4, later=1.0)) != known


# --- which setting changes what -----------------------------------------------------------------------

# Of a teacher its files decide what is made with it, and those of these tests are always the same.
DECIDES = [
    ("clips.clip_frames=2", ALL),
    ("clips.quality=50", ALL),
    ("clips.videos_per_shard=2", ALL),
    ("clips.pixel_aspect=stored", ALL),
    ("clips.motion=flow", {"clips", *FROM_TEACHER}),  # of what is trained on alone
    ("clips.flow=dataset", {"clips", *FROM_TEACHER}),
    ("dataset.seed=1", FROM_TEACHER),
    ("dataset.name=other", set()),
    ("teacher.train.steps=5000", {"teacher"}),
    ("teacher.train.seed=1", {"teacher"}),
    ("teacher.decoder_hidden_sizes=[8]", {"teacher"}),
    ("teacher.cached_features=true", {"teacher"}),
    ("teacher.name=other", set()),
    ("targets.views=2", FROM_TEACHER),
    ("targets.flip=0.1", FROM_TEACHER),
    ("targets.rollout=cyclic", FROM_TARGETS),
    ("targets.student_features=true", FROM_TARGETS),
    ("targets.teacher_features=true", FROM_TARGETS),
    ("student.image_size=224", STUDENT),
    ("student.grid=[12,16]", STUDENT),
    ("student.stride=16", STUDENT),
    ("student.backbone_blocks=8", STUDENT),
    ("teacher.backbone_blocks=8", {"teacher"}),
    ("student.feature_scale=auto", STUDENT),
    ("student.feature_scale=2", STUDENT),
    ("student.feature_scale=1", set()),
    ("teacher.feature_scale=auto", {"teacher"}),
    ("student.image_width=448", STUDENT),
    ("teacher.image_width=448", {"teacher"}),
    ("teacher.solv.half_window=1", {"teacher"}),
    ("teacher.savi.stride=2", {"teacher"}),
    ("teacher.savi.conditioning=boxes", {"teacher"}),
    ("teacher.steve.width=64", {"teacher"}),
    ("teacher.predictor_heads=2", {"teacher"}),
    ("teacher.num_iterations=3", {"teacher"}),
    ("teacher.stochastic=true", {"teacher"}),
    ("teacher.diod.burn_in=0.5", {"teacher"}),
    ("student.cached_features=true", STUDENT),
    ("student.decoder_hidden_sizes=[8]", STUDENT),
    ("student.mean=[0,0,0]", STUDENT),
    ("distill.beta=0.3", {"student", "student: settings"}),  # which a sweep varies itself
    ("distill.seed=1", {"student"}),
    ("distill.name=mine", {"student", "sweep"}),
    ("distill.steps=5000", STUDENT),
    ("distill.workers=1", set()),  # of two shares, as any number of workers
    ("distill.workers=[1, 8]", set()),
    ("distill.contrast=global", STUDENT),
    ("distill.contrast=4", STUDENT),
    ("distill.precision=fp32", STUDENT),
    ("distill.method=slotmatch_mse", STUDENT),
    ("distill.matching=frame", set()),  # of another method
    ("evaluate.mask_size=64", {*SCORED, "sweep"}),
    ("evaluate.mask_stride=2", {*SCORED, "sweep"}),
    ("evaluate.crop=content", {*SCORED, "sweep"}),
    ("evaluate.objects=first", {*SCORED, "sweep"}),
    ("evaluate.min_object_area=9", {*SCORED, "sweep"}),
    ("evaluate.min_objects=2", {*SCORED, "sweep"}),
    ("evaluate.matched=true", {*SCORED, "sweep"}),
    ("evaluate.split=test", {"evaluation clips", *SCORED, "sweep"}),
    ("evaluate.score=image_mbo", {"sweep"}),
    ("evaluate.feature_kmeans=true", {"sweep"}),
    ("sweep.seeds=[1]", {"sweep"}),
]
RUN_DETAILS = [
    "dataset.splits={mine: {of: train, take: 2}}",  # the videos of a split are counted themselves
    "clips.max_bad_fraction=0.5",
    "targets.batch_size=2",
    "targets.verify=0.5",
    "mlflow.experiment=other",
    "mlflow.weights_licence=MIT",
    "mlflow.system_metrics=true",
    "ray.gpus=1",
    "student.save=slim",
    "teacher.save=slim",
    "sweep.max_concurrent=1",
    "rivals.seeds=[7]",
    "storage.cache=elsewhere",
    "storage.cache_gb=0",
    *(
        f"{section}.{key}"
        for section in ("distill", "teacher.train")
        for key in (
            "cpus_per_worker=0.5",
            "loader_threads=1",
            "log_every=7",
            "checkpoint_every=7",
            "validate_every=7",
            "keep_checkpoints=7",
            "overlays=7",
            "max_failures=7",
        )
    ),
    "distill.measure_bound_every=7",
]


def changed(before, after):
    return {key for key in before if before[key] != after[key]}


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        use_one_decoder(patch)
        root = tmp_path_factory.mktemp("movi_e")
        return root, fingerprints(world("movi_e", root))


@pytest.mark.parametrize(("override", "expected"), DECIDES)
def test_what_a_setting_changes(override, expected, unchanged):
    root, before = unchanged
    assert changed(before, fingerprints(world("movi_e", root, override))) == expected


def test_one_store_of_features_serves_students_of_any_scale(tmp_path):
    stored = ("movi_e", tmp_path, "targets.student_features=true")
    before = fingerprints(world(*stored))
    assert changed(before, fingerprints(world(*stored, "student.feature_scale=auto"))) == STUDENT
    cut = changed(before, fingerprints(world(*stored, "student.backbone_blocks=8")))
    assert cut == FROM_TARGETS, "other features"


@pytest.mark.parametrize("override", RUN_DETAILS)
def test_run_details_change_nothing(override, unchanged):
    root, before = unchanged
    assert changed(before, fingerprints(world("movi_e", root, override))) == set()


def student(*overrides):
    return distill_settings(resolve_config({}, overrides).distill)


def test_any_number_of_workers_has_the_name_that_its_curve_has():
    """Of one worker where the whole batch is contrasted, else of as many as there are shares."""
    one = student("distill.workers=1")
    assert one == student("distill.workers=auto") == student("distill.workers=[1, 8]")
    assert one == student("distill.workers=1", "distill.contrast=local") == student("distill.contrast=1")
    two = student("distill.workers=2", "distill.contrast=local")
    for workers in ("1", "2", "8", "auto", "[1, 8]"):
        assert two == student("distill.contrast=2", f"distill.workers={workers}")
    # Of two workers that pool their slots; made under this name before it was known to be one's.
    assert student("distill.workers=2") == {**two, "contrast": "global"}


def test_stored_features_are_those_of_a_backbone_whoever_has_it(tmp_path):
    """A teacher and students with one backbone read one store, whatever else they are; other backbones have others."""
    same = ("teacher.backbone=vit_small_patch14_dinov2", "teacher.cached_features=true")
    artifacts = world("movi_e", tmp_path, *same)
    store = artifacts.features(artifacts.config.teacher).uri
    assert storage.name(store) != artifacts.targets.fingerprint

    def of(section, key="", value=None):
        config = with_overrides(artifacts.config, {key: value} if key else {})
        return artifacts.of(config).features(getattr(config, section)).uri

    assert store == of("student") == of("student", "student.cached_features", True)
    assert store == of("teacher", "teacher.train.steps", 7) == of("teacher", "teacher.num_slots", 3)
    others = [
        of("student", "student.image_size", 224),
        of("student", "student.backbone_weights", "random"),
        of("student", "student.grid", [12, 16]),
        of("student", "targets.views", 2),
        of("student", "targets.feature_dtype", "float16"),
    ]
    assert len({store, *others}) == 6
    assert of("student", "student.grid", [12, 16]) == of("teacher", "teacher.grid", [12, 16])


# --- defaults, files ----------------------------------------------------------------------------------


def test_defaults_stay():
    """A setting counts by how it differs from its default, so a default is never changed: add a new setting, and
    its default to the file."""
    pinned = json.loads((Path(__file__).parents[1] / "golden" / "defaults.json").read_text())
    assert Config().model_dump(mode="json") == pinned


def test_a_file_is_hashed_once(tmp_path, monkeypatch):
    hashed = []
    real = storage.hash_file
    monkeypatch.setattr(storage, "hash_file", lambda uri: hashed.append(uri) or real(uri))
    artifacts = world("movi_e", tmp_path)
    for beta in (0.1, 0.2, 0.3):
        artifacts.of(with_overrides(artifacts.config, {"distill.beta": beta})).student  # noqa: B018
    assert len(hashed) == len(set(hashed)) == 2  # the teacher's config and weights
    write_model(artifacts.teacher.uri, 3)  # another file under the same name
    fresh = Artifacts(artifacts.config, MadeUpVideos())
    assert fresh.targets.fingerprint != artifacts.targets.fingerprint
    publish_targets(fresh)

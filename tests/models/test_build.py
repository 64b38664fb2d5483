"""Models from a config: what it says of a public file, and what tells two teachers apart."""

import pytest
import torch
from clip_sets import make_clip_set
from tiny_models import tiny_design, tiny_model, tiny_section

from pipeline.clips.library import artifacts_of
from pipeline.config import ConfigError, resolve_config
from pipeline.evaluate.subjects import Subject, teacher_subject
from pipeline.models import CheckpointHints, save_slot_model
from pipeline.models.build import build_student, load_teacher, model_config
from pipeline.models.build_teachers import build_teacher

SECTION = tiny_section()
HALF = "[0.5, 0.5, 0.5]"


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A public file with learned slots, one that draws them, and the first as a folder of ours."""
    folder = tmp_path_factory.mktemp("models")
    for name, changes in (("learned.ckpt", {}), ("drawn.ckpt", {"initializer": "random"})):
        state = tiny_model(image_size=16, **changes).state_dict()
        torch.save({"state_dict": state}, folder / name)
    save_slot_model(tiny_model(image_size=16), folder / "folder")
    return {path.stem: str(path) for path in folder.iterdir()}


@pytest.fixture
def config_of(places, tmp_path):
    def make(name, *overrides):
        student = {**SECTION, "initial_slots": "random" if name == "drawn" else "learned"}
        teacher = {"checkpoint": places[name], "num_heads": 2}
        values = {"teacher": teacher, "student": student, "storage": {"root": str(tmp_path)}}
        return resolve_config(values, overrides)

    return make


def load(config):
    return load_teacher(config, config.teacher.checkpoint)


def test_a_file_that_draws_its_slots_must_be_told_their_number(config_of):
    with pytest.raises(ConfigError, match=r"^teacher\.num_slots: must be given, as .*drawn\.ckpt draws"):
        load(config_of("drawn"))
    model = load(config_of("drawn", "teacher.num_slots=7", f"teacher.mean={HALF}", f"teacher.std={HALF}"))
    assert (model.config.num_slots, model.config.mean, model.config.std) == (7, (0.5,) * 3, (0.5,) * 3)


@pytest.mark.parametrize("name", ["learned", "folder"])
def test_a_checkpoint_that_has_another_number_of_slots_is_refused(config_of, name):
    assert load(config_of(name)).config.num_slots == 3
    assert load(config_of(name, "teacher.num_slots=3")).config.num_slots == 3
    with pytest.raises(ConfigError, match=r"teacher\.num_slots: 15, but .* has 3 slots; nearest valid: 3"):
        load(config_of(name, "teacher.num_slots=15"))


def test_wrong_heads_are_the_configs_fault(config_of):
    with pytest.raises(ConfigError, match=r"^teacher\.num_heads: 5 does not divide"):
        load(config_of("learned", "teacher.num_heads=5"))


def test_the_student_has_the_files_number_of_slots(config_of):
    config = config_of("drawn", "teacher.num_slots=7")
    assert build_student(config, teacher=load(config), seed=0).config.num_slots == 7
    config = config_of("drawn", "teacher.num_slots=7", "student.num_slots=6")
    with pytest.raises(ConfigError, match="6 differs from the teacher's 7"):
        build_student(config, teacher=load(config), seed=0)


# --- fingerprints -----------------------------------------------------------------------------------------


CHANGES = [
    ("teacher.num_heads=4", "teacher.num_slots=4"),
    ("teacher.num_slots=5",),
    ("teacher.num_slots=4", f"teacher.mean={HALF}"),
    ("teacher.num_slots=4", f"teacher.std={HALF}"),
    ("teacher.num_slots=4", "targets.rollout=cyclic"),  # which scores don't depend on
]


@pytest.fixture
def clips(tmp_path):
    frames = torch.zeros(4, 16, 16, 3, dtype=torch.uint8).numpy()
    return make_clip_set(tmp_path / "clips", {"a": (frames, None)})


def fingerprints(config, clips):
    live = resolve_config(config.model_dump(mode="json"), ["distill.live_teacher=true"])
    return [
        artifacts_of(config, clips.uri).targets.uri,
        artifacts_of(live, clips.uri).student.uri,
        teacher_subject(config, config.teacher.checkpoint).identity(),
    ]


@pytest.mark.parametrize("change", CHANGES)
def test_all_that_a_file_does_not_tell_is_in_fingerprints(config_of, clips, change):
    before = fingerprints(config_of("drawn", "teacher.num_slots=4"), clips)
    again = fingerprints(config_of("drawn", "teacher.num_slots=4"), clips)
    changed = fingerprints(config_of("drawn", *change), clips)
    assert before == again
    differs = [a != b for a, b in zip(before, changed, strict=True)]
    assert differs == [True, True, "rollout" not in change[-1]]


def test_a_folder_tells_everything_itself(config_of, clips):
    """What it would ignore makes no other targets, students or scores."""
    before = fingerprints(config_of("folder"), clips)
    changed = config_of("folder", "teacher.num_heads=4", "teacher.num_slots=3", f"teacher.mean={HALF}")
    assert fingerprints(changed, clips) == before


def test_a_subjects_tags_and_identity():
    subject = Subject(baseline="grid", num_slots=4, hints=CheckpointHints(num_slots=7))
    assert subject.identity()["model"] is None
    assert "hints" not in subject.record()


# --- architectures ------------------------------------------------------------------------------------------


def test_every_architecture_of_the_config_reaches_the_model():
    design = {"corrector_mlp": False, "predictor": False, "decoder": "slot_mixer", "decoder_blocks": 2}
    more = {"initial_slots": "random", "mean": [0.5, 0.5, 0.5], "initialisation": "soft_kmeans"}
    section = {**SECTION, **design, **more}
    teacher = {**section, "num_slots": 3, "slot_size": 8, "train": {"alpha": 0}}
    config = resolve_config({"teacher": teacher, "student": section, "distill": {"alpha": 0}})
    expected = tiny_design(image_size=16, initializer="random", mean=(0.5,) * 3, **design)
    assert build_teacher(config).config == expected
    assert build_student(config, teacher=None, seed=0).config == expected
    assert model_config(config.student, num_slots=3, slot_size=8) == expected


def test_a_teacher_that_is_trained_here_has_the_papers_sizes():
    config = resolve_config({"teacher": SECTION, "student": SECTION})
    assert (build_teacher(config).config.num_slots, build_teacher(config).config.slot_size) == (15, 128)

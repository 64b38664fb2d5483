"""SAVi and STEVE as teachers: what trains them, what they teach, and their authors' files."""

import math

import numpy as np
import pytest
import torch
from clip_sets import make_clip_set, random_video
from distill.test_systems import Rates, config_of, run_of
from places import CONFIGS, GOLDEN

from pipeline.config import ConfigError, load_config, resolve_config
from pipeline.distill.run import build
from pipeline.distill.system_objective import SystemBatch
from pipeline.distill.trainer import Trainer
from pipeline.models import load_slot_model
from pipeline.models.build import checkpoint_hints, load_teacher
from pipeline.models.build_teachers import build_teacher
from pipeline.models.rivals import savi_files
from pipeline.models.rivals.savi import SAVi, SAViConfig

PIXELS = ("savi", "steve")
FILES = GOLDEN / "rivals"
each_system = pytest.mark.parametrize("system", PIXELS)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    rng = np.random.default_rng(0)
    videos = {f"v{i}": random_video(rng, 12) for i in range(5)}
    return make_clip_set(tmp_path_factory.mktemp("clips"), videos, clip_frames=6).uri


@each_system
def test_a_system_learns_in_bf16(clips, tmp_path, system):
    settings = ("teacher.train.steps=30", "teacher.train.learning_rate=0.004", "teacher.train.precision=bf16")
    logger = Rates()
    history = Trainer(run_of(system, tmp_path, clips, *settings), logger=logger).train().history
    losses = [row["total"] for row in history]
    assert np.mean(losses[-10:]) < 0.95 * np.mean(losses[:10])
    terms = {"savi": ["reconstruction"], "steve": ["cross_entropy", "dvae"]}[system]
    for row in history:
        assert row["total"] == pytest.approx(sum(row[name] for name in terms), rel=1e-6)
    expected = {
        "savi": [0, 0.5, *((1 + np.cos(np.pi * np.arange(28) / 28)) / 2)],
        "steve": [0.5, *(0.5 ** (np.arange(1, 30) / 250_000))],
    }[system]
    np.testing.assert_allclose(logger.rates, 0.004 * np.array(expected), atol=1e-8)


def test_steves_three_learning_rates_and_its_clipping(clips, tmp_path):
    """At the published rate of 1e-4 all three are the authors'; all gradients are scaled by the largest entry."""
    run = run_of("steve", tmp_path, clips, "teacher.steve.half_life=100", "teacher.train.gradient_clip=0.001")
    objective, _ = build(run)
    model = objective.model
    owners = [
        {name.split(".")[0] for name, p in model.named_parameters() if any(p is q for q in group)}
        for group in objective.parameter_groups()
    ]
    assert owners[0] == {"steve_encoder"}
    assert sum(len(group) for group in objective.parameter_groups()) == len(list(model.parameters()))
    for step in (0, 9, 250):
        factor = min((step + 1) / 10, 1) * 0.5 ** (step / 100)
        published = {"dvae": 3e-4, "steve_encoder": 1e-4 * factor, "steve_decoder": 3e-4 * factor}
        rates = objective.rate_factors(step, warmup_steps=10, total_steps=300)
        np.testing.assert_allclose([1e-4 * rate for rate in rates], [published[part] for (part,) in owners])
    trainer = Trainer(run)
    pixels = [torch.randint(0, 256, (6, 20, 20, 3), dtype=torch.uint8) for _ in range(2)]
    done = trainer.train_step(trainer.objective, SystemBatch(pixels, 0, seed=1), [0.0, 0.0, 0.0])
    largest = max(p.grad.abs().max().item() for p in trainer.model.parameters())
    assert largest == pytest.approx(0.001, rel=1e-2)
    assert done["gradient_norm"] > 0.001


def test_steves_temperature_falls(clips, tmp_path):
    """The dVAE's picture is made of other codes from step to step, the tokens are the same."""
    objective, _ = build(run_of("steve", tmp_path, clips, "teacher.steve.temperature_steps=10"))
    pixels = [torch.randint(0, 256, (6, 20, 20, 3), dtype=torch.uint8) for _ in range(2)]
    first, later, last, after = (objective(SystemBatch(pixels, step, seed=1)) for step in (0, 5, 10, 99))
    assert first["cross_entropy"] == later["cross_entropy"] == last["cross_entropy"]
    assert len({losses["dvae"].item() for losses in (first, later, last)}) == 3
    assert last["dvae"] == after["dvae"]
    other = objective(SystemBatch(pixels, 0, seed=2))
    assert other["cross_entropy"] != first["cross_entropy"]


@each_system
def test_slot_attention_is_computed_in_32_bits(tmp_path, system):
    model = build_teacher(config_of(system, tmp_path)).eval()
    features, start = model.features(torch.rand(2, 3, 3, 16, 16)), model.initial_slots(2, [0, 1])
    expected = model.roll_out(features, start)
    with torch.autocast("cpu", torch.bfloat16):
        found = model.roll_out(features, start)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def models_that_teach(root):
    yield build_teacher(config_of("savi", root))
    yield build_teacher(config_of("savi", root, "teacher.initial_slots=random"))
    yield build_teacher(config_of("steve", root))
    yield load_slot_model(FILES / "stosavi_rnn_tiny.pth")
    yield load_slot_model(FILES / "stosavi_mlp_tiny.pth", stochastic=True)


@torch.no_grad()
def test_targets_are_the_slots_that_a_video_is_segmented_with(tmp_path):
    frames = torch.randint(0, 256, (5, 20, 24, 3), dtype=torch.uint8).numpy()
    for model in models_that_teach(tmp_path):
        model.eval()
        video = model.prepare([frames, frames])
        first, second = model.target_slots(video, [7, 8])
        ((_, slots, _),) = model.stream([frames], noise_seed=7)
        torch.testing.assert_close(first, slots, atol=1e-5, rtol=1e-5)
        assert first.shape == (5, model.config.num_slots, model.config.slot_size)
        drawn = type(model).__name__ == "STEVE" or getattr(model.config, "stochastic", False)
        drawn = drawn or getattr(model.config, "initializer", "") == "drawn"
        assert torch.allclose(first, second, atol=1e-5) != drawn


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("savi_learned_tiny.flax", {"image_size": 32, "num_iterations": 2}),
        ("savi_gaussian_tiny.flax", {"image_size": 32, "num_slots": 5}),
        ("stosavi_mlp_tiny.pth", {"stochastic": True, "num_iterations": 3}),
        ("steve_tiny.pt", {"num_slots": 5, "predictor_heads": 2}),
    ],
)
def test_public_files_teach(file, said):
    overrides = [f"teacher.{key}={value}" for key, value in said.items()]
    system = "steve" if "steve" in file else "savi"
    config = resolve_config(
        {}, [f"teacher.checkpoint={FILES / file}", f"teacher.system={system}", *overrides]
    )
    model = load_teacher(config, str(FILES / file))
    expected = load_slot_model(FILES / file, **said)
    assert model.config == expected.config
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))


@pytest.mark.parametrize(
    ("file", "said", "message"),
    [
        (
            "savi_learned_tiny.flax",
            [],
            r"^teacher.image_size: must be given.*\(beside teacher.system=savi; .*\)$",
        ),
        ("savi_gaussian_tiny.flax", ["teacher.image_size=32"], r"^teacher.num_slots: must be given"),
        ("steve_tiny.pt", [], r"^teacher.num_slots: must be given"),
        (
            "savi_conditional_tiny.flax",
            ["teacher.image_size=32", "teacher.num_slots=5"],
            "start from boxes, which students don't have.*nearest valid: .*SAVi with learned or drawn slots",
        ),
    ],
)
def test_files_that_can_not_teach(file, said, message):
    config = resolve_config({}, [f"teacher.checkpoint={FILES / file}", "teacher.system=savi", *said])
    with pytest.raises(ConfigError, match=message):
        load_teacher(config, str(FILES / file))


def test_a_size_that_is_the_default_is_said_by_both_sides():
    """336 pixels by themselves are what every config says, and so are nothing said of a file."""
    values = {"image_size": 336, "stride": 4, "encoder_channels": (8, 8), "num_slots": 2, "slot_size": 8}
    model = SAVi(SAViConfig(**values, decoder_grid=84, decoder_channels=(8, 8)))
    file = FILES / "savi_learned_tiny.flax"
    said = [f"teacher.checkpoint={file}", "teacher.system=savi", "teacher.image_size=336"]
    config = resolve_config({}, said)
    with pytest.raises(
        ConfigError, match=r"^teacher.image_size: must be given.* an equal teacher.image_width\)$"
    ):
        load_teacher(config, str(file))
    config = resolve_config({}, [*said, "teacher.image_width=336"])
    assert (
        savi_files.read(savi_files.written(model), checkpoint_hints(config), "savi.flax")[0] == model.config
    )
    with pytest.raises(
        ValueError, match=r"^image_size: 336, but a decoder of 4 layers .* nearest valid: 32$"
    ):
        load_teacher(config, str(file))


@pytest.mark.parametrize(
    ("system", "override", "message"),
    [
        ("savi", "teacher.num_slots=1", r"^teacher.system=savi: num_slots: 1, .* nearest valid: 2$"),
        ("steve", "teacher.num_slots=1", r"^teacher.system=steve: num_slots: 1, .* nearest valid: 2$"),
        ("savi", "teacher.image_size=24", "image_size: 24, but a decoder of 2 layers .* nearest valid: 16"),
        ("savi", "teacher.predictor_heads=3", "slot_size: 16 is no multiple .* 3 heads; nearest valid: 18"),
        ("steve", "teacher.image_size=18", "image_size: 18 is no multiple .* nearest valid: 20"),
        ("steve", "teacher.steve.decoder_heads=3", "width: 16 is no multiple .* nearest valid: 18"),
        ("savi", "teacher.image_width=32", "^teacher.image_width: 32, but the frames of savi are square"),
        (
            "savi",
            "teacher.savi.encoder_blocks=[1]",
            "1 stages, but teacher.savi.encoder_channels has 2 widths",
        ),
        ("savi", "teacher.savi.encoder_blocks=[1, 1]", "encoder_channels: 8 is not a multiple of 32"),
        ("savi", "teacher.savi.decoder_channels=[]", "teacher.savi.decoder_channels"),
    ],
)
def test_what_they_can_not_be(tmp_path, system, override, message):
    with pytest.raises(ConfigError, match=message):
        build_teacher(config_of(system, tmp_path, override))


def test_the_presets_are_the_authors():
    """SAVi-M's and, of MOVi-E, STEVE's networks, whose public files have so many numbers."""
    for system, parameters, rate, clip_frames in (("savi", 1.14e6, 1e-4, 6), ("steve", 8.7e6, 1e-4, 3)):
        config = load_config(None, presets=[CONFIGS / "systems" / f"{system}.yaml"])
        model = build_teacher(config)
        assert model.num_parameters() == pytest.approx(parameters, rel=0.05)
        assert config.teacher.train.learning_rate == rate
        assert config.teacher.train.gradient_clip == 0.05
        assert config.clips.clip_frames == clip_frames
        assert math.prod(model.input_size) == 128**2
        drawn = config.student.initial_slots == "random"
        assert drawn == (system == "steve")

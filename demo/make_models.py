"""Makes the demo's stand-in models: `python -m demo.make_models` (one CPU core, see the README).

The method lives on features that already know objects (DINOv2); no pretrained weights can be had
here, so stage A trains two small ViTs to know the *generator's* objects, **with its instance labels**:
supervised InfoNCE (Khosla et al. 2020) over the patches of two frames of a video. Stage B trains a
SlotContrast teacher on the frozen larger one, without any label. No video of the demo's own splits is
used: every set below has a seed of its own.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from pipeline.clips.sources.synthetic import SyntheticSettings, render_video
from pipeline.evaluate.baselines import BASELINES
from pipeline.losses import feature_reconstruction_loss, slot_contrastive_loss, slot_kd_loss
from pipeline.metrics import fg_ari, mean_best_overlap
from pipeline.models import (
    BackboneConfig,
    SlotModel,
    SlotModelConfig,
    load_backbone_weights,
    load_slot_model,
    save_slot_model,
)
from pipeline.models.initialisation import sine_cosine_positions, start_as_soft_kmeans

SIZE, PATCH, FRAMES = 96, 8, 24
GRID = SIZE // PATCH
BACKBONE_SEED, SLOTS_SEED, VALIDATION_SEED = 1000, 3000, 2001  # of generated videos


@dataclass(frozen=True)
class BackboneRecipe:
    width: int
    depth: int
    steps: int
    learning_rate: float
    heads: int = 4
    videos: int = 600
    clips_per_step: int = 8
    seed: int = 0

    def config(self) -> BackboneConfig:
        arguments = {"patch_size": PATCH, "embed_dim": self.width, "depth": self.depth}
        return BackboneConfig(None, SIZE, {**arguments, "num_heads": self.heads})


@dataclass(frozen=True)
class SlotRecipe:
    steps: int
    learning_rate: float = 2e-3
    alpha: float = 0.1
    beta: float = 0.0
    warmup: int = 60
    batch: int = 4
    clip_frames: int = 4
    gradient_clip: float = 0.05
    anneal: bool = False  # to zero instead of to a half
    videos: int = 400
    seed: int = 0


TEACHER = BackboneRecipe(width=128, depth=4, steps=1600, learning_rate=1e-3)
STUDENT = BackboneRecipe(width=64, depth=2, steps=2000, learning_rate=2e-3)
TEACHER_SLOTS = SlotRecipe(steps=5000, anneal=True)
STUDENT_SLOTS = SlotRecipe(steps=2000, beta=0.2)
NUM_SLOTS, SLOT_SIZE, TEACHER_HIDDEN, STUDENT_HIDDEN = 6, 32, (128, 128), (64, 64)
VALIDATION_VIDEOS = 40


# --- stage A: backbones that know objects -----------------------------------------------------------


def render(videos: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Frames (V, T, H, W, 3) and instance labels (V, T, H, W), uint8."""
    settings = SyntheticSettings(videos=videos, seed=seed, frames=FRAMES, size=SIZE)
    rendered = [render_video(settings, index) for index in range(videos)]
    return np.stack([r[0] for r in rendered]), np.stack([r[1] for r in rendered])


def patch_labels(labels: np.ndarray) -> tuple[Tensor, Tensor]:
    """The label of most pixels of each patch (..., GRID, GRID), and the share that has it."""
    blocks = labels.reshape(*labels.shape[:-2], GRID, PATCH, GRID, PATCH)
    counts = np.stack([(blocks == k).sum((-3, -1)) for k in range(int(labels.max()) + 1)], -1)
    return torch.from_numpy(counts.argmax(-1)), torch.from_numpy(counts.max(-1) / PATCH**2)


def object_contrast(features: Tensor, labels: Tensor, purity: Tensor, temperature: float = 0.1) -> Tensor:
    """Supervised InfoNCE: patches (B, M, F) of one object attract, the others of the clip repel.

    A patch weighs 1 / sqrt(patches of its object); patches that straddle a border don't count.
    """
    unit = F.normalize(features, dim=-1)
    itself = torch.eye(unit.shape[1], dtype=torch.bool)
    similarity = (unit @ unit.transpose(1, 2) / temperature).masked_fill(itself, -1e4)
    log_share = similarity - similarity.logsumexp(-1, keepdim=True)
    alike = labels[:, :, None] == labels[:, None, :]
    mates = alike & ~itself
    attraction = (log_share * mates).sum(-1) / mates.sum(-1).clamp(min=1)
    weight = (purity > 0.6) / alike.sum(-1).sqrt()
    return -(attraction * weight).sum() / weight.sum()


def flip(tensor: Tensor, which: int) -> Tensor:
    """One of the square's eight symmetries of the last two dimensions."""
    tensor = tensor.flip(-1) if which & 1 else tensor
    tensor = tensor.flip(-2) if which & 2 else tensor
    return tensor.transpose(-1, -2) if which & 4 else tensor


def pretrain(recipe: BackboneRecipe, frames: np.ndarray, labels: np.ndarray) -> SlotModel:
    """A slot model whose frozen backbone knows objects; the rest of it is untrained."""
    torch.manual_seed(recipe.seed)
    rng = np.random.default_rng(recipe.seed)
    model = new_slot_model(recipe, (8,), seed=recipe.seed)
    vit = model.encoder.backbone.model.requires_grad_(True)
    assert vit.pos_embed is not None
    with torch.no_grad():  # timm's own 0.02 would hide the positions
        periods = 50 ** (torch.arange(recipe.width // 4) / (recipe.width // 4)) / 1.5
        vit.pos_embed[0, 0] = 0
        vit.pos_embed[0, 1:] = 0.3 * sine_cosine_positions((GRID, GRID), recipe.width, periods)
    optimizer = torch.optim.AdamW(vit.parameters(), betas=(0.9, 0.98), weight_decay=0.02)
    patches, purity = patch_labels(labels)
    for step in range(recipe.steps):
        anneal = 0.02 + 0.49 * (1 + math.cos(math.pi * step / recipe.steps))
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * min(1, (step + 1) / 100) * anneal
        video = rng.choice(len(frames), (recipe.clips_per_step, 1), replace=False)
        first = rng.integers(0, FRAMES // 2, (recipe.clips_per_step, 1))
        time_ = np.hstack([first, first + rng.integers(1, FRAMES // 2, first.shape)])
        which = int(rng.integers(8))
        images = flip(model.prepare(list(frames[video, time_])), which).flatten(0, 1)
        tokens = vit.forward_features(images)[:, vit.num_prefix_tokens :]
        flat = tokens.flatten(0, 1)
        unit_scale = flat.mean(0).square().mean() + (flat.std(0) - 1).square().mean()
        contrast = object_contrast(
            tokens.reshape(len(video), -1, recipe.width),
            flip(patches[video, time_], which).flatten(1),
            flip(purity[video, time_], which).flatten(1),
        )
        optimizer.zero_grad()
        (contrast + unit_scale).backward()
        torch.nn.utils.clip_grad_norm_(vit.parameters(), 1.0)
        optimizer.step()
        if step % 200 == 0 or step == recipe.steps - 1:
            print(f"  step {step}: contrast {contrast:.3f}, scale {unit_scale:.3f}", flush=True)
    vit.requires_grad_(False)
    return model


# --- stage B: slots ---------------------------------------------------------------------------------


def new_slot_model(recipe: BackboneRecipe, hidden: tuple[int, ...], *, seed: int) -> SlotModel:
    torch.manual_seed(seed)
    return SlotModel(SlotModelConfig(recipe.config(), NUM_SLOTS, SLOT_SIZE, decoder_hidden_sizes=hidden))


def cache_features(model: SlotModel, frames: np.ndarray) -> Tensor:
    """The frozen backbone's features (V, T, P, F); half precision, to fit into memory."""
    return torch.cat([model.backbone_features(model.prepare([video])).half() for video in frames])


def train_slots(
    model: SlotModel, features: Tensor, recipe: SlotRecipe, targets: Tensor | None = None
) -> float:
    """Trains all but the backbone; `targets` are the teacher's slots (V, T, N, d). Seconds a step."""
    rng = np.random.default_rng(recipe.seed)
    parameters = model.trainable_parameters()
    optimizer = torch.optim.Adam(parameters)
    started = time.perf_counter()
    for step in range(recipe.steps):
        done = max(0.0, (step - recipe.warmup) / (recipe.steps - recipe.warmup))
        factor = min(1, step / recipe.warmup) * (1 - done if recipe.anneal else 0.5**done)
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * factor
        video = rng.choice(len(features), (recipe.batch, 1), replace=False)
        clip = rng.integers(0, FRAMES // recipe.clip_frames, (recipe.batch, 1))
        frame = clip * recipe.clip_frames + np.arange(recipe.clip_frames)
        output = model(backbone_features=features[video, frame].float())
        reconstruction = feature_reconstruction_loss(output.reconstruction, output.backbone_features)
        loss = reconstruction + recipe.alpha * slot_contrastive_loss(output.slots)
        if targets is not None and recipe.beta:
            loss = loss + recipe.beta * slot_kd_loss(output.slots, targets[video, frame])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, recipe.gradient_clip)
        optimizer.step()
        if (step + 1) % 1000 == 0:
            print(f"  step {step + 1}: reconstruction {reconstruction:.3f}", flush=True)
    return (time.perf_counter() - started) / recipe.steps


@torch.no_grad()
def clip_targets(teacher: SlotModel, features: Tensor, clip_frames: int) -> Tensor:
    """The teacher's slots (V, T, N, d), rolled out anew from the first frame of every clip."""
    slots = []
    for video in features.float():
        clips = video.unflatten(0, (-1, clip_frames))
        slots.append(teacher.roll_out(clips)[0].flatten(0, 1))
    return torch.stack(slots)


# --- scores on the validation set -------------------------------------------------------------------


def score(labels: np.ndarray, predicted: list[Tensor]) -> dict[str, float]:
    """FG-ARI and mBO in per cent, the mean over the videos."""
    sums: dict[str, float] = {}
    for truth, guess in zip(labels, predicted, strict=True):
        objects = torch.from_numpy(np.stack([truth == k for k in range(1, truth.max() + 1)], 1))
        for level in ("video", "image"):
            for name, metric in (("FG-ARI", fg_ari), ("mBO", mean_best_overlap)):
                value = metric(objects[None], guess[None], level=level)
                sums[f"{level} {name}"] = sums.get(f"{level} {name}", 0.0) + value
    return {key: round(100 * value / len(labels), 1) for key, value in sums.items()}


@torch.no_grad()
def score_model(model: SlotModel, features: Tensor, labels: np.ndarray) -> dict[str, float]:
    predicted = []
    for video in features:
        masks = model(backbone_features=video[None].float()).masks[0]
        predicted.append(model.label_maps(masks, (SIZE, SIZE)))
    return score(labels, predicted)


def score_baselines(frames: np.ndarray, labels: np.ndarray) -> None:
    for name, baseline in BASELINES.items():
        predict = baseline(NUM_SLOTS)
        chunks = [next(predict(iter([video])))[1] for video in frames]
        report(name, score(labels, [torch.from_numpy(np.ascontiguousarray(c)) for c in chunks]))


def report(name: str, scores: dict[str, float]) -> None:
    print(f"{name:41}" + "  ".join(f"{key} {value:5.1f}" for key, value in scores.items()), flush=True)


def save_backbone(model: SlotModel, path: Path) -> None:
    """The ViT alone, under timm's own names, without its (unused) final norm."""
    state = model.encoder.backbone.model.state_dict()
    save_file({key: value.half().contiguous() for key, value in state.items()}, path)


def as_stored(model: SlotModel) -> SlotModel:
    """The model with its weights rounded as the files round them."""
    model.load_state_dict({key: value.half().float() for key, value in model.state_dict().items()})
    return model.eval()


def make_backbones(out: Path) -> None:
    """Stage A; the teacher's goes into a model folder whose slots stage B trains."""
    frames, labels = render(TEACHER.videos, BACKBONE_SEED)
    print("pretraining the teacher's backbone with instance labels", flush=True)
    save_slot_model(pretrain(TEACHER, frames, labels), out / "teacher", dtype=torch.float16)
    print("pretraining the student's backbone with instance labels", flush=True)
    save_backbone(pretrain(STUDENT, frames, labels), out / "student_backbone.safetensors")


def new_teacher(out: Path) -> SlotModel:
    """A teacher with stage A's backbone and untrained slots."""
    teacher = new_slot_model(TEACHER, TEACHER_HIDDEN, seed=TEACHER_SLOTS.seed)
    stored = load_slot_model(out / "teacher")
    teacher.encoder.backbone.load_state_dict(stored.encoder.backbone.state_dict())
    start_as_soft_kmeans(teacher)
    return teacher


def new_student(out: Path, seed: int) -> SlotModel:
    student = new_slot_model(STUDENT, STUDENT_HIDDEN, seed=seed)
    load_backbone_weights(student.encoder.backbone, out / "student_backbone.safetensors")
    start_as_soft_kmeans(student)
    return student


def compare_students(out: Path, teacher: SlotModel, frames: np.ndarray, seeds: int) -> None:
    """Scores students trained with and without distillation, and with the copied start alone."""
    seen, truth = render(VALIDATION_VIDEOS, VALIDATION_SEED)
    blank = new_student(out, 0)
    features, validation = cache_features(blank, frames), cache_features(blank, seen)
    targets = clip_targets(teacher, cache_features(teacher, frames), STUDENT_SLOTS.clip_frames)
    for name, beta, copy in (
        ("no KD", 0.0, False),
        ("copied start alone", 0.0, True),
        ("SlotMatch", STUDENT_SLOTS.beta, True),
    ):
        for seed in range(seeds):
            student = new_student(out, seed)
            if copy:
                student.initializer.load_state_dict(teacher.initializer.state_dict())
            recipe = replace(STUDENT_SLOTS, seed=seed, beta=beta)
            seconds = train_slots(student, features, recipe, targets)
            scores = score_model(student, validation, truth)
            report(f"{name}, seed {seed} ({seconds:.2f} s/step)", scores)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="where the models go")
    stages = ("backbones", "slots", "scores")
    parser.add_argument("--start", choices=stages, default=stages[0], help="keep what --out has from before")
    parser.add_argument("--students", type=int, default=0, metavar="SEEDS", help="also compare students")
    options = parser.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()

    if options.start == "backbones":
        make_backbones(options.out)
        print(f"backbones done after {time.perf_counter() - started:.0f} s", flush=True)
    frames, _ = render(TEACHER_SLOTS.videos, SLOTS_SEED)
    if options.start != "scores":
        print("training the teacher's slots, without labels", flush=True)
        teacher = new_teacher(options.out)
        train_slots(teacher, cache_features(teacher, frames), TEACHER_SLOTS)
        save_slot_model(teacher, options.out / "teacher", dtype=torch.float16)
        print(f"teacher done after {time.perf_counter() - started:.0f} s", flush=True)

    print(f"validation: {VALIDATION_VIDEOS} generated videos, seed {VALIDATION_SEED}")
    seen, truth = render(VALIDATION_VIDEOS, VALIDATION_SEED)
    score_baselines(seen, truth)
    teacher = load_slot_model(options.out / "teacher")
    report("teacher", score_model(teacher, cache_features(teacher, seen), truth))
    if options.students:
        compare_students(options.out, teacher, frames, options.students)


if __name__ == "__main__":
    main()

"""The training loop that every worker runs; students and teachers differ only in their `TrainingSpec`."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from pipeline import storage
from pipeline.artifacts.identity import MODEL_FOLDER
from pipeline.clips.table import ClipSet
from pipeline.clips.views import apply_view, make_view
from pipeline.compute import keep_freed_memory
from pipeline.config import Distill
from pipeline.distill.checkpoint import TrainingState, latest_checkpoint, load_checkpoint, save_checkpoint
from pipeline.distill.data import Loader, RawBatch, Sampler
from pipeline.distill.run import OnValidation, TrainingSpec, build
from pipeline.distill.step import Batch, learning_rate_factor, training_step
from pipeline.distill.validation import Validation
from pipeline.log import Progress, log
from pipeline.models import SlotModel, save_public_checkpoint, save_slot_model
from pipeline.segment.figures import Panel, comparison
from pipeline.targets.maker import teacher_outputs
from pipeline.targets.table import TargetSet
from pipeline.tracking.runs import HISTORY_FILE, RunLogger

PUBLIC_CHECKPOINT = "teacher.ckpt"

PREEMPTION_CHECK_STEPS = 5  # each check asks all workers


def _autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    if precision == "bf16" or (precision == "auto" and device.type == "cuda"):
        return torch.bfloat16
    return None


class _Run:
    """The models and the data of one worker."""

    def __init__(self, spec: TrainingSpec, device: torch.device) -> None:
        self.spec, self.device = spec, device
        self.clips = ClipSet(spec.clips_uri)
        self.targets = TargetSet(spec.targets_uri) if spec.targets_uri else None
        settings = spec.settings
        objective, teacher = build(spec)
        self.objective = objective.to(device)
        self.model = objective.model
        self.teacher = teacher.to(device) if teacher is not None else None
        self.bound_every = 0
        if isinstance(settings, Distill) and settings.distils:
            self.bound_every = settings.measure_bound_every
        # Features are worth reading only if they replace the frames altogether.
        self.cached_features = self.targets is not None and self.targets.has_features and self.teacher is None
        self.validation = (
            Validation(spec.validation_uri, spec.config.evaluate) if spec.validation_uri is not None else None
        )

    def shared_objective(self, world_size: int) -> torch.nn.Module:
        """The loss as a module, its gradients averaged over the workers."""
        if world_size == 1:
            return self.objective
        # With one frame a clip nothing uses the predictor.
        alone = self.clips.clip_frames == 1
        return DistributedDataParallel(self.objective, find_unused_parameters=alone)

    def loader(self, start: int, rank: int, world_size: int) -> Loader:
        """This worker's batches from step `start` on."""
        settings, config = self.spec.settings, self.spec.config
        sampler = Sampler(
            self.clips.videos,
            seed=settings.seed,
            batch_size=settings.batch_size,
            views=None if isinstance(settings, Distill) and settings.fresh_views else config.targets.views,
        )
        return Loader(
            self.spec.clips_uri,
            self.spec.targets_uri,
            sampler,
            recipe=config.targets,
            dataset_seed=config.dataset.seed,
            pixels=not self.cached_features,
            teacher_features=self.objective.terms.feature_kd > 0 and self.targets is not None,
            rank=rank,
            world_size=world_size,
            start=start,
            stop=settings.steps,
            threads=settings.loader_threads,
        )

    def batch(self, raw: RawBatch) -> Batch:
        targets, teacher_features = raw.target_slots, raw.teacher_features
        if self.teacher is not None:
            assert raw.pixels is not None
            rollout = self.spec.config.targets.rollout
            with torch.no_grad():
                targets, teacher_features = teacher_outputs(self.teacher, raw.pixels, raw.views, rollout)
        initial = None
        if self.model.config.initializer == "random":
            initial = self.model.initial_slots(len(raw.views), [v.noise_seed for v in raw.views])
        video = self.model.prepare(raw.pixels) if raw.pixels is not None else None
        return Batch(video, raw.features, targets, teacher_features, initial).to(self.device)

    def picture(self, folder: str, step: int) -> Path:
        """An overlay strip of the first video's first clip."""
        video = next(v for v in self.clips.videos if v.full_clips)
        frames = self.clips.read_clip(video.shard, video.first_row).frames
        config = self.spec.config
        view = make_view(config.targets, config.dataset.seed, video.video_id, 0, 0, video.height, video.width)
        pixels = apply_view(frames, view)
        self.model.eval()
        *_, (_, _, masks) = self.model.stream([pixels], noise_seed=view.noise_seed)
        labels = self.model.label_maps(masks, pixels.shape[1:3]).cpu().numpy()
        self.model.train()
        path = Path(folder) / f"overlay_{step:08d}.png"
        comparison([Panel(pixels, {"masks": labels})], across=1, width=640).save(path)
        return path


def train_loop(
    spec: TrainingSpec,
    *,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | None = None,
    after_checkpoint: Callable[[int], None] = lambda step: None,
    on_validation: OnValidation = lambda step, scores: None,
    preempted: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Trains to the end, from the newest checkpoint of the run if there is one.

    Args:
        after_checkpoint: called by every worker with the step.
        on_validation: called by every worker with the step and the scores (`validation_video_mbo`, …) of each
            validation but the one at the end, first those before the checkpoint that the run goes on from.
        preempted: whether a worker's node is about to be taken away, the same on every worker; asked every
            `PREEMPTION_CHECK_STEPS` steps. The first yes makes a checkpoint at once.

    Returns `status` ("ok", or "non-finite" where the gradient was), the last step, the history of
    losses and the rate. The models and checkpoints are in the run folder.
    """
    settings, device = spec.settings, device or torch.device("cpu")
    if device.type == "cpu":
        keep_freed_memory()
    run = _Run(spec, device)
    model = run.model
    model.train()
    optimizer = torch.optim.Adam(run.objective.trainable_parameters(), lr=settings.learning_rate)
    state = TrainingState(0, [])
    resumed = latest_checkpoint(spec.run_uri)
    if resumed:
        state = load_checkpoint(resumed, run.objective, optimizer)
        if rank == 0:
            log(f"{spec.label}: going on from step {state.step} ({resumed})")
    for row in state.history:
        if (scores := _validation_scores(row)) and row["step"] < settings.steps:
            on_validation(int(row["step"]), scores)
    objective = run.shared_objective(world_size)
    logger = RunLogger(spec.config, spec.mlflow_run if rank == 0 else None)
    history = list(state.history)
    step, status = state.step, "ok"
    autocast = _autocast_dtype(settings.precision, device)
    frames_per_step = settings.batch_size * run.clips.clip_frames
    with ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory())
        loader = stack.enter_context(run.loader(step, rank, world_size))
        progress = stack.enter_context(Progress(spec.label, settings.steps, "steps")) if rank == 0 else None
        if progress:
            progress.skip(step)
        waited, noticed = 0.0, False
        since = time.monotonic()
        last = step
        for raw, seconds in loader:
            waited += seconds
            factor = learning_rate_factor(
                step, warmup_steps=settings.warmup_steps, total_steps=settings.steps
            )
            rate = settings.learning_rate * factor
            batch = run.batch(raw)
            values = training_step(
                objective,
                optimizer,
                batch,
                learning_rate=rate,
                gradient_clip=settings.gradient_clip,
                autocast=autocast,
            )
            if not math.isfinite(values["gradient_norm"]):
                status = "non-finite"
                break
            step += 1
            validate = run.validation if _due(step, settings.validate_every, settings.steps) else None
            measure = _due(step, run.bound_every, settings.steps)
            if measure:
                values |= run.objective.measure_bound(batch)
            if validate or measure or _due(step, settings.log_every, settings.steps):
                values = _mean_over_workers(values, world_size, device)
                elapsed = max(time.monotonic() - since, 1e-9)
                speed = {
                    "learning_rate": rate,
                    "frames_per_second": (step - last) * frames_per_step / elapsed,
                    "data_wait_share": waited / elapsed,
                }
                if validate:
                    values |= validate.scores(model, rank, world_size)
                history.append({"step": step, **values})
                logger.metrics({**values, **speed}, step)
                waited, since, last = 0.0, time.monotonic(), step
                if validate and step < settings.steps:
                    on_validation(step, _validation_scores(values))
            if progress:
                progress.advance(note=f"loss {values['total']:.4f}")
            if rank == 0 and _due(step, max(1, settings.steps // settings.overlays), settings.steps):
                logger.file(run.picture(scratch, step), "overlays")
            notice = not noticed and step % PREEMPTION_CHECK_STEPS == 0 and preempted()
            if notice and rank == 0:
                log(f"{spec.label}: a node is about to be taken away; making a checkpoint of step {step} now")
            noticed |= notice
            if notice or _due(step, settings.checkpoint_every, settings.steps):
                if rank == 0:
                    saved = TrainingState(step, history)
                    save_checkpoint(
                        spec.run_uri, run.objective, optimizer, saved, keep=settings.keep_checkpoints
                    )
                after_checkpoint(step)
    logger.flush(last=True)
    if status == "ok" and rank == 0:
        _publish_model(spec, model, history)
    return {"status": status, "step": step, "history": history}


def _validation_scores(values: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in values.items() if key.startswith("validation_")}


def _due(step: int, every: int, steps: int) -> bool:
    """Whether something that happens every few steps (0: never) and at the end happens after this one."""
    return every > 0 and (step % every == 0 or step == steps)


def _mean_over_workers(values: dict[str, float], world_size: int, device: torch.device) -> dict[str, float]:
    if world_size == 1:
        return values
    tensor = torch.tensor(
        list(values.values()), dtype=torch.float64 if device.type == "cpu" else None, device=device
    )
    dist.all_reduce(tensor)
    return dict(zip(values, (tensor / world_size).tolist(), strict=True))


def _publish_model(spec: TrainingSpec, model: SlotModel, history: list[dict[str, float]]) -> None:
    if storage.is_complete(spec.run_uri):
        log(f"{spec.label}: another job has published this run meanwhile; its model stays")
        return
    with tempfile.TemporaryDirectory() as scratch:
        save_slot_model(model, scratch)
        storage.upload_folder(scratch, storage.join(spec.run_uri, MODEL_FOLDER))
    if spec.role == "teacher":
        with tempfile.TemporaryDirectory() as scratch:
            save_public_checkpoint(model, Path(scratch) / PUBLIC_CHECKPOINT, step=spec.settings.steps)
            storage.upload_folder(scratch, spec.run_uri)
    storage.write_json(storage.join(spec.run_uri, HISTORY_FILE), history)

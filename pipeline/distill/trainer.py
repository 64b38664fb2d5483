"""The training loop, the same for students and teachers and on every worker.

It needs PyTorch and the readers of clips and targets alone: whoever has Ray, MLflow or something to draw with passes
them in (`Hooks`, `Logger`, `Draw`), as `ray_train` does.
"""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import Literal

import torch
from torch.nn.parallel import DistributedDataParallel

from pipeline import storage
from pipeline.artifacts.manifests import MODEL_FOLDER
from pipeline.clips.table import ClipSet
from pipeline.clips.views import apply_view, make_view, stable_hash
from pipeline.distill.batches import slot_batch
from pipeline.distill.checkpoint import TrainingState, latest_checkpoint, load_checkpoint, save_checkpoint
from pipeline.distill.data import Loader, RawBatch, Sampler
from pipeline.distill.frame_map import open_frame_map
from pipeline.distill.hooks import PREEMPTION_CHECK_STEPS, Draw, Hooks, Logger, NoLogger, Outcome
from pipeline.distill.pace import Pace, mean_over_workers
from pipeline.distill.precision import autocast_type, choose_precision, earlier_precision
from pipeline.distill.run import Run, build
from pipeline.distill.start import settle_start
from pipeline.distill.step import Batch, GradientWatch, adam, read_values, training_step
from pipeline.distill.system_objective import SystemBatch, SystemObjective
from pipeline.distill.validation import Validation
from pipeline.evaluate.scoring import given_boxes
from pipeline.log import Progress, log
from pipeline.models import SlotModel, save_public_checkpoint, save_slot_model
from pipeline.models.memory import keep_freed_memory
from pipeline.targets.table import TargetSet
from pipeline.tracking import HISTORY_FILE

PUBLIC_CHECKPOINT = "teacher.ckpt"


class Trainer:
    """One worker of a run, with its models and its data. The models and checkpoints go to the run's folder."""

    def __init__(
        self,
        run: Run,
        *,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | None = None,
        hooks: Hooks | None = None,
        logger: Logger | None = None,
        draw: Draw | None = None,
    ) -> None:
        """
        Args:
            logger: of the first worker, as every worker would say the same.
            draw: makes the pictures that the first worker logs; without it there are none.

        Raises:
            ConfigError: as `build`.
            storage.IncompleteError: clips or targets are not published.
        """
        self.run, self.rank, self.world_size = run, rank, world_size
        self.device = device or torch.device("cpu")
        self.hooks, self.logger, self.draw = hooks or Hooks(), logger or NoLogger(), draw
        if self.device.type == "cpu":
            keep_freed_memory()
        self.clips = ClipSet(run.clips_uri)
        self.targets = TargetSet(run.targets_uri) if run.targets_uri else None
        objective, teacher = build(run)
        self.objective = objective.to(self.device)
        self.model = objective.model.train()
        self.teacher = teacher.to(self.device) if teacher is not None else None
        groups = [{"params": group} for group in objective.parameter_groups()]
        self.optimizer = adam(groups, run.settings.learning_rate, self.device)
        self.validation = Validation(run.validation_uri, run.config.evaluate) if run.validation_uri else None
        self.precision = choose_precision(run.settings.precision, self.device)
        self.step = 0  # that many are done
        self.watch = GradientWatch(self.device)
        self.asynchronous = self.device.type != "cpu"  # whoever reads a number waits for the device
        self.history: list[dict[str, float]] = []
        self._pace = Pace(self.step)
        self._noticed = False  # that a node is about to be taken away

    def train(self) -> Outcome:
        """Trains to the end, from the newest checkpoint of the run if there is one.

        Raises:
            ValueError: a damaged checkpoint.
            TargetMismatch: targets of other clips.
        """
        self.resume()
        run, settings = self.run, self.run.settings
        self._say_precision()
        shared = self._share_objective()
        note = ""
        with self.loader() as loader, self._progress() as progress:
            if self.step == 0:  # later it is the checkpoint's
                settle_start(run, self.model, loader)
            self._pace = Pace(self.step)
            for raw, waited in loader:
                self._pace.waited += waited
                batch, rates = self.batch(raw), self.learning_rates()
                done = self.train_step(shared, batch, rates)
                self.step += 1
                if self.logs() or not self.asynchronous:
                    if self.diverged():
                        break
                    values = read_values(done)
                    if self.due(run.bound_every):
                        values |= self.objective.measure_bound(batch)
                    note = f"loss {self.log(values, rates[0])['total']:.4f}"
                if progress:
                    progress.advance(note=note)
                if self.due(max(1, settings.steps // settings.overlays)):
                    self.picture()
                if self.notice() or self.due(settings.checkpoint_every):
                    if self.diverged():
                        break
                    self.save()
        self.logger.flush(last=True)
        status: Literal["ok", "non-finite"] = "non-finite" if self.diverged() else "ok"
        if status == "ok" and self.rank == 0:
            self.publish()
        return Outcome(status, self.step, self.history, self.precision, self.world_size)

    def diverged(self) -> bool:
        """Whether a gradient was not finite, and then back at the step before it; waits for the device."""
        if self.watch.failed:
            self.step = int(self.watch.finite_steps)
            return True
        return False

    def resume(self) -> None:
        """Goes to where the newest checkpoint of the run is, if there is one.

        Raises:
            ValueError: it is damaged.
        """
        latest = latest_checkpoint(self.run.uri)
        if latest:
            state = load_checkpoint(latest, self.objective, self.optimizer)
            self.step, self.history = state.step, list(state.history)
            self.watch = GradientWatch(self.device, self.step)
            # One curve has one precision, whatever this machine is good at.
            self.precision = state.precision or earlier_precision(self.run.settings.precision, self.device)
            if self.rank == 0:
                log(f"{self.run.label}: going on from step {self.step} ({latest})")
        for row in self.history:
            scores = {key: value for key, value in row.items() if key.startswith("validation_")}
            if scores and row["step"] < self.run.settings.steps:
                self.hooks.on_validation(int(row["step"]), scores)

    def _say_precision(self) -> None:
        if self.rank == 0:
            log(f"{self.run.label}: computing in {self.precision} (precision={self.run.settings.precision})")
            self.logger.tag("precision", self.precision)

    def _share_objective(self) -> torch.nn.Module:
        """The loss as a module, its gradients averaged over the workers."""
        if self.world_size == 1:
            return self.objective
        # With one frame a clip nothing uses the predictor.
        alone = self.clips.clip_frames == 1
        return DistributedDataParallel(self.objective, find_unused_parameters=alone)

    def loader(self) -> Loader:
        """This worker's share of the batches that are left."""
        run, config, settings = self.run, self.run.config, self.run.settings
        sampler = Sampler(
            self.clips.videos, seed=settings.seed, batch_size=settings.batch_size, views=run.views
        )
        # Features are worth reading only if they replace the frames altogether.
        with_targets = self.targets is not None and self.targets.has_features and self.teacher is None
        cached_features = with_targets or run.features_uri is not None
        return Loader(
            run.clips_uri,
            run.targets_uri,
            sampler,
            recipe=config.targets,
            dataset_seed=config.dataset.seed,
            pixels=not cached_features,
            features_uri=run.features_uri,
            teacher_features=run.terms.feature_kd > 0 and self.targets is not None,
            motion=self.objective.needs_motion,
            flow=self.objective.needs_flow,
            boxes=self.objective.needs_boxes,
            rank=self.rank,
            world_size=self.world_size,
            start=self.step,
            stop=settings.steps,
            threads=settings.loader_threads,
            device=self.device,
            frame_map=None if cached_features else open_frame_map(config.storage, self.clips),
        )

    def _progress(self) -> contextlib.AbstractContextManager[Progress | None]:
        """The first worker's."""
        if self.rank > 0:
            return contextlib.nullcontext()
        progress = Progress(self.run.label, self.run.settings.steps, "steps")
        progress.skip(self.step)
        return progress

    def due(self, every: int) -> bool:
        """Whether something that happens every few steps (0: never) and at the end happens after this one."""
        return every > 0 and (self.step % every == 0 or self.step == self.run.settings.steps)

    def learning_rates(self) -> list[float]:
        """Of the next step, for each group of parameters."""
        settings = self.run.settings
        factors = self.objective.rate_factors(
            self.step, warmup_steps=settings.warmup_steps, total_steps=settings.steps
        )
        return [settings.learning_rate * factor for factor in factors]

    def batch(self, raw: RawBatch) -> Batch | SystemBatch:
        """What was read, as the objective takes it, with what a live teacher makes of it, on the device."""
        if isinstance(self.objective, SystemObjective):
            assert raw.pixels is not None
            seed = stable_hash(self.run.settings.seed, "step", self.step, self.rank)
            return SystemBatch(raw.pixels, self.step, seed, raw.motion, raw.flow, raw.boxes)
        assert isinstance(self.model, SlotModel)
        return slot_batch(self.model, raw, self.teacher, self.run.config.targets.rollout, self.device)

    def train_step(
        self, shared: torch.nn.Module, batch: Batch | SystemBatch, rates: list[float]
    ) -> dict[str, torch.Tensor]:
        """One update of the weights; returns the losses and the gradient norm, as `training_step`."""
        done = training_step(
            shared,
            self.optimizer,
            batch,
            learning_rate=rates,
            gradient_clip=self.run.settings.gradient_clip,
            norm_type=self.objective.norm_type,
            autocast=autocast_type(self.precision),
            watch=self.watch,
        )
        self.objective.after_step(self.step)
        return done

    def _validates(self) -> bool:
        return self.validation is not None and self.due(self.run.settings.validate_every)

    def logs(self) -> bool:
        """Whether this step's values go into the history."""
        return self._validates() or self.due(self.run.bound_every) or self.due(self.run.settings.log_every)

    def log(self, values: dict[str, float], rate: float) -> dict[str, float]:
        """Puts a step's values into the history where one is due, as their mean over the workers; returns them."""
        if not self.logs():
            return values
        settings, validates = self.run.settings, self._validates()
        values = mean_over_workers(values, self.world_size, self.device)
        frames = settings.batch_size * self.clips.clip_frames
        speed = {"learning_rate": rate, **self._pace.speed(self.step, frames)}
        scores = self.validate() if validates else {}
        values |= scores
        self.history.append({"step": self.step, **values})
        self.logger.metrics({**values, **speed}, self.step)
        self._pace = Pace(self.step)
        if validates and self.step < settings.steps:
            self.hooks.on_validation(self.step, scores)
        return values

    def validate(self) -> dict[str, float]:
        """The model's scores on the validation clips, by all workers together; none where no object is in sight."""
        assert self.validation is not None
        return self.validation.scores(self.model, self.rank, self.world_size)

    def picture(self) -> None:
        """Logs an overlay strip of the first video's first clip."""
        if self.rank > 0 or self.draw is None:
            return
        video = next(v for v in self.clips.videos if v.full_clips)
        frames = self.clips.read_clip(video.shard, video.first_row).frames
        config = self.run.config
        view = make_view(config.targets, config.dataset.seed, video.video_id, 0, 0, video.height, video.width)
        pixels = apply_view(frames, view)
        self.model.eval()
        given = given_boxes(self.model, self.clips, video, view)
        *_, (_, _, masks) = self.model.stream([pixels], noise_seed=view.noise_seed, **given)
        labels = self.model.label_maps(masks, pixels.shape[1:3]).cpu().numpy()
        self.model.train()
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / f"overlay_{self.step:08d}.png"
            self.draw(pixels, labels).save(path)
            self.logger.file(path, "overlays")

    def notice(self) -> bool:
        """Whether it is news that a worker's node is about to be taken away."""
        if self._noticed or self.step % PREEMPTION_CHECK_STEPS or not self.hooks.preempted():
            return False
        self._noticed = True
        if self.rank == 0:
            log(
                f"{self.run.label}: a node is about to be taken away; making a checkpoint of step {self.step} now"
            )
        return True

    def save(self) -> None:
        """Makes a checkpoint of this step."""
        if self.rank == 0:
            save_checkpoint(
                self.run.uri,
                self.objective,
                self.optimizer,
                TrainingState(self.step, self.history, self.precision),
                keep=self.run.settings.keep_checkpoints,
                slim=self.run.slim,
            )
        self.hooks.after_checkpoint(self.step)

    def publish(self) -> None:
        """Writes the model and the history, unless the run is published already."""
        run = self.run
        if storage.is_complete(run.uri):
            log(f"{run.label}: another job has published this run meanwhile; its model stays")
            return
        with tempfile.TemporaryDirectory() as scratch:
            save_slot_model(self.model, scratch, slim=run.slim)
            storage.upload_folder(scratch, storage.join(run.uri, MODEL_FOLDER))
        if run.public_checkpoint:
            with tempfile.TemporaryDirectory() as scratch:
                save_public_checkpoint(self.model, Path(scratch) / PUBLIC_CHECKPOINT, step=run.settings.steps)
                storage.upload_folder(scratch, run.uri)
        storage.write_json(storage.join(run.uri, HISTORY_FILE), self.history)

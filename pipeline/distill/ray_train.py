"""A training run on this machine or on a cluster: Ray Train around the trainer, MLflow and pictures beside it."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from pipeline import storage
from pipeline.compute import arrow_filesystem, gpus_to_use, ray_session
from pipeline.config import ConfigError, Training
from pipeline.distill.run import OnValidation, Run
from pipeline.distill.trainer import Hooks, Outcome, Trainer
from pipeline.segment.figures import Panel, comparison
from pipeline.tracking import RunLogger
from pipeline.tracking.system_metrics import system_metrics


def fit(run: Run, on_validation: OnValidation | None = None, train_callbacks: Sequence[Any] = ()) -> Outcome:
    """Trains to the end: in this process where `workers` is 0, else on Ray.

    Args:
        on_validation: see `Hooks`; called in this process, so only with `workers` = 0.
        train_callbacks: Ray Train's, to follow the same validations of its workers (`ray.train.report`).

    Raises:
        ConfigError: more workers than fit the cluster.
    """
    if run.settings.workers == 0:
        hooks = Hooks(on_validation=on_validation) if on_validation else Hooks()
        with system_metrics(run.config, run.mlflow_run):
            return Trainer(run, hooks=hooks, logger=RunLogger(run.config, run.mlflow_run), draw=_draw).train()
    with ray_session(run.config):
        return _fit_on_ray(run, train_callbacks)


def _draw(frames: np.ndarray, labels: np.ndarray) -> Image.Image:
    return comparison([Panel(frames, {"masks": labels})], across=1, width=640)


def _worker(options: dict[str, Any]) -> Outcome:
    """What Ray Train runs on every worker."""
    import ray.train
    import ray.train.torch

    logging.getLogger("ray.train").setLevel(logging.WARNING)
    context = ray.train.get_context()
    run: Run = options["run"]
    rank = context.get_world_rank()
    mlflow_run = run.mlflow_run if rank == 0 else None
    # `report` is a barrier: every worker reports as often.
    hooks = Hooks(
        after_checkpoint=lambda step: ray.train.report({"step": step}),
        on_validation=lambda step, scores: ray.train.report({"step": step, **scores}),
        preempted=lambda: ray.train.get_preemption_info() is not None,
    )
    with system_metrics(run.config, mlflow_run):
        return Trainer(
            run,
            rank=rank,
            world_size=context.get_world_size(),
            device=ray.train.torch.get_device(),
            hooks=hooks,
            logger=RunLogger(run.config, mlflow_run),
            draw=_draw,
        ).train()


def _fit_on_ray(run: Run, callbacks: Sequence[Any]) -> Outcome:
    import ray.train
    import ray.train.torch

    config, settings = run.config, run.settings
    root = storage.join(storage.absolute(config.storage.root), "ray")
    # Ray keeps only its own bookkeeping here; the checkpoints are ours. A name of its own for every
    # attempt: Ray would take a finished run of the same name for one to be resumed.
    name = f"{run.kind}-{uuid.uuid4().hex[:12]}"
    gpus = gpus_to_use(config)
    _check_resources(settings, gpus)
    worker: Any = _worker
    run_config: Any = ray.train.RunConfig  # typed as the older one, which has no logging_config
    trainer = ray.train.torch.TorchTrainer(
        worker,
        train_loop_config={"run": run},
        scaling_config=ray.train.ScalingConfig(
            num_workers=settings.workers,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": settings.cpus_per_worker, **({"GPU": 1} if gpus else {})},
        ),
        run_config=run_config(
            name=name,
            storage_path=storage.filesystem(root)[1],
            storage_filesystem=arrow_filesystem(root),
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
            failure_config=ray.train.FailureConfig(max_failures=settings.max_failures),
            callbacks=list(callbacks),
        ),
    )
    try:
        with _interruptible():
            result: Any = trainer.fit()
        return result.return_value
    finally:
        storage.delete(storage.join(root, name))


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Makes Ctrl-C in the block a KeyboardInterrupt, as everywhere else.

    Ray Train's own handler, which ends the workers, leaves with SystemExit, and stays when the training is over.
    Other threads than the main one get no signals; where that ends Ray, SystemExit is raised in them too.
    """
    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        if main:
            signal.signal(signal.SIGINT, handler)


def _check_resources(settings: Training, gpus: int) -> None:
    """More workers than the cluster can ever hold would wait without a word.

    Raises:
        ConfigError: naming the number that fits.
    """
    import ray

    total = gpus if gpus else ray.cluster_resources().get("CPU", 1)
    fits = max(1, int(total if gpus else total // settings.cpus_per_worker))
    if settings.workers > fits:
        unit = "GPUs" if gpus else f"CPUs ({settings.cpus_per_worker:g} a worker)"
        raise ConfigError(
            f"workers: {settings.workers} don't fit this cluster's {total:g} {unit}; nearest valid: {fits}"
        )

"""A training run on this machine or on a cluster: Ray Train around the trainer, MLflow and pictures beside it."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import signal
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from pipeline import storage
from pipeline.compute import WATCHER, arrow_filesystem, gpus_to_use, one_ray_has_ended, ray_session
from pipeline.config import ConfigError, Training
from pipeline.config.training import equal_shares
from pipeline.distill.hooks import Hooks, Outcome
from pipeline.distill.ray_internals import named_cluster
from pipeline.distill.run import OnValidation, Run
from pipeline.distill.trainer import Trainer
from pipeline.log import log
from pipeline.segment.figures import Panel, comparison
from pipeline.tracking import RunLogger
from pipeline.tracking.system_metrics import system_metrics


@contextlib.contextmanager
def machines(run: Run, workers: int | None = None) -> Iterator[Run]:
    """The run with its number of workers decided, connected to the Ray that it is to train on.

    Args:
        workers: that many, where the config leaves it to the machines.

    Raises:
        ConfigError: more workers than fit the cluster.
    """
    settings = run.settings
    if settings.workers == 0:
        yield replace(run, workers=0)
        return
    with ray_session(run.config):
        import ray

        gpus = gpus_to_use(run.config)
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if settings.workers_vary and workers is not None:
            settings = settings.model_copy(update={"workers": workers})
        yield replace(run, workers=choose_workers(run.label, settings, nodes, gpus))


def choose_workers(
    label: str, settings: Training, nodes: Sequence[Mapping[str, float]], gpus: int
) -> int | tuple[int, int]:
    """How many workers a run has on these machines: fewest and most where their number may change on the way.

    Args:
        label: what messages call the run.
        nodes: `CPU` and `GPU` of each.
        gpus: of all of them.

    Raises:
        ConfigError: they don't fit, and would wait without a word; names the number that fits.
    """
    # One at least: where there is none, an autoscaler has not begun.
    places = max(1, worker_places(nodes, settings.cpus_per_worker, on_gpus=gpus > 0))
    fewest, batch = settings.fewest_workers, settings.batch_size
    if fewest > places:
        there = f"{gpus} GPUs" if gpus else f"{sum(node.get('CPU', 0) for node in nodes):g} CPUs"
        raise ConfigError(
            f"workers: {fewest} don't fit this cluster's {there} ({settings.cpus_per_worker:g} CPUs a worker); nearest "
            f"valid: {equal_shares(batch, places)}"
        )
    if isinstance(settings.workers, tuple):
        log(f"{label}: from {fewest} to {settings.workers[1]} workers, as many as there are at the time")
        return fewest, settings.workers[1]
    if settings.workers != "auto":
        return settings.workers
    if not gpus:
        log(f"{label}: one worker, as there are no GPUs (workers=auto)")
        return 1
    chosen = equal_shares(batch, places)
    why = f", the most that share a batch of {batch} equally" if chosen < places else ""
    idle = f"; {gpus - chosen} stay idle" if chosen < gpus else ""
    if places < gpus:
        idle += f", as a worker needs {settings.cpus_per_worker:g} CPUs too"
    log(f"{label}: workers on {chosen} of {gpus} GPUs (workers=auto){why}{idle}")
    return chosen


def worker_places(
    nodes: Sequence[Mapping[str, float]], cpus: float, *, on_gpus: bool, taken: float = 0.0
) -> int:
    """How many workers of so many CPUs, and a GPU each where there are any, the nodes have room for.

    Args:
        taken: CPUs of every node that something else has.
    """
    count = 0
    for node in nodes:
        # 1e-6: 2.4 / 0.8 is a little less than 3, and 1.9 - 0.1 a little less than 1.8.
        room = int(max(0.0, node.get("CPU", 0) - taken + 1e-6) // cpus)
        count += min(room, int(node.get("GPU", 0))) if on_gpus else room
    return count


def fit(run: Run, on_validation: OnValidation | None = None, train_callbacks: Sequence[Any] = ()) -> Outcome:
    """Trains to the end, within `machines`: in this process where the run has no workers, else on Ray.

    Args:
        on_validation: see `Hooks`; called in this process, so only without workers.
        train_callbacks: Ray Train's, to follow the same validations of its workers (`ray.train.report`).
    """
    if run.workers:
        return _fit_on_ray(run, train_callbacks)
    hooks = Hooks(on_validation=on_validation) if on_validation else Hooks()
    with system_metrics(run.config, run.mlflow_run):
        return Trainer(run, hooks=hooks, logger=RunLogger(run.config, run.mlflow_run), draw=_draw).train()


def _draw(frames: np.ndarray, labels: np.ndarray) -> Image.Image:
    return comparison([Panel(frames, {"masks": labels})], across=1, width=640)


def _worker(options: dict[str, Any]) -> Outcome:
    """What Ray Train runs on every worker."""
    import ray.train
    import ray.train.torch

    logging.getLogger("ray.train").setLevel(logging.WARNING)
    context = ray.train.get_context()
    run: Run = options["run"]
    rank, world_size = context.get_world_rank(), context.get_world_size()
    mlflow_run = run.mlflow_run if rank == 0 else None
    logger = RunLogger(run.config, mlflow_run)
    if rank == 0:
        logger.tag("workers", str(world_size))
        if isinstance(run.workers, tuple):
            log(
                f"{run.label}: trains on {world_size} worker{'s' * (world_size > 1)} (workers={list(run.workers)})"
            )
    # `report` is a barrier: every worker reports as often.
    hooks = Hooks(
        after_checkpoint=lambda step: ray.train.report({"step": step}),
        on_validation=lambda step, scores: ray.train.report({"step": step, **scores}),
        preempted=_preempted,
    )
    with system_metrics(run.config, mlflow_run):
        return Trainer(
            run,
            rank=rank,
            world_size=world_size,
            device=ray.train.torch.get_device(),
            hooks=hooks,
            logger=logger,
            draw=_draw,
        ).train()


def _preempted() -> bool:
    """`Hooks.preempted`, which calls an actor and waits for all workers, where Train watches for it at all."""
    import ray.train

    return os.environ.get(WATCHER) != "0" and ray.train.get_preemption_info() is not None


def _fit_on_ray(run: Run, callbacks: Sequence[Any]) -> Outcome:
    import ray.train
    import ray.train.torch

    config, settings = run.config, run.settings
    root = storage.join(storage.absolute(config.storage.root), "ray")
    # Ray keeps only its own bookkeeping here; the checkpoints are ours. A name of its own for every
    # attempt: Ray would take a finished run of the same name for one to be resumed.
    name = f"{run.kind}-{uuid.uuid4().hex[:12]}"
    gpus = gpus_to_use(config)
    worker: Any = _worker
    workers: Any = run.workers  # typed as the older one's, which never vary
    run_config: Any = ray.train.RunConfig  # typed as the older one, which has no logging_config
    make: Any = ray.train.torch.TorchTrainer
    if isinstance(run.workers, tuple):
        from pipeline.distill.elastic import ElasticTrainer  # imports Ray

        make = functools.partial(ElasticTrainer, batch_size=settings.batch_size)
    trainer = make(
        worker,
        train_loop_config={"run": run},
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers,
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
        with named_cluster(), _interruptible():
            result: Any = trainer.fit()
        return result.return_value
    finally:
        storage.delete(storage.join(root, name))


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Makes Ctrl-C in the block a KeyboardInterrupt, as everywhere else.

    Ray Train's own handler, which ends the workers, leaves with SystemExit, and stays when the training is over.
    Other threads than the main one get no signals; where that ends Ray, they get errors, or SystemExit too.
    """
    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    except Exception:
        if one_ray_has_ended():  # under this training, with whatever that looks like
            raise KeyboardInterrupt from None
        raise
    finally:
        if main:
            signal.signal(signal.SIGINT, handler)

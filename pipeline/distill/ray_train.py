"""The training loop on Ray Train."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Sequence
from typing import Any

from pipeline import storage
from pipeline.compute import arrow_filesystem, gpus_to_use, ray_session
from pipeline.config.sections import ConfigError, Training
from pipeline.distill.run import OnValidation, TrainingSpec
from pipeline.distill.trainer import train_loop


def _worker(options: dict[str, Any]) -> dict[str, Any]:
    """What Ray Train runs on every worker."""
    import ray.train
    import ray.train.torch

    logging.getLogger("ray.train").setLevel(logging.WARNING)
    context = ray.train.get_context()

    def report(step: int) -> None:
        ray.train.report({"step": step})  # a barrier: every worker reports as often

    return train_loop(
        options["spec"],
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        device=ray.train.torch.get_device(),
        after_checkpoint=report,
        on_validation=lambda step, scores: ray.train.report({"step": step, **scores}),
        preempted=lambda: ray.train.get_preemption_info() is not None,
    )


def _fit(
    spec: TrainingSpec, on_validation: OnValidation | None, train_callbacks: Sequence[Any]
) -> dict[str, Any]:
    if spec.settings.workers == 0:
        return train_loop(spec, on_validation=on_validation) if on_validation else train_loop(spec)
    with ray_session(spec.config):
        return _fit_on_ray(spec, train_callbacks)


def _fit_on_ray(spec: TrainingSpec, callbacks: Sequence[Any]) -> dict[str, Any]:
    import ray.train
    import ray.train.torch

    config, settings = spec.config, spec.settings
    root = storage.join(storage.absolute(config.storage.root), "ray")
    # Ray keeps only its own bookkeeping here; the checkpoints are ours. A name of its own for every
    # attempt: Ray would take a finished run of the same name for one to be resumed.
    name = f"{spec.role}-{uuid.uuid4().hex[:12]}"
    gpus = gpus_to_use(config)
    _check_resources(settings, gpus)
    worker: Any = _worker
    run_config: Any = ray.train.RunConfig  # typed as the older one, which has no logging_config
    trainer = ray.train.torch.TorchTrainer(
        worker,
        train_loop_config={"spec": spec},
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
        result: Any = trainer.fit()
        return result.return_value
    finally:
        storage.delete(storage.join(root, name))


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

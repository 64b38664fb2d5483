"""The three things that Ray 2.60 gives no public way for: the one place that reaches into its private modules.

pyproject bounds Ray to the versions that the tests ran with. Where another one has moved what is looked for here, a
line says which feature suffers, and the job goes on.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator

from pipeline.log import log


@contextlib.contextmanager
def _reaching(what: str) -> Iterator[None]:
    try:
        yield
    except (ImportError, AttributeError) as error:
        import ray

        log(f"Ray {ray.__version__} has no {error.name or error} any more, so {what}")


ADDRESS = "RAY_ADDRESS"
_naming, _trainings, _address_before = threading.Lock(), 0, ""


@contextlib.contextmanager
def named_cluster() -> Iterator[None]:
    """A block in which Ray Train, where several Rays run on one machine, knows which of them it is on.

    Its cleaner, an actor that outlives the training and frees what the workers held, asks the dashboard of the one
    cluster that it finds or that `RAY_ADDRESS` names; with several and no name it dies with a traceback. Processes
    that are started after the block shall have a Ray of their own, so the name goes with the last training.
    """
    global _trainings, _address_before
    import ray

    with _reaching(
        "CPUs of trainings that were stopped may stay taken where several Rays run on one machine"
    ):
        from ray.train.v2._internal import constants

        constants.ENV_VARS_TO_PROPAGATE.add(ADDRESS)
    address = ray.get_runtime_context().gcs_address
    with _naming:
        if not _trainings:
            _address_before = os.environ.get(ADDRESS, "")
        _trainings += 1
        os.environ[ADDRESS] = address
    try:
        yield
    finally:
        with _naming:
            _trainings -= 1
            if not _trainings:
                os.environ[ADDRESS] = _address_before
                if not _address_before:
                    del os.environ[ADDRESS]


def keep_aws_keys_from_tune() -> None:
    """Tune would put AWS's keys into each trial's runtime environment, which Ray logs; they are the nodes' to have."""
    with _reaching(
        "AWS keys of this process may be in Ray's logs: rotate them, or give them to the nodes alone"
    ):
        from ray.tune.execution import class_cache

        class_cache.ENV_VARS_TO_PROPAGATE -= {
            name for name in class_cache.ENV_VARS_TO_PROPAGATE if name.startswith("AWS_")
        }


def has_dashboard() -> bool:
    """Whether the connected cluster has a dashboard; True where that can't be told."""
    with _reaching("it can't be told whether this cluster has a dashboard, which ASHA needs"):
        from ray._private.worker import get_dashboard_url

        return bool(get_dashboard_url())
    return True

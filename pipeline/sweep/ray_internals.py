"""The three things that Ray 2.60 gives no public way for: the one place that reaches into its private modules.

pyproject bounds Ray to the versions that the tests ran with. Where another one has moved what is looked for here, a
line says which feature suffers, and the sweep goes on.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from pipeline.log import log


@contextlib.contextmanager
def _reaching(what: str) -> Iterator[None]:
    try:
        yield
    except (ImportError, AttributeError) as error:
        import ray

        log(f"sweep: Ray {ray.__version__} has no {error.name or error} any more, so {what}")


def name_this_cluster() -> None:
    """Lets Ray Train give back what a stopped trial held where several local Rays run on one machine.

    Its cleaner, an actor that outlives the trial, asks the dashboard of the one cluster that it finds or that
    `RAY_ADDRESS` names; with several and no name it dies, and the workers' placement group is never freed.
    """
    import ray

    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    with _reaching("stopped trials may keep their CPUs where several Rays run on one machine"):
        from ray.train.v2._internal import constants

        constants.ENV_VARS_TO_PROPAGATE.add("RAY_ADDRESS")


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

"""Training of the systems beside slot models: each by its own loss, from pixels and the number of the step.

A new system gets an objective in a module of its own, and a row of `OBJECTIVES`.
"""

from __future__ import annotations

from collections.abc import Callable

from pipeline.config.models import Teacher
from pipeline.distill.diod import DIODObjective
from pipeline.distill.savi import SAViObjective
from pipeline.distill.solv import SOLVObjective
from pipeline.distill.steve import STEVEObjective
from pipeline.distill.system_objective import SystemObjective
from pipeline.models.segmenter import VideoSegmenter

# By `teacher.system`: from the model and the section to what it is trained for.
OBJECTIVES: dict[str, Callable[[VideoSegmenter, Teacher], SystemObjective]] = {
    "solv": SOLVObjective.of,
    "savi": SAViObjective.of,
    "steve": STEVEObjective.of,
    "diod": DIODObjective.of,
}

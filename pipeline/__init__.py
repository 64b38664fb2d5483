"""SlotMatch: distil object-centric video segmentation models, from videos to a registered student.

Importing this package imports nothing heavy. `pipeline.models`, `pipeline.losses` and
`pipeline.metrics` need only torch and timm; the stages bring in Ray, Arrow and MLflow.
"""

__version__ = "0.1.0"

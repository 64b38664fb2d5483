"""Object-centric video models in pure PyTorch + timm (no Ray import)."""

from pipeline.models.backbone import Backbone, BackboneConfig, load_backbone_weights
from pipeline.models.checkpoints import load_slot_model, save_public_checkpoint, save_slot_model
from pipeline.models.hints import CheckpointHints, HintError
from pipeline.models.initialisation import start_as_soft_kmeans
from pipeline.models.segmenter import VideoSegmenter
from pipeline.models.slim import BackboneError, BackboneSource
from pipeline.models.slot_model import SlotModel, SlotModelConfig, SlotModelOutput

__all__ = [
    "Backbone",
    "BackboneConfig",
    "BackboneError",
    "BackboneSource",
    "CheckpointHints",
    "HintError",
    "SlotModel",
    "SlotModelConfig",
    "SlotModelOutput",
    "VideoSegmenter",
    "load_backbone_weights",
    "load_slot_model",
    "save_public_checkpoint",
    "save_slot_model",
    "start_as_soft_kmeans",
]

"""The keys of a model: what teacher and student have in common, and what is each one's own."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field

from pipeline.config.fields import PositiveFloat, PositiveInt, Section, run_detail
from pipeline.config.rivals import DIOD, SOLV, STEVE, SAVi
from pipeline.config.training import TeacherTraining

SlotCount = Annotated[int, Field(ge=1, le=256)]  # labels are bytes
Colour = tuple[float, float, float]
PositiveColour = tuple[PositiveFloat, PositiveFloat, PositiveFloat]


class ViT(Section):
    """A plain vision transformer that has no timm name."""

    patch_size: PositiveInt
    """pixels"""
    embed_dim: PositiveInt
    """the width"""
    depth: PositiveInt
    """transformer blocks"""
    num_heads: PositiveInt
    """attention heads of a block"""


class Model(Section):
    """The architecture, as teacher and student have it."""

    backbone: str | ViT = "vit_small_patch14_dinov2"
    """a timm name of a ViT or a convolutional network, or a ViT's dimensions"""
    backbone_weights: str = "timm"
    """timm (the hub), random, or a file: local, s3:// or hf://USER/REPO/FILE"""
    backbone_blocks: PositiveInt | None = None
    """how many of a ViT's transformer blocks, from the first on; null: all"""
    feature_scale: PositiveFloat | Literal["auto"] = 1.0
    """what backbone features are multiplied by; auto: what gives a sample of the clips' unit variance"""
    image_size: PositiveInt = 336
    """pixels; of a ViT a multiple of the patch size"""
    image_width: PositiveInt | None = None
    """pixels, where the input is not as wide as image_size is high; null: square"""
    stride: PositiveInt | None = None
    """which map of a backbone that is no ViT, in pixels between neighbours: 8 to 32; null: the deepest"""
    grid: tuple[PositiveInt, PositiveInt] | None = None
    """rows and columns that the features are resampled to; null: the backbone's own"""
    num_slots: SlotCount | None = None
    """slots of a frame"""
    slot_size: PositiveInt | None = None
    """numbers of a slot"""
    initial_slots: Literal["learned", "random"] = "learned"
    """random: drawn from a learned distribution"""
    initialisation: Literal["default", "soft_kmeans", "fitted", "teacher"] = "default"
    """of what trains; default: the paper's; fitted: in the features' principal components; teacher: as its teacher"""
    corrector_mlp: bool = True
    """in slot attention; VideoSAUR has none"""
    predictor: bool = True
    """false: an image model such as DINOSAUR, which sees each frame on its own"""
    decoder: Literal["mlp", "slot_mixer"] = "mlp"
    """the slot mixer is VideoSAUR's"""
    decoder_hidden_sizes: tuple[PositiveInt, ...] = (1024, 1024, 1024)
    """widths of the MLP decoder's hidden layers"""
    decoder_blocks: PositiveInt = 3
    """transformer blocks of the slot mixer"""
    mean: Colour = (0.485, 0.456, 0.406)
    """of each colour channel, for normalisation; ImageNet's"""
    std: PositiveColour = (0.229, 0.224, 0.225)
    """of each colour channel, for normalisation; ImageNet's"""
    cached_features: bool = False
    """train on features stored once for all that have this backbone: no ViT in training"""
    save: Literal["whole", "slim"] = run_detail("whole")
    """slim: without the frozen backbone, which is kept once below storage.root and told by its hash"""

    @property
    def decoder_outputs(self) -> tuple[str, ...]:
        """What the decoder gives, as in `SlotModelConfig`."""
        return ("features",)

    @property
    def patch_size(self) -> int | None:
        if isinstance(self.backbone, ViT):
            return self.backbone.patch_size
        match = re.search(r"patch(\d+)", self.backbone)
        return int(match[1]) if match else None


class Teacher(Model):
    """The model that is distilled.

    `num_slots` and `slot_size` left empty are the checkpoint's; of a teacher that is trained here see `sizes`.
    A public file does not tell its ViT's heads, its normalisation and, where initial slots are drawn, their
    number: `num_heads`, `mean`, `std` and `num_slots` do.
    """

    name: str = "SlotContrast"
    """in tables"""
    checkpoint: str | None = None
    """a public file or a model folder; null: the stage `teacher` trains one"""
    system: Literal["slotcontrast", "solv", "savi", "steve", "diod"] = "slotcontrast"
    """whose architecture and objective are trained; slotcontrast: VideoSAUR's and DINOSAUR's too"""
    solv: SOLV = SOLV()
    savi: SAVi = SAVi()
    steve: STEVE = STEVE()
    diod: DIOD = DIOD()
    num_heads: PositiveInt | None = None
    """attention heads of a public file's ViT; null: width / 64; of STEVE's file its token decoder's; null: 4"""
    predictor_heads: PositiveInt | None = None
    """SAVi, STEVE: attention heads of the predictor; null: 4"""
    num_iterations: PositiveInt | None = None
    """SAVi, STEVE: of slot attention in every frame; null: 2, of a SAVi whose slot attention has no MLP 1"""
    stochastic: bool = False
    """whether the slots of a file of SlotFormer's SAVi are noisy, as those for CLEVRER are"""
    backbone: str | ViT = "vit_base_patch14_dinov2"
    """a timm name, or a ViT's dimensions"""
    train: TeacherTraining = TeacherTraining()

    @property
    def has_backbone(self) -> bool:
        """Whether a frozen backbone is what it sees the frames through."""
        return self.system in ("slotcontrast", "solv")

    @property
    def uses_motion(self) -> bool:
        """Whether it learns from motion segments, which others do without."""
        return self.system == "diod"

    @property
    def uses_boxes(self) -> bool:
        """Whether its slots start from boxes of objects, in training and in what is scored."""
        return self.system == "savi" and self.savi.conditioning == "boxes"

    @property
    def recorded_system(self) -> str:
        """What records call its system."""
        return system_with_boxes(self.system) if self.uses_boxes else self.system

    @property
    def title(self) -> str:
        """What tables and tags call it."""
        return marked(self.name, boxes=self.uses_boxes, motion=self.uses_motion)

    @property
    def patch_size(self) -> int | None:
        return super().patch_size if self.has_backbone else None

    @property
    def decoder_outputs(self) -> tuple[str, ...]:
        weights = {"features": self.train.reconstruction, "similarity": self.train.similarity}
        return tuple(name for name, weight in weights.items() if weight)

    @property
    def sizes(self) -> dict[str, int]:
        """`num_slots` and `slot_size` of a teacher that is trained here; the paper's for MOVi-E by default.

        Not defaults of the keys themselves, which would count as said of every public file.
        """
        return {"num_slots": self.num_slots or 15, "slot_size": self.slot_size or 128}


def marked(name: str, *, boxes: bool, motion: bool) -> str:
    """The name of a model that is told where a video's objects are at first, or that learned from motion segments."""
    if boxes:
        return f"{name} (conditional, boxes)"
    return f"{name} (uses motion)" if motion else name


def system_with_boxes(system: str) -> str:
    """What records call a system whose models start from boxes: another one than that without."""
    return f"{system}_boxes"


class Student(Model):
    """The model that learns from it; `num_slots` and `slot_size` left empty are the teacher's."""

"""A stage as data: what `jobs/STAGE.py` declares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.config import ConfigError, Section
from pipeline.config.fields import PositiveInt
from pipeline.config.models import Colour, PositiveColour, SlotCount

if TYPE_CHECKING:
    from pipeline.models import CheckpointHints
    from pipeline.models.segmenter import Segmenter


@dataclass(frozen=True)
class Word:
    """A word that stands for itself on the command line, the argument `name` of the stage."""

    name: str
    shown: str
    help: str
    many: bool = False  # all that are left, as a list


@dataclass(frozen=True)
class Option:
    """A flag, the argument of the stage that is spelled like it; one with a `metavar` takes a value."""

    flag: str
    help: str
    metavar: str = ""
    type: Callable[[str], Any] = str
    default: Any = None


@dataclass(frozen=True)
class Job:
    """A stage as the command line knows it: `stage(config, **words, **options)` does it and returns its summary.

    `stage` and `check`, which takes the same, are functions or their names, `module:function`. What is named is
    imported when it is called, so that a command line is read without Ray, PyTorch or MLflow.
    A config is required but where `default_config` names a shipped one, or where only `keys` of it are used, and
    `sections` if there is one.
    """

    name: str
    description: str
    stage: str | Callable[..., dict[str, Any]]
    sections: tuple[str, ...] = ()  # of the config, which --help lists
    words: tuple[Word, ...] = ()
    options: tuple[Option, ...] = ()
    default_config: str | None = None
    keys: tuple[str, ...] = ()  # of the config: the only ones that count beside `sections`, where not all do
    settings: type[Section] | None = None  # keys of its own, without a section; the argument `settings`
    check: str | Callable[..., object] | None = None  # raises ConfigError, also in a dry run


class PublicFile(Section):
    """What a public file does not tell, as in a config's `teacher` section."""

    num_heads: PositiveInt | None = None
    """attention heads of a public file's ViT; null: width / 64"""
    num_slots: SlotCount | None = None
    """slots of a public file that draws its initial slots"""
    mean: Colour = (0.485, 0.456, 0.406)
    """that a public file normalises with, where it is not ImageNet's"""
    std: PositiveColour = (0.229, 0.224, 0.225)
    """that a public file normalises with, where it is not ImageNet's"""

    backbone_weights: str | None = None
    """the local file of the ViT, in timm's names, that a public file lacks (SOLV)"""
    batch_statistics: bool | None = None
    """false: running statistics in DIOD's batch norm; null: as published, those of the clip at hand"""
    carried: bool | None = None
    """true: DIOD's clips go on from each other; null: as published, each starts anew"""
    predictor_heads: PositiveInt | None = None
    """attention heads of a public file's predictor, where it may have any (STEVE, SlotFormer's SAVi); null: 4"""
    num_iterations: PositiveInt | None = None
    """of slot attention in every frame, where a public file may have any (SAVi, STEVE); null: as published"""
    image_size: PositiveInt | None = None
    """pixels, where a public file's layers can have several strides (SAVi)"""
    stochastic: bool = False
    """whether a public file's slots are noisy (SlotFormer's SAVi for CLEVRER)"""

    def hints(self) -> CheckpointHints:
        from pipeline.models import CheckpointHints

        return CheckpointHints(**{key: getattr(self, key) for key in PublicFile.model_fields})

    def load(self, model: str, tracking_uri: str) -> Segmenter:
        """The model that a word names.

        Raises:
            ConfigError: a public file of which more has to be said.
        """
        from pipeline.models import HintError
        from pipeline.tracking.versions import load_named

        try:
            return load_named(model, self.hints(), tracking_uri)
        except HintError as error:
            raise ConfigError(str(error)) from None


REGISTERED = Word("model", "MODEL", "models:/NAME@ALIAS or models:/NAME/VERSION")
REGISTRY_KEYS = ("mlflow.tracking_uri", "storage.root")  # that say where the registry is

"""Evaluation protocols: what two scores must have in common before they may stand in one column.

Those of the systems that are distilled:

| | paper | slotcontrast | videosaur |
| --- | --- | --- | --- |
| one sample | clips of 4 frames, each from its own start | whole videos | clips of 6 frames |
| masks at | the crop's own size | the crop's own size | 224 x 224 |

These three look at the central square, ignore the background, keep pixels of several objects, roll out
forwards and take the decoder's masks. SlotMatch (appendix C) evaluates on "temporal chunks of 4 frames",
SlotContrast on whole videos, VideoSAUR's public YTVIS config on clips of 6 with masks of 224 pixels; in clips,
a video's shorter tail is left out.

Those of the rivals' authors (docs/rivals.md says which of their numbers stand under them), as far as they differ:

| | savi | steve | solv | diod |
| --- | --- | --- | --- | --- |
| one sample | whole videos | clips of 6 frames | whole videos | clips of 5 frames |
| masks at | 128 x 128 | 128 x 128 | the crop's own size | a quarter of it |
| crop | central | central | the frame without black borders | the whole frame |
| objects | all | all | those of a sample's first frame | of more than 500 pixels; two at least |
| scores | | | slots matched to objects as well | |

Each rule can be changed by itself; the protocol's name then says so.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

from pipeline.config.sections import Evaluate


@dataclass(frozen=True)
class Protocol:
    """The rules of an evaluation."""

    name: str
    clip_frames: int = 0  # frames of a sample that starts anew; 0: whole videos
    mask_size: int = 0  # pixels of the square masks that are compared; 0: the crop's own size
    # "full": the whole frame, squeezed into the model's square input; "content": without its black borders
    crop: str = "central"
    background: str = "ignore"  # or "object": pixels of no object (void too) are one more object
    ignore_overlaps: bool = False  # leave pixels of several objects out, on both sides (COCO)
    rollout: str = "forward"
    masks: str = "decoder"  # or "attention": of slot attention's last iteration
    mask_stride: int = 1  # masks are compared at one of so many pixels of the crop's rows and columns
    objects: str = "all"  # or "first": those of a sample's first frame, what comes later is background
    min_object_area: int = 0  # pixels of the clips; what has fewer in a frame is background there
    min_objects: int = 0  # samples of fewer are left out
    matched: bool = False  # SOLV's scores beside the others: slots matched one to one to objects

    def in_words(self) -> str:
        samples = f"clips of {self.clip_frames} frames" if self.clip_frames else "whole videos"
        words = [
            samples,
            _CROPS[self.crop],
            self._mask_size_in_words(),
            "background ignored" if self.background == "ignore" else "background counted as an object",
            "overlaps left out" if self.ignore_overlaps else "overlaps kept",
            f"{self.rollout} roll-out",
            f"masks from the {self.masks}" if self.masks == "decoder" else "masks from slot attention",
        ]
        if self.objects == "first":
            words.append("objects of the first frame alone")
        if self.min_object_area:
            words.append(f"objects of at least {self.min_object_area} pixels")
        if self.min_objects:
            words.append(f"samples of at least {self.min_objects} objects")
        if self.matched:
            words.append("slots also matched one to one to objects")
        return ", ".join(words)

    def _mask_size_in_words(self) -> str:
        if self.mask_size:
            return f"masks of {self.mask_size}x{self.mask_size} pixels"
        size = "as large as" if self.mask_stride == 1 else f"at 1/{self.mask_stride} of the size of"
        return f"masks {size} the clips"

    def size_of_masks(self, height: int, width: int) -> tuple[int, int]:
        """Height and width at which the masks of a crop of this size are compared."""
        if self.mask_size:
            return self.mask_size, self.mask_size
        return -(-height // self.mask_stride), -(-width // self.mask_stride)


_CROPS = {
    "central": "central square",
    "full": "full frames",
    "content": "full frames without black borders",
}

PRESETS = {
    "paper": Protocol("paper", clip_frames=4),
    "slotcontrast": Protocol("slotcontrast"),
    "videosaur": Protocol("videosaur", clip_frames=6, mask_size=224),
    "savi": Protocol("savi", mask_size=128),
    "steve": Protocol("steve", clip_frames=6, mask_size=128),
    "solv": Protocol("solv", crop="content", objects="first", matched=True),
    # Their 500 pixels are background too.
    "diod": Protocol("diod", 5, crop="full", mask_stride=4, min_object_area=501, min_objects=2),
}


def choose_protocol(settings: Evaluate) -> Protocol:
    """The config's preset with the rules that it changes, which are added to its name."""
    preset = PRESETS[settings.protocol]
    rules = [f.name for f in fields(Protocol) if f.name != "name"]
    changed = {
        rule: getattr(settings, rule)
        for rule in rules
        if getattr(settings, rule) not in (None, getattr(preset, rule))
    }
    name = ", ".join([preset.name, *(f"{rule}={value}" for rule, value in changed.items())])
    return Protocol(**{**asdict(preset), **changed, "name": name})

"""Evaluation protocols: what two scores must have in common before they may stand in one column.

| | paper | slotcontrast | videosaur |
| --- | --- | --- | --- |
| one sample | clips of 4 frames, each from its own start | whole videos | clips of 6 frames |
| masks at | the crop's own size | the crop's own size | 224 x 224 |

All three look at the central square, ignore the background, keep pixels of several objects, roll out
forwards and take the decoder's masks. SlotMatch (appendix C) evaluates on "temporal chunks of 4 frames",
SlotContrast on whole videos, VideoSAUR's public YTVIS config on clips of 6 with masks of 224 pixels; in clips,
a video's shorter tail is left out. Each rule can be changed by itself; the protocol's name then says so.
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
    crop: str = "central"  # or "full": the whole frame, squeezed into the model's square input
    background: str = "ignore"  # or "object": pixels of no object (void too) are one more object
    ignore_overlaps: bool = False  # leave pixels of several objects out, on both sides (COCO)
    rollout: str = "forward"
    masks: str = "decoder"  # or "attention": of slot attention's last iteration

    def in_words(self) -> str:
        samples = f"clips of {self.clip_frames} frames" if self.clip_frames else "whole videos"
        words = [
            samples,
            "central square" if self.crop == "central" else "full frames",
            f"masks of {self.mask_size}x{self.mask_size} pixels"
            if self.mask_size
            else "masks as large as the clips",
            "background ignored" if self.background == "ignore" else "background counted as an object",
            "overlaps left out" if self.ignore_overlaps else "overlaps kept",
            f"{self.rollout} roll-out",
            f"masks from the {self.masks}" if self.masks == "decoder" else "masks from slot attention",
        ]
        return ", ".join(words)


PRESETS = {
    "paper": Protocol("paper", clip_frames=4),
    "slotcontrast": Protocol("slotcontrast"),
    "videosaur": Protocol("videosaur", clip_frames=6, mask_size=224),
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

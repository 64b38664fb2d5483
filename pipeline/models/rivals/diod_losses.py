"""How DIOD trains: slots are matched with motion segments, later also with what a teacher makes of these.

First a burn-in from motion segments alone; then distillation, in which a running average of the model (`follow`) says
which segments to believe, and which objects it sees beside them. Both models stay in training mode.

Shapes: B clips, T frames, N slots of which the last is the background, K objects, P positions of the grid.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.models.pixels import Grid
from pipeline.models.rivals.diod import DIOD, EPSILON, DIODOutput
from pipeline.models.rivals.pseudo_labels import CONFIDENCE, pseudo_labels

FOREGROUND_WEIGHT = 0.3
TEACHER_DECAY = 0.996


def diod_losses(
    model: DIOD,
    video: Tensor,
    motion: Tensor | None,
    *,
    teacher: DIOD | None = None,
    teacher_video: Tensor | None = None,
    confidence: float = CONFIDENCE,
) -> dict[str, Tensor]:
    """A step's losses by name, of which `total` trains; without a teacher those of the burn-in.

    `reconstruction`, `mask`, `teacher` (where there is one), `nll` and `l1`; the last is weighted by 0.3 in the total.

    Args:
        video: normalised, `(B, T, 3, H, W)`.
        motion: motion segments, whole numbers `(B, T, H, W)`, 0 where nothing moves. Their numbers need not agree
            between frames.
        teacher_video: as `video`, but without the changes of colours that the model is given; None: `video`.
        confidence: the mean foreground that the teacher has to see over an object, so that it counts.

    Raises:
        ValueError: no motion segments, or such of other clips, frames or sizes than the video's.
    """
    _check_motion(video, motion)
    assert motion is not None
    output = _widened(model(video))
    objects = objects_of(motion, model.grid)
    with torch.no_grad():
        seen = (
            None if teacher is None else _widened(teacher(video if teacher_video is None else teacher_video))
        )
    # In bf16 a matching and the confidence in an object would be coarse.
    with torch.autocast(video.device.type, enabled=False):
        return _losses(output, video, objects, seen, model.grid, confidence)


def _widened(output: DIODOutput) -> DIODOutput:
    """What the losses look at, in fp32."""
    assert output.reconstruction is not None
    return replace(
        output,
        masks=output.masks.float(),
        foreground=output.foreground.float(),
        reconstruction=output.reconstruction.float(),
    )


def _losses(
    output: DIODOutput, video: Tensor, objects: Tensor, seen: DIODOutput | None, grid: Grid, confidence: float
) -> dict[str, Tensor]:
    if seen is None:
        return _total(output, video, objects, {"mask": mask_loss(output.masks, objects)})
    labels = pseudo_labels(seen.masks.unflatten(-1, grid), confidence=confidence)
    believed = {
        "mask": mask_loss(output.masks, objects, seen.foreground, confidence),
        "teacher": mask_loss(output.masks, objects_of(labels, grid), seen.foreground, confidence),
    }
    passed = objects * confident(objects, seen.foreground, confidence)[1].unsqueeze(-1)
    return _total(output, video, passed, believed)


def _check_motion(video: Tensor, motion: Tensor | None) -> None:
    if motion is None:
        raise ValueError(
            "motion segments: there are none, but DIOD learns from which pixels move; nearest valid: maps of whole "
            "numbers, one a frame and 0 where nothing moves, as `pipeline.clips.motion` makes them of optical flow"
        )
    expected = (*video.shape[:2], *video.shape[3:])
    if tuple(motion.shape) != expected:
        raise ValueError(
            f"motion segments have shape {tuple(motion.shape)}, but a video of shape {tuple(video.shape)} needs "
            f"(B, T, H, W) = {expected}"
        )


def _total(
    output: DIODOutput, video: Tensor, objects_BTKP: Tensor, masks: dict[str, Tensor]
) -> dict[str, Tensor]:
    assert output.reconstruction is not None
    foreground = _shrunk(output.foreground)
    losses = {
        "reconstruction": F.mse_loss(output.reconstruction, video),
        **masks,
        "nll": -(foreground.log() * objects_BTKP.amax(2)).mean(),
        "l1": foreground.mean(),
    }
    weights = {"l1": FOREGROUND_WEIGHT}
    total = torch.stack([weights.get(name, 1.0) * value for name, value in losses.items()]).sum()
    return {**losses, "total": total}


def _shrunk(probabilities: Tensor) -> Tensor:
    """Off 0 and 1, so that both logarithms are finite."""
    return (1 - 1e-3) * probabilities + EPSILON


def objects_of(labels_BTHW: Tensor, grid: Grid) -> Tensor:
    """Which positions each label but 0 has, `(B, T, K, P)` of 0 and 1, K at least 1; labels are taken by nearest."""
    labels = F.interpolate(labels_BTHW.float(), grid, mode="nearest").flatten(2).long()
    return F.one_hot(labels, max(int(labels.max()) + 1, 2))[..., 1:].transpose(2, 3).float()


def confident(objects_BTKP: Tensor, foreground_BTP: Tensor, confidence: float) -> tuple[Tensor, Tensor]:
    """Mean foreground over each object, and whether it is an object's with `confidence`: both `(B, T, K)`."""
    pixels = objects_BTKP.sum(-1)
    mean = (objects_BTKP @ foreground_BTP.unsqueeze(-1)).squeeze(-1) / pixels.clamp(min=1)
    return mean, (pixels > 0) & (mean >= confidence)


def mask_loss(
    masks_BTNP: Tensor,
    objects_BTKP: Tensor,
    foreground_BTP: Tensor | None = None,
    confidence: float = CONFIDENCE,
) -> Tensor:
    """Binary cross-entropy of objects with the masks that were matched with them; summed over T, averaged over B.

    Within a frame it is the mean of its objects. An object's own pixels weigh more the smaller it is; with a teacher's
    foreground, the more that is sure of them, and only objects count of which it is.
    """
    masks = _shrunk(masks_BTNP[:, :, :-1])
    slots_BTK = matched_slots(masks, objects_BTKP)
    masks = masks.take_along_dim(slots_BTK.clamp(min=0).unsqueeze(-1), 2)
    if foreground_BTP is None:
        share = objects_BTKP.mean(-1)
        weights, counts = 2 - share, share > 0
    else:
        mean, counts = confident(objects_BTKP, foreground_BTP, confidence)
        weights = 1 + mean
    counts = counts & (slots_BTK >= 0)
    inside = weights.unsqueeze(-1) * objects_BTKP * masks.log()
    losses_BTK = -(inside + (1 - objects_BTKP) * (1 - masks).log()).mean(-1)
    frames = (losses_BTK * counts).sum(-1) / counts.sum(-1).clamp(min=1)
    return frames.sum(1).mean()


@torch.no_grad()
def matched_slots(masks_BTSP: Tensor, objects_BTKP: Tensor) -> Tensor:
    """The slot of each object `(B, T, K)`, one to one in every frame, -1 where there are more objects than slots.

    The most likely assignment, each mask being the probability of its object. Objects without pixels take part.
    """
    from scipy.optimize import linear_sum_assignment

    inside = objects_BTKP @ masks_BTSP.log().transpose(2, 3)
    outside = (1 - objects_BTKP) @ (1 - masks_BTSP).log().transpose(2, 3)
    # SciPy rejects nan. A diverged model has to reach the loss, whose nan the training step handles.
    scores_BTKS = torch.nan_to_num(inside + outside)
    found = torch.full(scores_BTKS.shape[:3], -1)
    for frame, scores in zip(found.flatten(0, 1), scores_BTKS.flatten(0, 1).cpu().numpy(), strict=True):
        rows, columns = linear_sum_assignment(scores, maximize=True)
        frame[torch.from_numpy(rows)] = torch.from_numpy(columns)
    return found.to(masks_BTSP.device)


@torch.no_grad()
def follow(teacher: DIOD, model: DIOD, decay: float = TEACHER_DECAY) -> None:
    """After a step of the model: the teacher's parameters and buffers become the running averages of the model's."""
    for own, new in zip(teacher.state_dict().values(), model.state_dict().values(), strict=True):
        if own.is_floating_point():
            own.lerp_(new, 1 - decay)
        else:
            own.copy_(new)

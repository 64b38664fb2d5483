"""The training step: pure PyTorch, callable from a test or a GPU box without Ray."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.distill.bound import reconstruction_bound
from pipeline.distill.objective import TrainingObjective
from pipeline.losses import (
    feature_kd_loss,
    feature_reconstruction_loss,
    hungarian_slot_kd_loss,
    reconstruction_kd_loss,
    slot_contrastive_loss,
    slot_kd_loss,
    slot_mse_loss,
    temporal_similarity_loss,
)
from pipeline.models import SlotModel, SlotModelOutput, VideoSegmenter
from pipeline.models.layers import MLP
from pipeline.models.pixels import send


@dataclass(frozen=True)
class Batch:
    """What a step learns from: a video or its cached features, and what the teacher gives, if anything.

    video: normalised `(B, T, 3, S, S)`. backbone_features: `(B, T, P, F)`.
    target_slots: `(B, T, N, d)`. teacher_features: `(B, T, P', F')`, with the teacher's own patches. Features are as
    backbones give them; what scales them is the models' own.
    initial_slots: `(B, N, d)` where they are drawn, not learned.
    """

    video: Tensor | None = None
    backbone_features: Tensor | None = None
    target_slots: Tensor | None = None
    teacher_features: Tensor | None = None
    initial_slots: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return Batch(**{k: send(v, device) if v is not None else None for k, v in moved.items()})


@dataclass(frozen=True)
class Terms:
    """The terms of a training objective and their weights; a weight of 0 leaves its term out.

    reconstruction: of the features; without it a model must predict similarities.
    alpha: slot-slot contrast. similarity: VideoSAUR's temporal similarity. slot_kd: beta, of the
    distance named by `slot_loss`. reconstruction_kd and feature_kd: of the distances from what the
    teacher reconstructs and from its features. slot_map: whether a learned linear map takes the
    student's slots to the teacher's slot size before they are compared. contrast_shares: into how many
    shares the batch is dealt out, sample i to share i mod their number, of which each is contrasted by itself, as by
    that many workers of the reference implementation; 0: each worker's share, however many there are.
    """

    reconstruction: float = 1.0
    alpha: float = 1.0
    temperature: float = 0.1
    similarity: float = 0.0
    similarity_temperature: float = 0.075
    similarity_threshold: float = 0.0
    slot_kd: float = 0.0
    slot_loss: str = "cosine"  # a key of SLOT_LOSSES
    reconstruction_kd: float = 0.0
    feature_kd: float = 0.0
    slot_map: bool = False
    contrast_shares: int = 1


SLOT_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cosine": slot_kd_loss,
    "mse": slot_mse_loss,
    "hungarian_clip": lambda student, teacher: hungarian_slot_kd_loss(student, teacher, per="clip"),
    "hungarian_frame": lambda student, teacher: hungarian_slot_kd_loss(student, teacher, per="frame"),
}


class _OfAllWorkers(torch.autograd.Function):
    """Every worker's share of a batch `(b, ...)`, equal in size, as the whole batch in its order `(B, ...)`.

    Sample i is worker i mod W's. The gradient of a share is the sum of what all workers have for it, as each of them
    computes the loss of the whole batch, and DDP takes the mean over the workers.
    """

    @staticmethod
    def forward(ctx: Any, share: Tensor) -> Tensor:
        shares = [torch.empty_like(share) for _ in range(dist.get_world_size())]
        dist.all_gather(shares, share.contiguous())
        return torch.stack(shares, dim=1).flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        total = gradient.contiguous()
        dist.all_reduce(total)
        return total[dist.get_rank() :: dist.get_world_size()]


class Objective(TrainingObjective):
    """What a slot model is trained for: the one place that composes the loss, whatever the method.

    Eq. 3 is rec + alpha * contrast + beta * slot KD; without the last term it is SlotContrast's own
    objective, and with `similarity` in place of the contrast VideoSAUR's, whose targets are the frozen
    backbone's attention keys. The other ways to distil of Table 1 replace or follow the slot term:

    - reconstruction KD is Eq. 5: the *teacher's* frozen decoder decodes the slots of both, and what it
      makes of the student's is drawn to what it makes of the teacher's. One decoder for both gives
      reconstructions of one size, whatever the two backbones' feature sizes are.
    - feature KD: the student's projected features (the only ones that train, as its backbone is frozen)
      go through a two-layer MLP and are drawn to the teacher's backbone features, on the teacher's scale.

    Modules that only training uses are in `heads`; a published student does without them.

    Raises:
        ValueError: a model whose decoder does not give what a term needs, alpha > 0 for an image model,
            or a term that needs a teacher without one.
    """

    model: SlotModel

    def __init__(
        self,
        model: SlotModel,
        terms: Terms,
        *,
        teacher: VideoSegmenter | None = None,
        decoder_rate: float = 1.0,
    ) -> None:
        """
        Args:
            decoder_rate: the decoder's learning rate, as a part of that of all else.
        """
        super().__init__()
        self.decoder_rate = decoder_rate
        if not (terms.reconstruction or terms.similarity):
            raise ValueError("nothing to train for: reconstruction and similarity both weigh 0")
        if terms.reconstruction and not model.reconstructs:
            raise ValueError(
                "the model's decoder reconstructs no features, which `reconstruction` > 0 trains"
            )
        if terms.alpha and model.processor.predictor is None:
            raise ValueError(
                f"alpha = {terms.alpha:g} contrasts neighbouring frames, but the model has no predictor and sees "
                "each frame on its own; use alpha = 0"
            )
        if terms.similarity and not model.predicts_similarity:
            raise ValueError("the model's decoder predicts no similarities, which `similarity` > 0 trains")
        if terms.slot_loss not in SLOT_LOSSES:
            raise ValueError(f"slot_loss must be one of {list(SLOT_LOSSES)}, not {terms.slot_loss!r}")
        if teacher is None and (terms.slot_map or terms.reconstruction_kd or terms.feature_kd):
            raise ValueError("slot_map, reconstruction KD and feature KD need the teacher itself")
        self.model, self.terms = model, terms
        self.teacher_decoder: nn.Module | None = None
        self.heads = nn.ModuleDict()
        if teacher is not None:
            self._add_teacher(teacher)

    def _add_teacher(self, teacher: VideoSegmenter) -> None:
        own, other = self.model.config.slot_size, teacher.config.slot_size
        if self.terms.slot_map:
            self.heads["slot_map"] = nn.Linear(own, other, bias=False)
        if not isinstance(teacher, SlotModel):
            if self.terms.reconstruction_kd or self.terms.feature_kd:
                raise ValueError(
                    f"of {type(teacher).__name__} its slots are all that is distilled: neither what it reconstructs "
                    "nor its features; nearest valid: slotmatch_hungarian"
                )
            return
        if self.terms.feature_kd:
            size = teacher.encoder.backbone.feature_size
            self.heads["features"] = MLP([own, size, size])
        if teacher.reconstructs:
            self.teacher_decoder = teacher.decoder.requires_grad_(False)
        elif self.terms.reconstruction_kd:
            raise ValueError("the teacher's decoder reconstructs no features, so that none can be distilled")
        self._teacher_feature_size = teacher.encoder.backbone.feature_size
        self._teacher_feature_scale = teacher.config.feature_scale
        self._teacher_grid = teacher.grid

    def parameter_groups(self) -> list[list[nn.Parameter]]:
        parameters = self.trainable_parameters()
        if self.decoder_rate == 1:
            return [parameters]
        of_decoder = {id(parameter) for parameter in self.model.decoder.parameters()}
        return [[p for p in parameters if (id(p) in of_decoder) == wanted] for wanted in (False, True)]

    def rate_factors(self, step: int, *, warmup_steps: int, total_steps: int) -> list[float]:
        factors = super().rate_factors(step, warmup_steps=warmup_steps, total_steps=total_steps)
        return factors if self.decoder_rate == 1 else [factors[0], factors[0] * self.decoder_rate]

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Scalars `total` and each term that is part of it, without its weight.

        Raises:
            ValueError: a term whose targets the batch does not have.
        """
        keys = None
        if self.terms.similarity:
            if batch.video is None:
                raise ValueError("temporal similarity needs the video: its targets are the backbone's keys")
            features, keys = self.model.features_and_keys(batch.video)
            batch = replace(batch, video=None, backbone_features=features)
        output = self._output(batch)
        device = output.slots.device.type
        products = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        with torch.autocast(device, enabled=False):
            return self._losses(output, keys, batch, products)

    def _output(self, batch: Batch) -> SlotModelOutput:
        return self.model(
            batch.video, backbone_features=batch.backbone_features, initial_slots=batch.initial_slots
        )

    def _losses(
        self, output: SlotModelOutput, keys: Tensor | None, batch: Batch, products: torch.dtype | None
    ) -> dict[str, Tensor]:
        terms, slots = self.terms, output.slots.float()
        losses: dict[str, Tensor] = {}
        weights: dict[str, float] = {}

        def add(name: str, weight: float, loss: Callable[[], Tensor]) -> None:
            if weight:
                losses[name], weights[name] = loss(), weight

        add("reconstruction", terms.reconstruction, lambda: self._reconstruction(output))
        add("contrast", terms.alpha, lambda: self._contrast(slots))
        add("similarity", terms.similarity, lambda: self._similarity(output, keys))
        add("slot_kd", terms.slot_kd, lambda: self._slot_kd(slots, batch))
        add(
            "reconstruction_kd",
            terms.reconstruction_kd,
            lambda: self._reconstruction_kd(slots, batch, products),
        )
        add("feature_kd", terms.feature_kd, lambda: self._feature_kd(output.backbone_features, batch))
        total = torch.stack([weights[name] * loss for name, loss in losses.items()]).sum()
        return {"total": total, **losses}

    def _reconstruction(self, output: SlotModelOutput) -> Tensor:
        assert output.reconstruction is not None
        return feature_reconstruction_loss(output.reconstruction.float(), output.backbone_features.float())

    def _contrast(self, slots: Tensor) -> Tensor:
        workers = dist.get_world_size() if dist.is_initialized() else 1
        shares = self.terms.contrast_shares or workers
        if shares % workers == 0:
            shares //= workers  # of the batch that lie in this worker's clips, none of them in another's too
        else:
            slots = _OfAllWorkers.apply(slots)
        if shares == 1:
            return slot_contrastive_loss(slots, self.terms.temperature)
        losses = [slot_contrastive_loss(slots[i::shares], self.terms.temperature) for i in range(shares)]
        return torch.stack(losses).mean()

    def _similarity(self, output: SlotModelOutput, keys: Tensor | None) -> Tensor:
        assert output.similarity is not None
        assert keys is not None
        return temporal_similarity_loss(
            output.similarity.float(),
            keys.float(),
            temperature=self.terms.similarity_temperature,
            threshold=self.terms.similarity_threshold,
        )

    def slots_to_compare(self, slots: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The student's slots `(B, T, N, d')`, in the teacher's slot size, and the teacher's.

        Raises:
            ValueError: the batch has no target slots.
        """
        if batch.target_slots is None:
            raise ValueError("distillation needs the teacher's slots")
        mapped = self.heads["slot_map"](slots) if "slot_map" in self.heads else slots
        return mapped, batch.target_slots

    def _slot_kd(self, slots: Tensor, batch: Batch) -> Tensor:
        return SLOT_LOSSES[self.terms.slot_loss](*self.slots_to_compare(slots, batch))

    def _reconstruction_kd(self, slots: Tensor, batch: Batch, products: torch.dtype | None) -> Tensor:
        student, teacher = self.slots_to_compare(slots, batch)
        with torch.no_grad():
            anchor = self._decode(teacher, products)
        return reconstruction_kd_loss(self._decode(student, products), anchor)

    def _decode(self, slots: Tensor, products: torch.dtype | None) -> Tensor:
        """What the teacher makes `(B * T, P', F')` of slots `(B, T, N, d')`; products: autocast's type or None."""
        assert self.teacher_decoder is not None
        with torch.autocast(slots.device.type, dtype=products, enabled=products is not None):
            decoded = self.teacher_decoder(slots.flatten(0, 1))[0]
        return decoded[..., : self._teacher_feature_size].float()

    def _feature_kd(self, scaled_features: Tensor, batch: Batch) -> Tensor:
        if batch.teacher_features is None:
            raise ValueError("feature KD needs the teacher's features")
        projected = self.model.encoder.output_transform(scaled_features.float())
        mapped = self.heads["features"](projected)
        targets = batch.teacher_features * self._teacher_feature_scale
        return feature_kd_loss(mapped, targets, grids=(self.model.grid, self._teacher_grid))

    @torch.no_grad()
    def measure_bound(self, batch: Batch) -> dict[str, float]:
        """Both sides of Theorem 1 on a batch, as `theorem1_*`; see `pipeline.distill.bound.ReconstructionBound`.

        Raises:
            ValueError: no teacher whose decoder reconstructs features, or no target slots.
        """
        if self.teacher_decoder is None:
            raise ValueError("Theorem 1 needs a teacher whose decoder reconstructs features")
        student, teacher = self.slots_to_compare(self._output(batch).slots.float(), batch)
        size = self._teacher_feature_size
        measured = reconstruction_bound(self.teacher_decoder, teacher, student, feature_size=size)
        return {f"theorem1_{name}": value for name, value in asdict(measured).items()}


class GradientWatch:
    """Whether all gradients of a run have been finite, kept on the device, so that no step waits to know it.

    After the first one that was not, no update changes weights or moments any more: whoever looks at `failed` after
    many steps finds both as they were before it. It is the same on every worker of a DDP group.

    failed: 1.0 from that gradient on, before it 0.0. finite_steps: the number of steps before it, from `step` on.
    """

    def __init__(self, device: torch.device, step: int = 0) -> None:
        self.failed = torch.zeros((), device=device)
        self.finite_steps = torch.full((), step, device=device)

    def see(self, norm: Tensor) -> None:
        """Takes in the norm of the next step's gradient."""
        self.failed.masked_fill_(~torch.isfinite(norm), 1.0)
        self.finite_steps += self.failed == 0


def adam(
    parameters: list[nn.Parameter] | list[dict[str, Any]], learning_rate: float, device: torch.device
) -> torch.optim.Adam:
    """Of parameters or groups of them.

    Whether to update, the fused kernel decides on the device; on a CPU the plain one, whose curves are recorded.
    """
    return torch.optim.Adam(parameters, lr=learning_rate, fused=True if device.type == "cuda" else None)


def training_step(
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Any,
    *,
    learning_rate: float | Sequence[float],
    gradient_clip: float,
    norm_type: float = 2.0,
    autocast: torch.dtype | None = None,
    watch: GradientWatch | None = None,
) -> dict[str, Tensor]:
    """One update of the weights; returns the losses and the gradient norm before clipping, for `read_values`.

    Nothing in it waits for the device where the optimizer is fused (see `adam`), except for a Hungarian matching. The
    weights are left as they were if the gradient is not finite, and where one was not that `watch` has seen before.

    Args:
        batch: as the objective takes it.
        learning_rate: of all parameters, or of each group of them.
        norm_type: which norm is clipped and returned.
    """
    groups = optimizer.param_groups
    rates = learning_rate if isinstance(learning_rate, Sequence) else [learning_rate] * len(groups)
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate
    parameters = [p for group in groups for p in group["params"]]
    device = parameters[0].device.type
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast(device, dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        losses = objective(batch)
    losses["total"].backward()
    norm = nn.utils.clip_grad_norm_(parameters, gradient_clip, norm_type)
    watch = watch or GradientWatch(norm.device)
    watch.see(norm)
    _update(optimizer, watch.failed)
    values = {name: loss.detach() for name, loss in losses.items()}
    return {**values, "gradient_norm": norm.to(losses["total"].dtype)}


def _update(optimizer: torch.optim.Optimizer, failed: Tensor) -> None:
    """The optimizer's step, unless `failed` is not 0."""
    if all(group.get("fused") for group in optimizer.param_groups):
        optimizer.found_inf = failed  # type: ignore[attr-defined]  # as torch.amp.GradScaler tells it
        optimizer.step()
    elif not failed:
        optimizer.step()


def read_values(values: dict[str, Tensor]) -> dict[str, float]:
    """What `training_step` returns as numbers; waits for the device, once."""
    return dict(zip(values, torch.stack(list(values.values())).tolist(), strict=True))

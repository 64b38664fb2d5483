"""A start for slot models that have little data and few steps; and none, for those whose weights are loaded."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pipeline.models.layers import LearnedSlots, TransformerBlock
from pipeline.models.pixels import Grid
from pipeline.models.slot_model import SlotModel

PLACES = 5  # numbers of a slot that tell where it is
KMEANS_POINTS = 20_000
DECIMALS = 4  # of what is computed in float64, so that a seed gives one start however many threads add up


def sine_cosine_positions(grid: Grid, width: int, periods: Tensor) -> Tensor:
    """Fixed 2-D positions `(rows * columns, width)`: sine and cosine of x and y at `width / 4` periods."""
    places = [torch.arange(side, dtype=torch.float32) for side in grid]
    y, x = (p.flatten()[:, None] / periods for p in torch.meshgrid(*places, indexing="ij"))
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], 1)


@torch.no_grad()
def start_as_soft_kmeans(model: SlotModel, *, sharpness: float = 4.0, position_scale: float = 2.0) -> None:
    """Slot attention that clusters its features before any training, and a decoder that sees place.

    Queries and keys share one random rotation (times `sharpness`), values pass through, the GRU mostly
    takes its input, and the residual parts start near zero: a few iterations are a few of soft k-means.
    Not from the paper, whose models train for 100,000 steps and more; within 1,000 steps on small models
    PyTorch's default start learns next to nothing.
    """
    corrector, size = model.processor.corrector, model.config.slot_size
    rotation = nn.init.orthogonal_(torch.empty(size, size))
    corrector.to_q.weight.copy_(rotation)
    corrector.to_k.weight.copy_(sharpness * rotation)
    corrector.to_v.weight.copy_(torch.eye(size))
    gru = corrector.gru  # rows: reset, update, candidate
    gru.weight_ih.mul_(0.1)
    gru.weight_hh.mul_(0.1)
    gru.weight_ih[2 * size :] = torch.eye(size)
    gru.weight_hh[2 * size :] = 0
    gru.bias_ih.zero_()
    gru.bias_hh.zero_()
    gru.bias_ih[size : 2 * size] = -1
    residual = []
    if model.processor.predictor is not None:
        block = cast(TransformerBlock, model.processor.predictor.blocks[0])
        residual += [block.self_attn.out_proj, block.linear2]
    if corrector.mlp is not None:
        residual.append(cast(nn.Linear, corrector.mlp.layers[-1]))
    for layer in residual:
        layer.weight.mul_(0.1)
        layer.bias.zero_()
    periods = (max(model.grid) - 1) / (math.pi * 2 ** torch.linspace(-1, 2.5, size // 4))
    model.decoder.pos_emb.copy_(position_scale * sine_cosine_positions(model.grid, size, periods))


@torch.no_grad()
def fit_start(model: SlotModel, features_CPF: Tensor, *, seed: int | None, place_scale: float = 1.5) -> None:
    """Puts a model that starts as soft k-means into the principal components of features, with places beside them.

    The projection becomes a linear map (an MLP with 2 F hidden units holds any: rows W and -W): principal components
    of the normalised features, together of unit variance; and in the last numbers of a slot what those tell best of x,
    y, x^2, y^2 and xy of their patch (least squares), which slot attention does not compare, but hands on: a decoder
    needs it to say where a slot is. The initial slots are cluster centres. Slot attention then finds real objects
    before any training (docs/evidence.md), and the decoder has to learn. Not from the paper.

    Args:
        model: after `start_as_soft_kmeans`.
        features_CPF: C frames' features as the backbone gives them.
        seed: of the cluster centres' start; None: the initial slots stay as they are, a teacher's of the same backbone,
            whose components are nearly the same.
        place_scale: standard deviation of the numbers that tell the place.

    Raises:
        ValueError: slots that are drawn, or that have no room for places.
    """
    from scipy.cluster.vq import kmeans2

    if not isinstance(model.initializer, LearnedSlots):
        raise ValueError("a start fitted to features needs initial slots that are learned")
    if model.config.slot_size <= PLACES:
        raise ValueError(f"a start fitted to features needs a slot_size above {PLACES}")
    normalised_CPF = _normalised(model, features_CPF)
    linear, mean = _components_and_places(normalised_CPF, model.config.slot_size, model.grid, place_scale)
    _set_projection(model, linear, mean, mean.new_zeros(len(linear)))
    corrector = model.processor.corrector
    for compared in (corrector.to_q, corrector.to_k):
        compared.weight[:, -PLACES:] = 0
    if seed is None:
        return
    points = (normalised_CPF.flatten(0, 1) - mean) @ linear.T
    sample = points[:: max(1, len(points) // KMEANS_POINTS)].numpy()
    centres, _ = kmeans2(sample, model.config.num_slots, iter=30, minit="++", seed=seed, missing="warn")
    slots = torch.from_numpy(centres).round(decimals=DECIMALS)
    model.initializer.slots.copy_(slots.view_as(model.initializer.slots))


@torch.no_grad()
def start_as_teacher(model: SlotModel, features_CPF: Tensor, teacher: SlotModel, inputs_CQD: Tensor) -> None:
    """Lets a student group as its teacher does, as far as the student's features allow.

    Slot attention, predictor and initial slots become the teacher's, and the projection the linear map (see
    `fit_start`) of the student's normalised features that comes nearest to what the teacher's slot attention is given
    for the same patches (least squares). The decoder, whose outputs are the student's own features, has to learn. Not
    from the paper; the start of a smaller network from a larger one's weights is that of DistilBERT (Sanh et al. 2019).

    Args:
        model: the student, of the teacher's slot size, after `start_as_soft_kmeans`.
        features_CPF: C frames' features as the student's backbone gives them.
        inputs_CQD: `teacher.project` of the same frames, of the teacher's grid; resampled to the student's.

    Raises:
        RuntimeError: the teacher's slot attention, predictor or initial slots have other parts or sizes.
    """
    model.processor.load_state_dict(teacher.processor.state_dict())
    model.initializer.load_state_dict(teacher.initializer.state_dict())
    wanted = inputs_CQD.cpu().double()
    if model.grid != teacher.grid:
        maps = wanted.transpose(1, 2).unflatten(2, teacher.grid)
        resampled = F.interpolate(maps, model.grid, mode="bilinear", antialias=True)
        wanted = resampled.flatten(2).transpose(1, 2)
    given, wanted = _normalised(model, features_CPF).flatten(0, 1), wanted.flatten(0, 1)
    mean, offset = given.mean(0), wanted.mean(0)
    centred = given - mean
    covariance = centred.T @ centred / len(given)
    products = centred.T @ (wanted - offset) / len(given)
    linear = _least_squares(covariance, products)
    _set_projection(model, *(tensor.round(decimals=DECIMALS) for tensor in (linear, mean, offset)))


def _normalised(model: SlotModel, features_CPF: Tensor) -> Tensor:
    """What the projection's linear layers see of features."""
    norm = cast(nn.Module, model.encoder.output_transform.layers[0])
    return norm(model.scaled(features_CPF.to(model.device, torch.float32))).cpu().double()


def _least_squares(covariance: Tensor, products: Tensor) -> Tensor:
    """The linear map `(d, F)` from features `(F,)` to numbers `(d,)`, by their products `(F, d)`; all without mean."""
    return torch.linalg.solve(covariance + 0.01 * torch.eye(len(covariance), dtype=torch.double), products).T


def _set_projection(model: SlotModel, linear: Tensor, mean: Tensor, offset: Tensor) -> None:
    """Makes the projection `linear @ (x - mean) + offset` of a normalised feature x."""
    _, first, _, last = cast(
        tuple[nn.Module, nn.Linear, nn.Module, nn.Linear], tuple(model.encoder.output_transform.layers)
    )
    unit = torch.eye(len(mean), dtype=torch.double)
    first.weight.copy_(torch.cat([unit, -unit]))
    first.bias.copy_(torch.cat([-mean, mean]))
    last.weight.copy_(torch.cat([linear, -linear], 1))
    last.bias.copy_(offset)


def _components_and_places(
    features_CPF: Tensor, size: int, grid: Grid, place_scale: float
) -> tuple[Tensor, Tensor]:
    """The rows `(size, F)` of a linear map of features without their mean, and that mean `(F,)`; see `fit_start`."""
    flat = features_CPF.flatten(0, 1)
    mean = flat.mean(0)
    covariance = (flat - mean).T @ (flat - mean) / len(flat)
    variances, components = torch.linalg.eigh(covariance)  # rising
    kept = min(size - PLACES, len(covariance))
    axes = components[:, -kept:].flip(1).T * (kept / variances[-kept:].sum()).sqrt()
    # Of which sign they are is LAPACK's choice.
    axes = axes * axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()
    unused = axes.new_zeros(size - PLACES - kept, len(covariance))  # slots of more numbers than features have
    places = _places(grid).double()
    # Each frame has the same places, so that their mean over frames is all that the products need.
    products = (features_CPF.mean(0) - mean).T @ places / len(places)
    told = _least_squares(covariance, products)
    told = told * place_scale / (told @ covariance * told).sum(1, keepdim=True).sqrt().clamp(min=1e-6)
    return torch.cat([axes, unused, told]).round(decimals=DECIMALS), mean.round(decimals=DECIMALS)


def _places(grid: Grid) -> Tensor:
    """x, y, x^2, y^2 and xy of each patch, of zero mean, `(P, PLACES)`; x and y from -1 to 1."""
    y, x = torch.meshgrid(*(torch.linspace(-1, 1, side) for side in grid), indexing="ij")
    x, y = x.flatten(), y.flatten()
    places = torch.stack([x, y, x.square(), y.square(), x * y], 1)
    return places - places.mean(0)


class WithoutDraws(TorchFunctionMode):
    """A block that builds modules without their random start: for those of which every parameter is loaded next.

    Drawing a ViT-B takes longer than reading it. Until they are loaded, parameters hold anything.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _DRAWS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


# timm calls the tensor's own methods, PyTorch's layers call functions, some of which are seen here themselves.
_DRAWS = (
    *(Tensor.uniform_, Tensor.normal_, Tensor.erfinv_),
    *(nn.init.uniform_, nn.init.normal_, nn.init.kaiming_uniform_, nn.init.xavier_uniform_),
)

"""Scores by counting, against a slow and obvious computation from their definitions."""

import itertools
import math

import numpy as np
import pytest
import torch
from golden_numbers import numbers
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.metrics import count_overlaps, fg_ari, matched_scores, mean_best_overlap


def samples(true_masks, predicted, level, ignore_background, ignore_overlaps):
    """Per sample, lists of object masks and slot masks as flat boolean arrays."""
    if ignore_background:
        true_masks = true_masks[:, :, 1:]
    for video, slots in zip(true_masks, predicted, strict=True):
        frames = [[t] for t in range(len(video))] if level == "image" else [list(range(len(video)))]
        for chosen in frames:
            objects = [video[chosen, c].ravel() for c in range(video.shape[1])]
            masks = [slots[chosen].ravel() == k for k in range(int(predicted.max()) + 1)]
            if ignore_overlaps:
                kept = np.sum(objects, axis=0) <= 1 if objects else np.ones(masks[0].shape, bool)
                objects, masks = [m & kept for m in objects], [m & kept for m in masks]
            if any(m.any() for m in objects):
                yield objects, masks


def slow_ari(objects, slots):
    """Hubert & Arabie (1985); a pixel in two objects counts for each of them."""
    table = [[float((o & s).sum()) for s in slots] for o in objects]
    pairs = lambda counts: sum(math.comb(int(n), 2) for n in counts)  # noqa: E731
    index = pairs(itertools.chain(*table))
    rows, columns = pairs(sum(row) for row in table), pairs(map(sum, zip(*table, strict=True)))
    total = math.comb(int(sum(map(sum, table))), 2)
    expected = rows * columns / total if total else 0.0
    maximum = (rows + columns) / 2
    return 1.0 if maximum == expected else (index - expected) / (maximum - expected)


def slow_mbo(objects, slots):
    best = [max((o & s).sum() / (o | s).sum() for s in slots if (o | s).any()) for o in objects if o.any()]
    return float(np.mean(best))


@st.composite
def scenes(draw):
    """Random masks: overlapping objects, objects and frames without a pixel, unused slots."""
    shape = [draw(st.integers(1, n)) for n in (2, 3, 4, 4, 5)]
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    true_masks = rng.random(shape) < draw(st.sampled_from([0.05, 0.3, 0.7]))
    true_masks &= rng.random(shape[:3])[..., None, None] < draw(st.sampled_from([0.4, 1]))
    B, T, _, H, W = shape
    slots = draw(st.integers(1, 5))
    predicted = rng.integers(0, slots, (B, T, H, W)) * draw(st.sampled_from([1, 2]))
    return true_masks, predicted


@settings(max_examples=150, deadline=None)
@given(scenes(), st.sampled_from(["image", "video"]), st.booleans(), st.booleans())
def test_counting_equals_the_definition(scene, level, ignore_background, ignore_overlaps):
    true_masks, predicted = scene
    flags = {"level": level, "ignore_background": ignore_background, "ignore_overlaps": ignore_overlaps}
    expected = list(samples(true_masks, predicted, **flags))
    for fast, slow in ((fg_ari, slow_ari), (mean_best_overlap, slow_mbo)):
        value = fast(torch.from_numpy(true_masks), torch.from_numpy(predicted), **flags)
        if expected:
            assert value == pytest.approx(np.mean([slow(*s) for s in expected]), abs=1e-9)
        else:
            assert math.isnan(value)


def mean_iou(object_masks, slot_masks):
    """Of one object and one slot, over the frames where either is."""
    pairs = zip(object_masks, slot_masks, strict=True)
    ious = [(o & s).sum() / (o | s).sum() for o, s in pairs if (o | s).any()]
    return float(np.mean(ious)) if ious else 0.0


@settings(max_examples=50, deadline=None)
@given(scenes())
def test_matching_equals_the_definition(scene):
    (true_masks, *_), (predicted, *_) = scene  # of one video: (T, C, H, W) and (T, H, W)
    objects = [mask for mask in true_masks.swapaxes(0, 1) if mask.any()]
    slots = [predicted == k for k in range(int(predicted.max()) + 1)]
    ious = np.array([[mean_iou(o, s) for s in slots] for o in objects]).reshape(len(objects), len(slots))
    few, many = sorted((ious, ious.T), key=len)[0], max(ious.shape)
    best = max(
        sum(few[i, j] for i, j in enumerate(order)) for order in itertools.permutations(range(many), len(few))
    )

    found = matched_scores(count_overlaps(*(torch.from_numpy(x)[None] for x in (true_masks, predicted))))
    assert found.ious.sum().item() == pytest.approx(best)
    own = found.slots.tolist()
    assert found.ious.tolist() == pytest.approx([ious[c, k] if k >= 0 else 0 for c, k in enumerate(own)])
    taken = [k for k in own if k >= 0]
    assert len(set(taken)) == len(taken) == len(few)
    for t, (ari, valid) in enumerate(zip(found.fg_ari, found.valid, strict=True)):
        assert bool(valid) == any(o[t].any() for o in objects)
        if valid:
            labels = [slots[k][t].ravel() for k in taken]
            background = ~np.logical_or.reduce([*labels, np.zeros(predicted[t].size, bool)])
            expected = slow_ari([o[t].ravel() for o in objects], [*labels, background])
            assert ari.item() == pytest.approx(expected, abs=1e-9)


def test_matched_scores_are_those_of_solv():
    """Computed by the public implementation; nothing is in one of the frames."""
    golden = numbers("rivals/solv_tiny")
    true, predicted = golden["score_true"].long(), golden["score_predicted"].long()
    found = matched_scores(
        count_overlaps(torch.stack([true == c for c in (1, 2, 3)], 1)[None], predicted[None])
    )
    torch.testing.assert_close(found.ious, golden["score_object_mious"], atol=1e-5, rtol=0)
    assert found.ious.mean().item() == pytest.approx(golden["score_miou"].item(), abs=1e-5)
    assert found.fg_ari[found.valid].mean().item() == pytest.approx(golden["score_fg_ari"].item(), abs=1e-6)
    matched = sum((predicted == slot) * number for number, slot in enumerate(found.slots.tolist(), 1))
    assert torch.equal(matched, golden["score_matched"].long())


def test_perfect_prediction_scores_one():
    labels = torch.tensor([[[[0, 1, 1], [2, 2, 0]]]])
    true_masks = torch.stack([labels == i for i in range(3)], dim=2)
    renamed = torch.tensor([4, 0, 2])[labels]  # which slot has which object is no matter
    for level, score in itertools.product(("image", "video"), (fg_ari, mean_best_overlap)):
        assert score(true_masks, renamed, level=level) == 1


def test_an_object_that_changes_its_slot_is_wrong_in_the_video_alone():
    labels = torch.zeros(1, 2, 4, 4, dtype=torch.long)
    labels[..., 2:] = 1
    true_masks = torch.stack([labels == 0, labels == 1], dim=2)
    swapped = labels.clone()
    swapped[:, 1] = 1 - labels[:, 1]
    assert fg_ari(true_masks, swapped, level="image") == 1
    assert mean_best_overlap(true_masks, swapped, level="image") == 1
    assert fg_ari(true_masks, swapped, level="video") < 0.1
    assert mean_best_overlap(true_masks, swapped, level="video") == pytest.approx(1 / 3)


def test_samples_without_objects_are_left_out():
    true_masks = torch.zeros(1, 2, 1, 2, 2, dtype=torch.bool)
    true_masks[0, 0, 0, 0] = True
    predicted = torch.tensor([[[[1, 1], [0, 0]], [[0, 0], [0, 0]]]])
    assert mean_best_overlap(true_masks, predicted, level="image") == 1  # not 0.5


def test_many_slots_and_a_large_frame_in_little_time():
    """One-hot tensors of this video would take 10 GB."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 10, (1, 24, 336, 336), generator=generator)
    true_masks = torch.stack([labels == i for i in range(10)], dim=2)
    predicted = torch.randint(0, 24, labels.shape, generator=generator, dtype=torch.uint8)
    assert abs(fg_ari(true_masks, predicted, level="video")) < 1e-3
    assert mean_best_overlap(true_masks, predicted, level="video") < 0.05


def test_errors():
    true_masks = torch.ones(1, 2, 3, 4, 5, dtype=torch.bool)
    predicted = torch.zeros(1, 2, 4, 5, dtype=torch.long)
    for score in (fg_ari, mean_best_overlap):
        with pytest.raises(ValueError, match="level must be one of"):
            score(true_masks, predicted, level="frame")
        with pytest.raises(ValueError, match=r"\(1, 2, 5, 4\)"):
            score(true_masks, predicted.transpose(2, 3), level="image")
        with pytest.raises(ValueError, match=r"must be \(B, T, C, H, W\)"):
            score(true_masks[0], predicted[0], level="image")
        with pytest.raises(ValueError, match="negative slot indices"):
            score(true_masks, predicted - 1, level="image")

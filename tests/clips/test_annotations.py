"""COCO's run lengths and polygons, against pycocotools."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from layouts import box_mask, compressed_rle, uncompressed_rle
from pycocotools import mask as coco_mask

from pipeline.clips.sources.annotations import decode_segmentation, is_read_since

SIZE = (11, 7)


@st.composite
def masks(draw):
    seed, share = draw(st.integers(0, 2**32 - 1)), draw(st.sampled_from([0, 0.02, 0.5, 0.98, 1]))
    shape = draw(st.sampled_from([SIZE, (1, 1), (3, 200), (300, 5)]))
    return np.random.default_rng(seed).random(shape) < share


@given(masks())
def test_run_lengths_are_decoded_as_pycocotools_encodes_them(mask):
    np.testing.assert_array_equal(decode_segmentation(compressed_rle(mask), *mask.shape), mask)
    np.testing.assert_array_equal(decode_segmentation(uncompressed_rle(mask), *mask.shape), mask)
    as_bytes = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    np.testing.assert_array_equal(decode_segmentation(as_bytes, *mask.shape), mask)


def test_long_runs():
    mask = np.zeros((3000, 2000), bool)
    mask[5, 1000], mask[:, 1999] = True, True
    np.testing.assert_array_equal(decode_segmentation(compressed_rle(mask), 3000, 2000), mask)


@given(st.text("0123456789:;<=>?@ABCXYZ[]^_`abcmno", max_size=12))
def test_any_text_is_a_mask_or_an_error(text):
    """pycocotools reads behind the end of such text, or gives a mask of too few runs."""
    try:
        mask = decode_segmentation({"size": SIZE, "counts": text}, *SIZE)
    except ValueError:
        return
    assert mask.shape == SIZE
    expected = coco_mask.decode({"size": list(SIZE), "counts": text.encode()})
    np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize(
    "segmentation",
    [
        {},
        {"counts": None},
        {"counts": []},
        {"counts": [78]},
        {"counts": [80, -3]},
        {"counts": [1.5, 75.5]},
        {"counts": "0" * 77 + "P"},
        {"counts": "oooooooooo0"},
        [[1, 2, 3, 4, 5, 6, 7]],
        [[1, 2, 3, float("nan"), 5, 6]],
        [[1, 2, 3, "x", 5, 6]],
        [1, 2, 3, 4, 5, 6],
        "text",
        7,
    ],
)
def test_what_is_no_mask_is_an_error(segmentation):
    with pytest.raises(ValueError):  # noqa: PT011 (the messages are asserted in test_broken_layouts)
        decode_segmentation(segmentation, *SIZE)


def test_polygons():
    """Several parts of one object, one of them partly outside of the frame, and no part at all."""
    parts = [[1, 1, 4, 1, 4, 5, 1, 5], [5, 8, 9, 8, 9, 20, 5, 20]]
    expected = box_mask((1, 1, 4, 5), SIZE) | box_mask((5, 8, 7, 11), SIZE)
    np.testing.assert_array_equal(decode_segmentation(parts, *SIZE), expected)
    assert not decode_segmentation([], *SIZE).any()


def test_a_list_of_run_lengths():
    """As pycocotools' `annToMask` merges them."""
    halves = [box_mask((0, 0, 3, 11), SIZE), box_mask((2, 4, 7, 6), SIZE)]
    parts = [uncompressed_rle(mask) for mask in halves]
    expected = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(parts, *SIZE)))
    np.testing.assert_array_equal(decode_segmentation(parts, *SIZE), expected)
    assert expected.sum() == 33 + 10 - 2


RING = [1, 1, 6, 1, 6, 9, 1, 9]


@pytest.mark.parametrize("other", [[], [3], [3, 3], [3, 3, 4, 4], [3, 3, 4, 4, 5]])
@pytest.mark.parametrize("first", [True, False])
def test_rings_of_fewer_than_three_points_are_left_out(other, first):
    expected = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects([RING], *SIZE)))
    rings = [other, RING] if first else [RING, other]
    np.testing.assert_array_equal(decode_segmentation(rings, *SIZE), expected)
    assert decode_segmentation([other, other], *SIZE) is None


@pytest.mark.parametrize(
    "other", [[1, 1, 5, 1, 5, 5, 1], [1, 1, 5, float("nan"), 5, 5], [1, 1, 5, 1, 5, 1e9], 7]
)
def test_a_good_ring_hides_no_damaged_one(other):
    with pytest.raises(ValueError, match="a polygon "):
        decode_segmentation([RING, other], *SIZE)


@pytest.mark.parametrize("corners", [3, 4, 8])
def test_corners_that_are_pairs(corners):
    """As labelme's and other converters write them: they are no polygons without an area."""
    angles = 2 * np.pi * np.arange(corners) / corners
    pairs = np.stack([8 + 6 * np.cos(angles), 6 + 5 * np.sin(angles)], 1).round(2).tolist()
    flat = [value for pair in pairs for value in pair]
    expected = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects([flat], 12, 16)))
    assert expected.sum() > 20
    for segmentation in (pairs, [pairs], [pairs, flat], [pairs, [1, 1]]):
        np.testing.assert_array_equal(decode_segmentation(segmentation, 12, 16), expected)
        assert is_read_since(segmentation)
    assert not is_read_since([flat])

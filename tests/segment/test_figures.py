"""Pictures: which slot has which colour, and what stands where."""

import io

import numpy as np
import pytest
from PIL import Image

from pipeline.segment.figures import (
    MAX_BYTES,
    Panel,
    comparison,
    match_labels,
    match_rows,
    overlay,
    slot_colours,
    time_steps,
    to_png,
)


@pytest.fixture
def labels():
    """Four slots over a video of 6 frames, in blocks that move."""
    blocks = np.arange(24)[:, None] // 12 * 2 + np.arange(32)[None] // 16
    return np.stack([np.roll(blocks, t, axis=1) for t in range(6)]).astype(np.uint8)


# --- colours --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_a_permuted_copy_gets_the_same_numbers(labels, seed):
    permuted = np.random.default_rng(seed).permutation(4).astype(np.uint8)[labels]
    np.testing.assert_array_equal(match_labels(permuted, labels), labels)


def test_a_slot_keeps_its_number_for_the_whole_video(labels):
    """Even where at one time another slot shares more with it: the sum over the video counts."""
    other = np.array([2, 3, 0, 1], np.uint8)[labels]
    other[0] = np.array([3, 2, 1, 0], np.uint8)[labels[0]]
    matched = match_labels(other, labels)
    np.testing.assert_array_equal(matched[1:], labels[1:])
    for slot in range(4):
        assert len(np.unique(matched[other == slot])) == 1


def test_the_assignment_is_the_best_one_and_not_greedy():
    """Greedily, slot 0 takes its 5 pixels of slot 0, and slot 1 is left with none of its 4."""
    reference = np.repeat(np.array([0, 1, 0]), (5, 4, 4))[None, None]
    other = np.repeat(np.array([0, 0, 1]), (5, 4, 4))[None, None]
    np.testing.assert_array_equal(match_labels(other, reference), 1 - other)


def test_more_slots_than_the_reference_get_colours_of_their_own(labels):
    more = labels.copy()
    more[:, :4, :4] = 7  # slots 4 to 6 have no pixel
    matched = match_labels(more, labels)
    np.testing.assert_array_equal(matched[more != 7], labels[more != 7])
    assert set(matched[more == 7]) == {4}
    assert set(match_labels(more, labels, first_free=9)[more == 7]) == {9}


def test_fewer_slots_than_the_reference(labels):
    one = np.zeros_like(labels)
    matched = match_labels(one, labels)
    assert len(np.unique(matched)) == 1
    assert matched.max() < 4


def test_slots_that_share_no_pixel_are_not_called_alike():
    reference = np.full((1, 2, 2), -1)
    reference[0, 0] = 0
    other = np.full((1, 2, 2), -1)
    other[0, 1] = 0
    np.testing.assert_array_equal(match_labels(other, reference)[0], [[-1, -1], [1, 1]])


def test_ground_truth_takes_the_slots_colours_and_its_background_none(labels):
    objects = labels.astype(np.int16) - 1  # 0 is the background
    matched = match_labels(objects, labels)
    np.testing.assert_array_equal(matched[labels > 0], labels[labels > 0])
    assert (matched[labels == 0] == -1).all()


def test_a_video_without_objects(labels):
    nothing = np.full(labels.shape, -1)
    np.testing.assert_array_equal(match_labels(nothing, labels), nothing)
    np.testing.assert_array_equal(match_labels(labels, nothing), labels)


def test_what_has_no_partner_has_another_colour_in_every_row(labels):
    more = labels.copy()
    more[:, :4, :4] = 4
    rows = match_rows({"a": more, "ours": labels, "b": more}, "ours")
    np.testing.assert_array_equal(rows["ours"], labels)
    assert set(rows["a"][more == 4]).isdisjoint(rows["b"][more == 4])


def test_overlay_mixes_colours_draws_lines_and_darkens_what_has_no_label():
    frame = np.full((8, 8, 3), 200, np.uint8)
    labels = np.zeros((8, 8), int)
    labels[:, 4:] = -1
    picture = overlay(frame, labels, 1, opacity=0.5)
    np.testing.assert_allclose(picture[4, 1], 100 + slot_colours(1)[0] / 2, atol=1)
    assert (picture[4, 6] == 100).all()
    assert [(picture[:, x] == 255).all() for x in range(8)] == [x == 4 for x in range(8)]
    thick = overlay(frame, labels, 1, line=3)
    assert [(thick[:, x] == 255).all() for x in range(8)] == [x in (4, 5, 6) for x in range(8)]


# --- layout ---------------------------------------------------------------------------------------


def cells(sheet, colour):
    """Boxes (left, top, right, bottom) of the connected areas that are near a colour."""
    from scipy.ndimage import find_objects, label

    near = (np.abs(np.asarray(sheet).astype(int) - colour) < 30).all(-1)
    found = [(s[1].start, s[0].start, s[1].stop, s[0].stop) for s in find_objects(label(near)[0])]
    return [box for box in found if (box[2] - box[0]) * (box[3] - box[1]) > 100]  # not the text


def under_slot_0(colour):
    """A frame's colour where slot 0 covers it: its grey tone, mixed with the slot's colour."""
    return np.array(colour) @ (0.299, 0.587, 0.114) * 0.45 + slot_colours(1)[0] * 0.55


def plain_panel(frames, colour, rows, title="a video\nand more"):
    pixels = np.full((frames, 30, 30, 3), colour, np.uint8)
    return Panel(pixels, {name: np.zeros((frames, 30, 30), np.uint8) for name in rows}, title)


def test_rows_and_columns_are_where_the_paper_has_them():
    red, blue = (200, 0, 0), (0, 0, 200)
    rows = ("Student (no KD)", "Teacher", "SlotMatch (ours)")
    sheet = comparison([plain_panel(24, red, rows), plain_panel(3, blue, rows)], reference=rows[2], columns=4)
    assert sheet.width == 1400
    first, second = cells(sheet, red), cells(sheet, blue)
    assert (len(first), len(second)) == (4, 3)  # the frames' row; a short video has fewer
    assert len({top for _, top, _, _ in first + second}) == 1
    assert max(right for _, _, right, _ in first) < min(left for left, _, _, _ in second)
    side = first[0][2] - first[0][0]
    assert 140 < side < 170
    masks = cells(sheet, under_slot_0(red))  # red and blue have about the same grey tone
    assert len(masks) == 3 * (4 + 3)
    assert {left for left, *_ in masks} == {left for left, *_ in first + second}
    tops = sorted({top for _, top, *_ in masks})
    assert len(tops) == 3
    assert min(tops) > first[0][1]
    assert sheet.height >= tops[-1] + side
    # Row labels and column titles: something is written left of the cells and above them.
    left = np.asarray(sheet.convert("L"))[:, : first[0][0]]
    assert all((left[top : top + side] < 100).any() for top in [first[0][1], *tops])
    assert (left[:, :2] > 200).all(), "a label is cut off"
    assert (np.asarray(sheet.convert("L"))[: first[0][1], first[0][0] : first[0][2]] < 100).any()


def test_more_panels_than_fit_side_by_side_stand_below():
    panels = [plain_panel(5, (200, 0, 0), ("a",)) for _ in range(5)]
    two_bands = comparison(panels, columns=3, across=3)
    boxes = cells(two_bands, (200, 0, 0))
    assert len(boxes) == 15
    assert len({top for _, top, *_ in boxes}) == 2
    assert two_bands.height > 1.9 * comparison(panels[:3], columns=3, across=3).height


def test_a_row_that_a_panel_does_not_have_stays_empty():
    sheet = comparison([plain_panel(2, (200, 0, 0), ("a",)), plain_panel(2, (0, 0, 200), ())], columns=2)
    masks = cells(sheet, under_slot_0((200, 0, 0)))
    assert len(masks) == 2
    assert len(cells(sheet, (0, 0, 200))) == 2


def test_the_same_slot_has_the_same_colour_in_all_rows_and_columns(labels):
    permuted = np.array([3, 0, 1, 2], np.uint8)[labels]
    frames = np.full((*labels.shape, 3), 128, np.uint8)
    sheet = comparison([Panel(frames, {"a": permuted, "b": labels})], reference="b", across=1)
    expected = slot_colours(4) * 0.55 + 128 * 0.45
    for colour in expected:
        boxes = cells(sheet, colour)
        assert len({top // 100 for _, top, *_ in boxes}) >= 2
    without = comparison([Panel(frames, {"a": permuted, "b": labels})], across=1)
    assert np.abs(np.asarray(sheet).astype(int) - np.asarray(without)).max() > 50


def test_frames_that_are_no_squares_keep_their_shape():
    panel = Panel(np.full((2, 20, 40, 3), (200, 0, 0), np.uint8))
    ((left, top, right, bottom), _) = cells(comparison([panel], columns=2, across=1), (200, 0, 0))
    assert (right - left) / (bottom - top) == pytest.approx(2, abs=0.02)


def test_long_titles_end_within_their_panel():
    long = plain_panel(2, (200, 0, 0), ("a",), title="x" * 500)
    sheet = comparison([long, plain_panel(2, (0, 0, 200), ("a",), title="")], columns=2)
    (red, _), (blue, _) = cells(sheet, (200, 0, 0)), cells(sheet, (0, 0, 200))
    gap = np.asarray(sheet.convert("L"))[:20, blue[0] - 10 :]
    assert (gap > 200).all()
    assert (np.asarray(sheet.convert("L"))[:20, red[0] : red[2]] < 100).any()


def test_time_steps_are_spread_and_different():
    assert time_steps(24, 4) == [0, 8, 15, 23]
    assert time_steps(3, 4) == [0, 1, 2]
    assert time_steps(1, 4) == [0]


# --- files ----------------------------------------------------------------------------------------


def test_a_picture_of_noise_still_is_a_small_file():
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)
    content = to_png(Image.fromarray(noise), max_bytes=60_000)
    assert len(content) <= 60_000
    with Image.open(io.BytesIO(content)) as image:
        assert image.width > 150


def test_what_is_small_anyway_keeps_every_colour():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 50, 3), np.uint8))
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(to_png(image)))), np.asarray(image))
    assert MAX_BYTES < 500_000

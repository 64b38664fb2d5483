"""Motion segments of drawn flow: what moves by itself is known."""

import numpy as np
import pytest

from pipeline.clips.motion import motion_segments, moving_objects, steady_frames

H, W = 60, 80


def scene(T=6):
    """Flow of nothing, `(T, H, W, 2)`."""
    return np.zeros((T, H, W, 2), np.float32)


def same_segments(found, expected):
    pairs = set(zip(found.ravel().tolist(), expected.ravel().tolist(), strict=True))
    numbers = len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})
    return numbers and all((a == 0) == (b == 0) for a, b in pairs)


def panned(flow):
    """With the flow of a camera that turns and goes on, over a plane."""
    y, x = np.meshgrid(np.linspace(-1, 1, H), np.linspace(-1, 1, W), indexing="ij")
    flow[..., 0] += 3 + 2 * x + 0.5 * y + 0.4 * x * x + 0.3 * x * y
    flow[..., 1] += -1 + 0.5 * x + 2 * y + 0.3 * y * y + 0.4 * x * y
    return flow


def test_objects_that_move_by_themselves_though_the_camera_does():
    labels = np.zeros((2, H, W), np.uint8)
    labels[:, 5:20, 5:20], labels[:, 30:50, 30:50] = 3, 7
    labels[:, 55:57, 70:75] = 9  # moves, but is of 10 pixels
    flow = panned(scene(2))
    flow[:, 30:50, 30:50, 0] += 1.2
    flow[1, 5:20, 5:20, 1] -= 2
    flow[:, 55:57, 70:75] += 5
    expected = np.where(labels == 7, 7, 0)
    expected[1, 5:20, 5:20] = 3
    np.testing.assert_array_equal(moving_objects(labels, flow), expected)
    assert not moving_objects(labels, flow, least=2.5).any()
    assert (moving_objects(labels, flow, small=5) == 9).any()


def test_a_frame_without_background():
    labels, flow = np.ones((1, H, W), np.uint8), scene(1) + 2
    assert (moving_objects(labels, flow) == 1).all()


def test_steady_frames():
    """Nine frames, of which the camera moves in the fourth; one corner may move, two may not."""
    flow = scene(10)
    flow[:, :9, :12] = 4
    flow[3] += 2
    assert steady_frames(flow).tolist() == [False] * 4 + [True] * 6
    flow[:, -9:, :12, 0] = 1.8
    assert not steady_frames(flow).any()
    flow[:, -9:, :12, 0] = 1.6
    assert steady_frames(flow).sum() == 6


def test_segments_are_what_flows():
    flow, expected = scene(), np.zeros((6, H, W), np.uint8)
    for t in range(6):
        flow[t, 10:25, 10 + t : 30 + t], expected[t, 10:25, 10 + t : 30 + t] = (3, 0), 1
        flow[t, 35:50, 40:60], expected[t, 35:50, 40:60] = (0, -4), 2
        flow[t, 35:43, 5:15] = 9  # of 80 pixels
        flow[t, 10:25, 50:70] = (2, 1)  # too slow
    found = motion_segments(flow)
    assert found.dtype == np.int32
    assert all(same_segments(one, other) for one, other in zip(found, expected, strict=True))


def test_things_that_touch_and_flow_otherwise_are_two():
    flow, expected = scene(), np.zeros((6, H, W), np.uint8)
    flow[:, 10:40, 10:30], expected[:, 10:40, 10:30] = (4, 0), 1
    flow[:, 10:40, 30:50], expected[:, 10:40, 30:50] = (-4, 1), 2
    assert same_segments(motion_segments(flow), expected)
    flow[:, 10:40, 30:50] = (4, 1.5)  # a step of less than an edge's
    assert same_segments(motion_segments(flow), expected > 0)


def test_no_segments_while_the_camera_moves():
    flow = scene()
    flow[:, 10:40, 10:30] = (8, 0)
    assert motion_segments(flow).any()
    assert not motion_segments(flow + 3).any()


def test_what_is_no_flow():
    with pytest.raises(ValueError, match=r"flow has shape \(6, 60, 80\); expected \(T, H, W, 2\)"):
        motion_segments(scene()[..., 0])
    with pytest.raises(
        ValueError, match=r"segmentations have shape \(5, 60, 80\), but flow \(6, 60, 80, 2\)"
    ):
        moving_objects(np.zeros((5, H, W), int), scene())

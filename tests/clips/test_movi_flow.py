"""MOVi's own optical flow: pictures of two channels of 16 bits, written here from PNG's specification."""

import struct
import zlib

import numpy as np
import pytest
from layout_sets import clip_set, find
from layouts import example, png_bytes, tfrecord

from pipeline.clips.sources import read_video
from pipeline.config import ConfigError, resolve_config

T, SIZE = 6, (48, 64)
RANGE = (-6.5, 7.25)  # pixels
STEP = (RANGE[1] - RANGE[0]) / 65535
NAMES = {way: f"{way}_flow" for way in ("forward", "backward")}


def deep_png(values):
    """`(H, W, 2)` uint16 as a PNG of grey and alpha; its rows go through PNG's filters but the last in turn."""
    height, width, _ = values.shape
    rows = np.zeros((height + 1, 4 + 4 * width), np.int64)  # a row and a pixel of zeros before the first ones
    rows[1:, 4:] = values.astype(">u2").view(np.uint8).reshape(height, -1)
    own, left, above = rows[1:, 4:], rows[1:, :-4], rows[:-1, 4:]
    filtered = (own, own - left, own - above, own - (left + above) // 2)
    data = b"".join(
        bytes([row % 4]) + (filtered[row % 4][row] % 256).astype(np.uint8).tobytes() for row in range(height)
    )
    chunks = {
        b"IHDR": struct.pack(">2I5B", width, height, 16, 4, 0, 0, 0),
        b"IDAT": zlib.compress(data),
        b"IEND": b"",
    }
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks.items()
    )


def true_flow():
    """A square of 20 pixels that moves 4 pixels to the right in every frame, before what hardly moves."""
    flow = np.random.default_rng(0).uniform(-0.4, 0.4, (T, *SIZE, 2))  # rows and columns
    moving = np.zeros((T, *SIZE), bool)
    for t in range(T):
        moving[t, 12:32, 8 + 4 * t : 28 + 4 * t] = True
    flow[moving] = (0.5, 4)
    return flow, moving


def write_records(folder, *records):
    """A data set of `(features, floats)`, which replace those of a whole record; None leaves one out."""
    flow, _ = true_flow()
    pixels = np.random.default_rng(1).integers(0, 256, (T, *SIZE, 3), dtype=np.uint8)
    folder.mkdir()
    content = b""
    for features, floats in records:
        values = {
            name: np.round((sign * flow - RANGE[0]) / STEP).astype(np.uint16)
            for name, sign in ((NAMES["forward"], 1), (NAMES["backward"], -1))
        }
        images = {"video": list(map(png_bytes, pixels))}
        images |= {name: list(map(deep_png, own)) for name, own in values.items()}
        ranges = {f"metadata/{name}_range": RANGE for name in values}
        parts = [
            {key: value for key, value in {**whole, **other}.items() if value is not None}
            for whole, other in ((images, features), (ranges, floats))
        ]
        content += tfrecord(example(*parts))
    (folder / "movi_e-train.tfrecord-00000-of-00001").write_bytes(content)
    return find("movi", folder, "train")


def test_flow_is_the_records(tmp_path):
    (video,) = write_records(tmp_path / "movi", ({}, {}))
    flow, _ = true_flow()
    frames = list(read_video(video, flow=("forward", "backward")))
    for way, sign in (("forward", 1), ("backward", -1)):
        found = np.stack([frame.flow[way] for frame in frames])
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, sign * flow, atol=0.51 * STEP)
    assert all(frame.flow is None for frame in read_video(video))


@pytest.mark.parametrize("short_side", [None, 96])
def test_segments_are_what_flows_by_itself(tmp_path, short_side):
    videos = write_records(tmp_path / "movi", ({}, {}))
    scale = (short_side or 48) // 48
    clips, report = clip_set(videos, tmp_path, clip_frames=T, motion="dataset", short_side=short_side)
    assert not report.bad
    moving = true_flow()[1].repeat(scale, 1).repeat(scale, 2)
    found = clips.read_motion(clips.shards[0], 0)
    assert ((found == 1) == (found > 0)).all()
    if scale == 1:
        np.testing.assert_array_equal(found, moving)
    else:  # blurred at the edges
        assert ((found > 0) & moving).sum() / ((found > 0) | moving).sum() > 0.95


def test_flow_counts_in_pixels_of_the_frames_as_stored(tmp_path):
    """At half the size the square moves by 2 pixels a frame, which is too little for a segment."""
    videos = write_records(tmp_path / "movi", ({}, {}))
    clips, _ = clip_set(videos, tmp_path, clip_frames=T, motion="dataset", short_side=24)
    assert not clips.read_motion(clips.shards[0], 0).any()


def test_records_whose_flow_can_not_be_used(tmp_path):
    whole = [deep_png(np.zeros((*SIZE, 2), np.uint16))] * T
    key, limits = "forward_flow", "metadata/forward_flow_range"
    videos = write_records(
        tmp_path / "movi",
        ({}, {}),
        ({key: None}, {}),
        ({}, {limits: None}),
        ({key: whole[1:]}, {}),
        ({key: [*whole[1:], whole[0][:60]]}, {}),
        ({key: [png_bytes(np.zeros((*SIZE, 3), np.uint8))] * T}, {}),
        ({key: [deep_png(np.zeros((48, 48, 2), np.uint16))] * T}, {}),
    )
    _, report = clip_set(videos, tmp_path, clip_frames=T, motion="dataset")
    way_out = (
        "and so no optical flow of its own, which the config asks for (clips.motion=dataset, clips.flow=dataset); "
        "nearest valid: clips.motion=flow, clips.flow=none"
    )
    reasons = [entry.reason for entry in report.bad]
    assert reasons[0] == f"it has no feature 'forward_flow', {way_out}"
    assert reasons[1] == f"it has no feature 'metadata/forward_flow_range', {way_out}"
    assert reasons[2] == "has 6 frames, but 5 of forward_flow, whose range has 2 limits; expected 2"
    assert reasons[3].startswith("forward_flow 5 can't be decoded (")
    assert reasons[4].startswith(
        "forward_flow 0 is 64x48 pixels of rgb24, expected 64x48 of two channels of 16 bits"
    )
    assert reasons[5].startswith("forward_flow 0 is 48x48 pixels of ya16be, expected 64x48")
    assert [entry.video_id for entry in report.videos] == [videos[0].video_id]


def test_a_data_set_without_flow():
    with pytest.raises(
        ConfigError, match=r"^clips.motion: dataset is .* dataset.kind=davis lacks; nearest valid: flow"
    ):
        resolve_config({}, ["clips.motion=dataset", "dataset.kind=davis", "dataset.path=D"])
    resolve_config({}, ["clips.motion=dataset", "dataset.kind=movi", "dataset.path=D"])


def test_flow_is_kept_to_be_reconstructed(tmp_path):
    """To the frame before, with or without segments, which are of the flow to the next one; in 16-bit floats."""
    videos = write_records(tmp_path / "movi", ({}, {}), ({"backward_flow": None}, {}))
    clips, report = clip_set(videos, tmp_path, clip_frames=4, flow="dataset", motion="dataset")
    assert [entry.reason.split(",")[0] for entry in report.bad] == ["it has no feature 'backward_flow'"]
    shard, (flow, moving) = clips.shards[0], true_flow()
    found = np.concatenate([clips.read_flow(shard, row) for row in range(2)])
    np.testing.assert_allclose(found, -flow, atol=STEP, rtol=2**-11)
    segments = np.concatenate([clips.read_motion(shard, row) for row in range(2)])
    np.testing.assert_array_equal(segments > 0, moving)
    without, _ = clip_set(videos, tmp_path / "without", clip_frames=4)
    with pytest.raises(ValueError, match=r"no optical flow; make some that do: clips.flow=dataset"):
        without.read_flow(shard, 0)

"""Videos as a player shows them: turned, of unusual pixels, without times, in containers of all kinds."""

import gc
import io
import math
from fractions import Fraction

import av
import numpy as np
import pyarrow.parquet as pq
import pytest
from layout_sets import write_images
from odd_videos import (
    LAST,
    MATRICES,
    ODD,
    QUARTERS,
    Odd,
    add_stream,
    as_ffmpeg_shows,
    has_ffmpeg,
    mux,
    paint,
    set_matrix,
    write_odd,
)
from PIL import Image
from tiny_models import tiny_model
from video_files import picture, write_noise, write_video

from pipeline import storage
from pipeline.clips.sources import BadVideo, VideoRef, read_video
from pipeline.clips.sources import videos as video_folders
from pipeline.clips.sources.container import outline, reads_differently
from pipeline.clips.sources.videos import list_videos
from pipeline.clips.write import write_shard
from pipeline.config import Clips
from pipeline.segment.stage import segment

FAULTS = {
    "mirrored": ("MP4 whose matrix mirrors or transposes", "as ffmpeg shows it"),
    "transposed": ("MP4 whose matrix mirrors or transposes", "as ffmpeg shows it"),
    "null frames in avi": (
        "AVI with null frames",
        "not truncated: the frames that are there, at their times",
    ),
    "h264 with B-frames in avi": ("packets without pts", "frames in order, at times that grow"),
    "h264 bare": ("packets without pts", "frames in order, at times that grow"),
    "pixels 4:3 in mp4": ("pixels that are no squares", "as wide as a player shows them"),
}


def with_faults(names):
    for name in names:
        fault = FAULTS.get(name)
        yield pytest.param(
            name, marks=[pytest.mark.fault(fault[0], "shard, segment", fault[1])] if fault else []
        )


def read(path, **settings):
    return list(read_video(VideoRef("a", str(path)), **settings))


def reason_against(path):
    with pytest.raises(BadVideo) as error:
        read(path)
    return str(error.value)


def assert_shows(pixels, quarters, tolerance=30):
    """The colours (2, 2, 3) in the middle of a picture's quarters."""
    rows, columns = (np.array([n // 4, 3 * n // 4]) for n in pixels.shape[:2])
    np.testing.assert_allclose(pixels[rows][:, columns].astype(int), quarters, atol=tolerance)


def grey(count, step=8):
    return [np.full((48, 64, 3), step * i, np.uint8) for i in range(count)]


# --- the table ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", with_faults(ODD))
def test_odd_videos_are_shown_as_a_player_does(tmp_path, name):
    odd = ODD[name]
    path = write_odd(tmp_path / f"a.{odd.suffix}", odd)
    frames = read(path)
    assert len(frames) == len(odd.at)
    assert {frame.pixels.shape for frame in frames} == {(*odd.shown, 3)}
    times = np.array([frame.seconds - frames[0].seconds for frame in frames])
    np.testing.assert_allclose(times, np.array(odd.at) / float(odd.rate), atol=2e-3)
    for frame, last in ((frames[0], False), (frames[-1], True)):
        assert_shows(frame.pixels, odd.quarters(last), odd.colours)
    assert outline(VideoRef("a", str(path))).size == odd.shown
    if has_ffmpeg():
        expected = as_ffmpeg_shows(path, odd.shown)
        assert len(expected) == len(frames)
        for index in (0, -1):
            assert np.abs(frames[index].pixels.astype(int) - expected[index]).mean() < 3


def test_all_of_them_are_found_and_sharded(tmp_path):
    for number, odd in enumerate(ODD.values()):
        write_odd(tmp_path / f"{number:02d}.{odd.suffix}", odd)
    videos = list_videos(str(tmp_path), "masks")
    report = write_shard(videos, str(tmp_path / "shard.parquet"), Clips(codec="png"))
    assert not report.bad
    found = {entry.video_id: (entry.frames, entry.height, entry.width) for entry in report.videos}
    assert found == {f"{n:02d}": (len(odd.at), *odd.shown) for n, odd in enumerate(ODD.values())}
    rows = {
        (r["video_id"], r["clip_index"]): r for r in pq.read_table(tmp_path / "shard.parquet").to_pylist()
    }
    for number, odd in enumerate(ODD.values()):
        for clip, frame, last in ((0, 0, False), (1, -1, True)):
            pixels = np.asarray(Image.open(io.BytesIO(rows[f"{number:02d}", clip]["frames"][frame])))
            assert_shows(pixels, odd.quarters(last), odd.colours)


@pytest.mark.parametrize("name", ODD)
def test_segment_shows_what_shard_does(tmp_path, name):
    """Labels of every frame as large as it is, and a sheet with its first frame and, where all fit, its last one."""
    odd = ODD[name]
    path = write_odd(tmp_path / f"a.{odd.suffix}", odd)
    model, count = tiny_model().eval(), len(odd.at)
    assert segment(model, path, tmp_path / "out")["frames"] == count
    labels = [Image.open(file) for file in sorted((tmp_path / "out" / "a_labels").glob("*.png"))]
    assert [label.size[::-1] for label in labels] == [odd.shown] * count
    sheet = Image.open(tmp_path / "out" / "a_sheet.png")
    pair = Image.new("RGB", (odd.shown[1], 2 * odd.shown[0]))
    pair.thumbnail((240, 480))
    columns, rows = ((side + 4) // (own + 4) for side, own in zip(sheet.size, pair.size, strict=True))
    for index in {0, count - 1} if columns * rows >= count else {0}:
        left, top = (index % columns) * (pair.width + 4), (index // columns) * (pair.height + 4)
        frame = np.asarray(sheet)[top : top + pair.height // 2, left : left + pair.width]
        assert_shows(frame, odd.quarters(index > 0), odd.colours + 5)


@pytest.mark.parametrize("name", ["transposed", "pixels 4:3, turned"])
def test_the_longest_side_is_that_of_what_is_shown(tmp_path, name):
    odd = ODD[name]
    path, longest = write_odd(tmp_path / f"a.{odd.suffix}", odd), max(odd.shown) // 2
    segment(tiny_model().eval(), path, tmp_path / "out", max_side=longest)
    small = Image.open(sorted((tmp_path / "out" / "a_labels").glob("*.png"))[0]).size[::-1]
    assert np.argmax(small) == np.argmax(odd.shown)
    assert longest - 2 <= max(small) <= longest + 2


# --- turned ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("degrees", "scale", "nearest"),
    [
        (0, 2, "as stored"),
        (0.2, 1, "as stored"),
        (90, 0.5, "turned clockwise"),
        (100, 1, "turned clockwise"),
        (200, 1, "turned by 180"),
    ],
)
def test_a_matrix_that_is_none_of_the_eight_is_taken_for_the_nearest(tmp_path, degrees, scale, nearest):
    path = write_odd(tmp_path / "a.mp4", Odd("mp4", "libx264"))
    c, s = (scale * f(math.radians(degrees)) for f in (math.cos, math.sin))
    set_matrix(path, (c, s, -s, c))
    assert_shows(read(path)[0].pixels, MATRICES[nearest][1](QUARTERS))


def test_a_matrix_of_zeros_is_none(tmp_path):
    path = write_odd(tmp_path / "a.mp4", Odd("mp4", "libx264"))
    set_matrix(path, (0,) * 9)
    assert_shows(read(path)[0].pixels, QUARTERS)


def test_frames_are_not_kept(tmp_path):
    """PyAV's side data and its frame hold each other: 4K frames would pile up until Python collects garbage."""
    path = write_odd(tmp_path / "a.mp4", ODD["transposed"])
    gc.collect()
    gc.disable()
    try:
        before = sum(isinstance(thing, av.VideoFrame) for thing in gc.get_objects())
        kept = [
            sum(isinstance(thing, av.VideoFrame) for thing in gc.get_objects()) - before
            for _ in read_video(VideoRef("a", str(path)))
        ]
    finally:
        gc.enable()
    assert kept[-1] <= kept[1] + 1


def test_frames_with_exif_data_are_read(tmp_path):
    """As cameras write Motion JPEG; PyAV has no name for this kind of side data."""
    exif = Image.Exif()
    exif[0x010F] = "a camera"
    content = io.BytesIO()
    Image.fromarray(paint(QUARTERS, (48, 64))).save(content, "JPEG", exif=exif)
    (tmp_path / "a.mjpeg").write_bytes(content.getvalue() * 3)
    frames = read(tmp_path / "a.mjpeg")
    assert len(frames) == 3
    assert_shows(frames[0].pixels, QUARTERS)


@pytest.mark.parametrize(
    ("matrix", "usual"),
    [
        ("ycgco", "unspecified"),
        ("bt2020c", "bt2020nc"),
        ("smpte2085", "unspecified"),
        ("ictcp", "unspecified"),
    ],
)
def test_colours_by_a_matrix_that_ffmpeg_does_not_convert(tmp_path, matrix, usual):
    for name in (matrix, usual):
        write_odd(tmp_path / f"{name}.mp4", Odd("mp4", "libx264", encoder={"colorspace": name}))
    pixels, expected = (read(tmp_path / f"{name}.mp4")[0].pixels for name in (matrix, usual))
    np.testing.assert_array_equal(pixels, expected)
    refused_before = {v.video_id: reads_differently(v) for v in list_videos(str(tmp_path), "masks")}
    assert refused_before == {matrix: True, usual: False}


# --- pixels that are no squares -----------------------------------------------------------------------------


@pytest.fixture
def wide(tmp_path):
    """A video of 48 x 64 pixels, each half as high as wide."""
    return write_odd(tmp_path / "a.mp4", Odd("mp4", "libx264", aspect=Fraction(2)))


def test_the_short_side_is_that_of_square_pixels(wide):
    assert read(wide, short_side=24)[0].pixels.shape == (24, 64, 3)
    assert read(wide, short_side=24, square=False)[0].pixels.shape == (24, 32, 3)


def test_a_setting_keeps_the_stored_pixels(wide):
    videos = list_videos(str(wide.parent), "masks")
    for setting, width in (("square", 128), ("stored", 64)):
        report = write_shard(videos, str(wide.parent / "shard.parquet"), Clips(pixel_aspect=setting))
        assert [(entry.height, entry.width) for entry in report.videos] == [(48, width)]


@pytest.mark.parametrize("size", [(48, 128), (48, 64), (24, 64), (24, 32)])
@pytest.mark.parametrize("square", [True, False])
def test_masks_of_stored_and_of_square_pixels(wide, size, square):
    masks = np.zeros((8, *size), np.uint8)
    masks[:, :, size[1] // 2 :] = 1
    folder = write_images(wide.parent / "masks" / "a", masks)
    video = VideoRef("a", str(wide), details={"masks": str(folder)})
    frame = next(read_video(video, square=square))
    width = 128 if square else 64
    assert frame.pixels.shape == (48, width, 3)
    np.testing.assert_array_equal(
        frame.masks[1], np.broadcast_to(np.arange(width) >= width // 2, (48, width))
    )


def test_masks_of_no_known_pixels_are_refused(wide):
    folder = write_images(wide.parent / "masks" / "a", np.zeros((8, 48, 48), np.uint8))
    with pytest.raises(BadVideo, match=r"mask 00000\.png is 48x48, its frame 128x48 pixels"):
        next(read_video(VideoRef("a", str(wide), details={"masks": str(folder)})))


# --- several streams --------------------------------------------------------------------------------------


def write_streams(path, *streams):
    """A file of several video streams: of each its side, its colours and what it is (a disposition)."""
    with av.open(str(path), "w") as container:
        made = []
        for side, quarters, disposition in streams:
            odd = Odd("mkv", "libx264", size=(side, side), stored=quarters, at=(0, 1, 2))
            stream = add_stream(container, odd)
            stream.disposition = disposition
            made.append((stream, odd))
        for stream, odd in made:
            mux(container, stream, odd)
    return path


NONE, DEFAULT, ATTACHED = 0, av.stream.Disposition.default, av.stream.Disposition.attached_pic


@pytest.mark.parametrize(
    ("streams", "side"),
    [
        ([(32, LAST, NONE), (64, QUARTERS, NONE)], 64),
        ([(64, LAST, NONE), (32, QUARTERS, DEFAULT)], 32),
        ([(64, QUARTERS, NONE), (64, LAST, NONE)], 64),
        ([(32, QUARTERS, DEFAULT), (64, LAST, NONE)], 32),
        ([(32, LAST, DEFAULT), (64, QUARTERS, DEFAULT)], 64),
    ],
)
def test_the_stream_that_ffmpeg_takes_is_shown(tmp_path, streams, side):
    path = write_streams(tmp_path / "a.mkv", *streams)
    frames = read(path)
    assert {frame.pixels.shape for frame in frames} == {(side, side, 3)}
    assert_shows(frames[0].pixels, QUARTERS)
    assert outline(VideoRef("a", str(path))).size == (side, side)
    if has_ffmpeg():
        expected = as_ffmpeg_shows(path, (side, side))
        assert np.abs(frames[0].pixels.astype(int) - expected[0]).mean() < 3


def test_a_cover_is_no_video(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        cover = add_stream(container, Odd("mp4", "mjpeg", "yuvj420p", size=(128, 128), at=(0,)))
        cover.disposition = ATTACHED
        shown = add_stream(container, Odd("mp4", "libx264"))
        mux(container, cover, Odd("mp4", "mjpeg", "yuvj420p", size=(128, 128), stored=LAST, at=(0,)))
        mux(container, shown, Odd("mp4", "libx264"))
    frames = read(tmp_path / "a.mp4")
    assert len(frames) == 8
    assert_shows(frames[0].pixels, QUARTERS)


# --- times, and where a file ends -----------------------------------------------------------------------------


@pytest.mark.fault("packets without pts", "shard", "clips.fps takes frames 0, 2, 4, …")
@pytest.mark.parametrize(("suffix", "rate"), [("avi", 10), ("h264", 10), ("mp4", 10)])
def test_every_other_frame_of_b_frames(tmp_path, suffix, rate):
    path = write_video(tmp_path / f"a.{suffix}", grey(30), rate=rate)
    kept = read(path, fps=rate / 2)
    np.testing.assert_allclose([f.pixels.mean() for f in kept], np.arange(0, 30, 2) * 8, atol=3)
    np.testing.assert_allclose(np.diff([f.seconds for f in kept]), 2 / rate)


@pytest.mark.parametrize("b_frames", [1, 2])
def test_a_packed_bitstream_in_avi(tmp_path, b_frames):
    """As DivX and Xvid write B-frames: the first in one packet with the frame behind them, then one of no picture."""
    encoder = av.CodecContext.create("mpeg4", "w")
    encoder.width, encoder.height, encoder.pix_fmt, encoder.framerate = 64, 48, "yuv420p", 10
    encoder.time_base, encoder.max_b_frames = Fraction(1, 10), b_frames
    encoder.options = {"b_strategy": "0", "g": "100", "sc_threshold": "1000000000"}
    packets = []
    for index, pixels in enumerate(grey(19)):
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format="yuv420p")
        frame.pts = index
        packets += map(bytes, encoder.encode(frame))
    packets += map(bytes, encoder.encode(None))
    begins = b"\0\0\1\xb6"  # a picture, of the kind that the next two bits say
    stored = [packets[0].replace(begins, b"\0\0\1\xb2DivX503b1393p" + begins, 1)]
    for group in (packets[n : n + b_frames + 1] for n in range(1, len(packets), b_frames + 1)):
        assert [packet[packet.index(begins) + 4] >> 6 for packet in group] == [1] + [2] * b_frames
        stored += [group[0] + group[1], *group[2:], begins + b"\x53\x9f"]
    with av.open(str(tmp_path / "a.avi"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.start_encoding()
        for index, content in enumerate(stored):
            packet = av.Packet(content)
            packet.pts = packet.dts = index
            packet.time_base, packet.stream, packet.is_keyframe = Fraction(1, 10), stream, index == 0
            container.mux(packet)
    frames = read(tmp_path / "a.avi")
    np.testing.assert_allclose([f.pixels.mean() for f in frames], np.arange(19) * 8, atol=4)
    np.testing.assert_allclose(np.diff([f.seconds for f in frames]), 0.1)


def test_b_frames_in_an_mp4_without_times_of_display(tmp_path):
    """As broken muxers write it: of each frame just how long it is there (`stts`, without `ctts`)."""
    path = write_video(tmp_path / "a.mp4", grey(30), rate=10)
    path.write_bytes(path.read_bytes().replace(b"ctts", b"free").replace(b"edts", b"free"))
    frames = read(path, fps=5)
    np.testing.assert_allclose([f.pixels.mean() for f in frames], np.arange(0, 30, 2) * 8, atol=3)


def test_times_grow_where_recordings_are_joined(tmp_path):
    parts = [write_video(tmp_path / f"{n}.ts", grey(10)).read_bytes() for n in (1, 2)]
    (tmp_path / "joined.ts").write_bytes(b"".join(parts))
    times = [frame.seconds for frame in read(tmp_path / "joined.ts")]
    np.testing.assert_allclose(np.diff(times), 0.1, atol=1e-6)
    assert len(times) == 20


def test_a_recording_begins_with_its_first_key_frame(tmp_path):
    path = write_noise(tmp_path / "a.ts", 40, codec="mpeg2video", rate=25)
    content = path.read_bytes()
    (tmp_path / "b.ts").write_bytes(content[188 * (len(content) // 188 // 3) :])
    whole, part = ([f.pixels for f in read(tmp_path / name)] for name in ("a.ts", "b.ts"))
    assert 20 <= len(part) < 40
    np.testing.assert_array_equal(part[-1], whole[-1])


@pytest.mark.parametrize("at", [(0, 1, 5, 6, 7, 8), (0, 1, 2, 3, 9, 10)])
@pytest.mark.parametrize("share", [0.5, 0.8, 0.95])
def test_an_avi_with_null_frames_can_still_be_cut(tmp_path, at, share):
    path = write_odd(tmp_path / "a.avi", Odd("avi", "mpeg4", at=at))
    assert len(read(path)) == len(at)
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == at[-1] + 1
    content = path.read_bytes()
    data = content.index(b"movi"), content.index(b"idx1")
    path.write_bytes(content[: int(data[0] + share * (data[1] - data[0]))])
    reason_against(path)


def test_an_avi_that_was_written_into_a_pipe_is_whole(tmp_path, place):
    """Its header has no true size, and counts 2^30 frames."""
    written = []

    class Pipe:
        def write(self, part):
            written.append(bytes(part))
            return len(part)

    odd = Odd("avi", "mpeg4")
    with av.open(Pipe(), "w", format="avi") as container:
        mux(container, add_stream(container, odd), odd)
    storage.write_bytes(storage.join(place, "a.avi"), b"".join(written))
    (video,) = list_videos(place, "masks")
    assert len(list(read_video(video))) == 8
    assert outline(video).frames is None
    assert reads_differently(video), "the first reader took it for a cut one"


@pytest.mark.parametrize("codec", ["mjpeg", "libx264"])
def test_null_frames_in_avi_keep_their_place(tmp_path, codec):
    """H.264 in AVI gets times from libav that are those of the next packet."""
    at = (0, 1, 2, 3, 4, 14, 15, 16, 25)
    odd = Odd("avi", codec, "yuvj420p" if codec == "mjpeg" else "yuv420p", at=at, encoder={"bf": "0"})
    frames = read(write_odd(tmp_path / "a.avi", odd))
    np.testing.assert_allclose(np.diff([f.seconds for f in frames]), np.diff(at) / 10)


def test_an_avi_may_end_with_null_frames(tmp_path, place):
    path = write_odd(tmp_path / "a.avi", Odd("avi", "mpeg4", at=(0, 1, 2, 3)))
    content = bytearray(path.read_bytes())
    header = content.index(b"strh") + 8 + 32  # its length, in frames
    assert content[header : header + 4] == (4).to_bytes(4, "little")
    content[header : header + 4] = (9).to_bytes(4, "little")
    storage.write_bytes(storage.join(place, "a.avi"), bytes(content))
    (video,) = list_videos(place, "masks")
    assert len(list(read_video(video))) == 4


def test_frames_that_are_edited_away_are_not_missing(tmp_path):
    """As a phone trims: the first and the last frames stay in the file, and its edit list leaves them out."""
    path = write_video(tmp_path / "a.mp4", grey(30), rate=10)
    content = bytearray(path.read_bytes())
    entry = content.index(b"elst") + 12  # ISO 14496-12: duration (ms here), then the first time that is shown
    media_time = int.from_bytes(content[entry + 4 : entry + 8], "big")
    with av.open(str(path)) as container:
        ticks = container.streams.video[0].time_base.denominator
    content[entry : entry + 8] = (1500).to_bytes(4, "big") + (media_time + ticks // 2).to_bytes(4, "big")
    path.write_bytes(content)
    shown = read(path)
    np.testing.assert_allclose([f.pixels.mean() for f in shown], np.arange(5, 20) * 8, atol=3)


@pytest.mark.fault("the size changes in mid-stream", "shard, segment", "both say from what to what")
def test_shard_and_segment_name_a_size_that_changes(tmp_path):
    parts = [write_video(tmp_path / f"{n}.ts", [picture(n, 2 * n)] * 3).read_bytes() for n in (32, 64)]
    path = tmp_path / "a.ts"
    path.write_bytes(b"".join(parts))
    said = "its frame size changes from (64, 32) to (128, 64) (width, height) at frame 3"
    report = write_shard([VideoRef("a", str(path))], str(tmp_path / "shard.parquet"), Clips())
    assert [entry.reason for entry in report.bad] == [said]
    with pytest.raises(BadVideo) as error:
        segment(tiny_model().eval(), path, tmp_path / "out")
    assert str(error.value) == said


# --- identity ----------------------------------------------------------------------------------------------

SAME = [
    "h264 in mp4",
    "hevc in mp4",
    "h264 in mov",
    "h264 in mkv",
    "vp9 in webm",
    "mpeg4 with B-frames in avi",
]
SAME += ["mjpeg in avi", "turned by 180", "turned clockwise", "turned counter-clockwise", "as stored"]
SAME += [
    "a variable rate in mkv",
    "h264 in fragments",
    "vp8 in webm",
    "h264 without B-frames in avi",
    "hevc of 10 bits",
]
OTHER = ["mirrored", "upside down", "transposed", "transposed the other way", "pixels 4:3 in mp4"]
OTHER += ["pixels 1:2 in mkv", "null frames in avi", "h264 with B-frames in avi"]


@pytest.mark.parametrize("name", [*SAME, *OTHER])
def test_only_what_is_read_otherwise_has_another_content(tmp_path, name):
    """The content of the first release, a hash of the file's name and bytes, else has its clips made again."""
    odd = ODD[name]
    path = write_odd(tmp_path / f"a.{odd.suffix}", odd)
    (video,) = list_videos(str(tmp_path), "masks")
    first = storage.fingerprint([(path.name, storage.hash_file(str(path)))])
    assert video.content == (first if name in SAME else storage.fingerprint(["reader 2", first]))


def test_a_second_stream_that_is_shown_changes_the_content(tmp_path):
    path = write_streams(tmp_path / "a.mkv", (32, LAST, NONE), (64, QUARTERS, NONE))
    (video,) = list_videos(str(tmp_path), "masks")
    assert video.content != storage.fingerprint([(path.name, storage.hash_file(str(path)))])


def test_a_file_that_cannot_be_read_has_its_first_content(tmp_path):
    path = write_odd(tmp_path / "a.avi", ODD["null frames in avi"])
    path.write_bytes(path.read_bytes()[:-4000])
    (tmp_path / "b.mp4").write_text("no video")
    for video in list_videos(str(tmp_path), "masks"):
        file = tmp_path / storage.name(video.path)
        assert video.content == storage.fingerprint([(file.name, storage.hash_file(str(file)))])


def test_files_are_opened_once(tmp_path, monkeypatch, place):
    opened = []
    monkeypatch.setattr(video_folders, "reads_differently", lambda video: opened.append(video.path) or False)
    path = write_odd(tmp_path / "a.mp4", ODD["h264 in mp4"])
    for name in ("a.mp4", "b.ts"):
        storage.write_bytes(storage.join(place, "videos", name), path.read_bytes())
    for _ in range(2):
        list_videos(storage.join(place, "videos"), "masks", memo_uri=storage.join(place, "memo.json"))
    assert opened == [storage.join(place, "videos", "a.mp4")], "no earlier reader knew of the other"


@pytest.mark.parametrize("name", ["a.mkv", "a.webm", "a.mp4"])
def test_a_video_that_begins_late_is_whole(tmp_path, name):
    """Matroska's duration counts from 0, whenever its first frame is; a cut one is still refused."""
    pts = [60 + index for index in range(20)]
    codec = "libvpx" if name.endswith("webm") else "libx264"
    path = write_noise(tmp_path / name, 20, pts=pts, codec=codec)
    frames = list(read_video(VideoRef("a", str(path))))
    seconds = [frame.seconds - frames[0].seconds for frame in frames]
    assert seconds == pytest.approx([index / 10 for index in range(20)], abs=0.002)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    with pytest.raises(BadVideo):
        list(read_video(VideoRef("a", str(path))))

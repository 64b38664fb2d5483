"""Reading folders of video files and of frames: what is decoded, and what is set aside and why."""

import itertools
import re
import struct
from pathlib import Path

import av
import numpy as np
import pytest
from layout_sets import write_images
from PIL import Image
from video_files import BLUE, RED, WHITE, picture, write_noise, write_video

from pipeline import storage
from pipeline.clips.sources import BadVideo, VideoRef, read_video
from pipeline.clips.sources.files import natural_key
from pipeline.clips.sources.videos import list_videos


def read(path, masks=None, **settings):
    details = {"masks": str(masks)} if masks else {}
    return list(read_video(VideoRef("video", str(path), details=details), **settings))


def reason_against(path, masks=None, **settings):
    with pytest.raises(BadVideo) as error:
        read(path, masks, **settings)
    reason = str(error.value)
    assert "\n" not in reason
    assert "Errno" not in reason
    assert str(path.parent) not in reason, "reasons must not hold paths of this machine"
    return reason


def assert_colour(pixel, expected):
    np.testing.assert_allclose(pixel, expected, atol=12)


# --- video files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bikes", "bigbuckbunny", "carphone_pristine"])
def test_real_videos_have_the_frames_that_pyav_counts(real_videos, name):
    with av.open(str(real_videos[name])) as container:
        stream = container.streams.video[0]
        size = (stream.height, stream.width)
        times = [frame.time for frame in container.decode(video=0)]
    scale = 36 / min(size)
    count = 0
    frames = read_video(VideoRef(name, str(real_videos[name])), short_side=36, square=False)
    for frame, seconds in zip(frames, times, strict=True):
        assert frame.pixels.shape == (round(size[0] * scale), round(size[1] * scale), 3)
        assert frame.seconds == pytest.approx(seconds)
        count += 1
    assert count == len(times) > 100


def test_real_video_pixels_equal_pyavs(real_videos):
    with av.open(str(real_videos["carphone_pristine"])) as container:
        expected = next(container.decode(video=0)).to_ndarray(format="rgb24")
    frame = next(read_video(VideoRef("x", str(real_videos["carphone_pristine"])), square=False))
    assert np.abs(frame.pixels.astype(int) - expected).mean() < 1  # another rounding in the conversion


CONTAINERS = {"libx264": "mp4 mkv mov m4v", "libx265": "mp4", "libvpx-vp9": "webm", "libsvtav1": "mp4"}
CONTAINERS |= {"libaom-av1": "mkv", "mpeg4": "avi", "mjpeg": "avi"}


@pytest.mark.parametrize(
    ("codec", "suffix"), [(c, s) for c, names in CONTAINERS.items() for s in names.split()]
)
def test_codecs_and_containers(tmp_path, codec, suffix):
    try:
        av.codec.Codec(codec, "w")
    except av.codec.codec.UnknownCodecError:
        pytest.skip(f"this PyAV has no encoder {codec}")
    pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    path = write_video(tmp_path / f"a.{suffix}", [picture()] * 10, codec, pix_fmt)
    frames = read(path)
    assert len(frames) == 10
    np.testing.assert_allclose([f.seconds - frames[0].seconds for f in frames], np.arange(10) / 10, atol=2e-3)
    for frame in frames:
        assert frame.pixels.shape == (64, 96, 3)
        assert frame.pixels.dtype == np.uint8
        assert frame.masks is None
        assert_colour(frame.pixels[5, 5], WHITE)
        assert_colour(frame.pixels[50, 20], RED)
        assert_colour(frame.pixels[50, 80], BLUE)


def test_frames_come_in_display_order(tmp_path):
    """Encoders reorder frames (B-frames); every frame of this one is brighter than the last."""
    frames = [np.full((64, 64, 3), 10 * i, np.uint8) for i in range(25)]
    brightness = [f.pixels.mean() for f in read(write_video(tmp_path / "a.mp4", frames))]
    np.testing.assert_allclose(brightness, np.arange(25) * 10, atol=3)


@pytest.mark.parametrize(("height", "width"), [(63, 95), (97, 33)])
def test_odd_sizes(tmp_path, height, width):
    path = write_video(tmp_path / "a.mp4", [picture(height, width)] * 3, pix_fmt="yuv444p")
    assert {f.pixels.shape for f in read(path)} == {(height, width, 3)}


@pytest.mark.parametrize(
    ("size", "short_side", "expected"),
    [((64, 96), 32, (32, 48)), ((96, 64), 32, (48, 32)), ((64, 96), 80, (80, 120)), ((64, 96), 64, (64, 96))],
)
def test_short_side(tmp_path, size, short_side, expected):
    frames = read(write_video(tmp_path / "a.mp4", [picture(*size)] * 2), short_side=short_side)
    assert frames[0].pixels.shape[:2] == expected
    assert_colour(frames[0].pixels[-4, 4], RED)
    assert_colour(frames[0].pixels[-4, -4], BLUE)


def test_rotation_metadata(tmp_path):
    """A display matrix that says "turn by n degrees counter-clockwise" is obeyed."""
    plain, *turned = (
        read(write_video(tmp_path / f"{degrees}.mp4", [picture()] * 2, rotation=degrees))[0].pixels
        for degrees in (None, 90, 180, 270)
    )
    for quarters, pixels in enumerate(turned, 1):
        np.testing.assert_allclose(pixels, np.rot90(plain, quarters), atol=1)


def test_rotation_of_a_phone_video(tmp_path):
    """The header a phone writes when held upright: its matrix turns the picture clockwise."""
    path = write_video(tmp_path / "phone.mp4", [picture()] * 2)
    content = bytearray(path.read_bytes())
    matrix = content.index(b"tkhd") + 4 + 40  # ISO 14496-12: behind version, times, ids, layer and volume
    identity = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    assert content[matrix : matrix + 36] == identity
    content[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 64 << 16, 0, 1 << 30)
    path.write_bytes(content)
    pixels = read(path, short_side=32)[0].pixels
    assert pixels.shape == (48, 32, 3)
    assert_colour(pixels[2, -3], WHITE)  # the top left corner is now at the top right
    assert_colour(pixels[5, 5], RED)
    assert_colour(pixels[-5, 5], BLUE)


def test_target_fps_of_a_steady_video(tmp_path):
    frames = [np.full((64, 64, 3), 20 * i, np.uint8) for i in range(10)]
    path = write_video(tmp_path / "a.mp4", frames)  # 10 a second
    half = read(path, fps=5)
    np.testing.assert_allclose([f.pixels.mean() for f in half], [0, 40, 80, 120, 160], atol=3)
    np.testing.assert_allclose([f.seconds for f in half], [0, 0.2, 0.4, 0.6, 0.8])
    doubled = [f.pixels.mean() for f in read(path, fps=20)]
    np.testing.assert_allclose(doubled[:6], [0, 0, 20, 20, 40, 40], atol=3)


def test_target_fps_of_a_variable_frame_rate_video(tmp_path):
    """Every kept frame is the one on display at that time."""
    times = [0, 1, 2, 10, 11, 20]  # tenths of a second
    frames = [np.full((64, 64, 3), 40 * i, np.uint8) for i in range(6)]
    path = write_video(tmp_path / "a.mkv", frames, pts=times)
    kept = read(path, fps=4)
    assert [f.seconds for f in kept] == pytest.approx([0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2])
    on_display = [0, 2, 2, 2, 3, 4, 4, 4, 5]
    np.testing.assert_allclose([f.pixels.mean() for f in kept], np.multiply(on_display, 40), atol=3)
    assert len(read(path)) == 6


def test_max_seconds(tmp_path):
    path = write_video(tmp_path / "a.mp4", [picture()] * 30)
    assert len(read(path, max_seconds=1.5)) == 15
    assert len(read(path, max_seconds=1.5, fps=4)) == 6
    assert len(read(path, max_seconds=100)) == 30


def test_frames_are_read_one_at_a_time(tmp_path):
    """The first frames of a cut file come out before its end is reached."""
    path = write_noise(tmp_path / "a.mkv", 100)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    frames = read_video(VideoRef("a", str(path)))
    assert len(list(itertools.islice(frames, 20))) == 20
    with pytest.raises(BadVideo, match="truncated"):
        list(frames)


def test_a_frame_size_that_changes_is_named(tmp_path):
    parts = [write_video(tmp_path / f"{n}.ts", [picture(n, 2 * n)] * 3).read_bytes() for n in (32, 64)]
    (tmp_path / "joined.ts").write_bytes(b"".join(parts))
    reason = reason_against(tmp_path / "joined.ts")
    assert reason == "its frame size changes from (64, 32) to (128, 64) (width, height) at frame 3"


# --- bad files ----------------------------------------------------------------------------------------


@pytest.fixture
def text(tmp_path):
    (tmp_path / "a.mp4").write_text("I am no video\n" * 100)
    return tmp_path / "a.mp4"


def test_text_file(text, capfd):
    """FFmpeg's own complaints would fill a job's log; the reason is all there is."""
    capfd.readouterr()
    assert reason_against(text) == "can't be decoded (Invalid data found when processing input)"
    assert capfd.readouterr() == ("", "")


def test_empty_and_missing_files(tmp_path):
    (tmp_path / "a.mp4").touch()
    assert reason_against(tmp_path / "a.mp4") == "the file is empty"
    assert "No such file" in reason_against(tmp_path / "gone.mp4")


@pytest.mark.parametrize(
    ("suffix", "codec", "options"),
    [
        ("mp4", "libx264", {}),  # the table of contents is at the end: nothing can be read
        ("mp4", "libx264", {"movflags": "faststart"}),  # at the start: the first half can be
        ("mkv", "libx264", {}),
        ("webm", "libvpx-vp9", {}),
        ("avi", "mpeg4", {}),
        ("wmv", "wmv2", {}),
    ],
)
@pytest.mark.parametrize("share", [0.02, 0.5, 0.8])
def test_truncated_file(tmp_path, suffix, codec, options, share):
    path = write_noise(tmp_path / f"a.{suffix}", 60, codec=codec, **options)
    assert len(read(path)) == 60
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    reason_against(path)


def test_truncation_says_how_much_is_there(tmp_path):
    path = write_noise(tmp_path / "a.mkv", 100)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert re.fullmatch(r"truncated: [3-6]\.\d of 10\.0 seconds are there", reason_against(path))


@pytest.mark.parametrize(("suffix", "codec"), [("mp4", "aac"), ("mkv", "flac")])
def test_audio_only_file(tmp_path, suffix, codec):
    path = tmp_path / f"a.{suffix}"
    sample = {"aac": ("fltp", np.float32), "flac": ("s16", np.int16)}[codec]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=44100, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), sample[1]), format=sample[0], layout="mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert reason_against(path) == "the file has no video stream"


# --- folders of frames ----------------------------------------------------------------------------------


def test_frame_folder_is_read_in_natural_order(tmp_path):
    shades = [np.full((8, 12, 3), 10 * i, np.uint8) for i in range(12)]
    folder = write_images(tmp_path / "v", shades, "frame{}.png")
    (folder / "notes.txt").write_text("not a frame")
    frames = read(folder)
    assert [int(f.pixels[0, 0, 0]) for f in frames] == [10 * i for i in range(12)]
    assert frames[0].pixels.shape == (8, 12, 3)
    assert read(folder, short_side=4)[0].pixels.shape == (4, 6, 3)


@pytest.mark.fault("frames in WebP, BMP and PNG", "shard, videos", "read pixel by pixel")
@pytest.mark.parametrize("suffix", ["webp", "bmp", "png", "jpe", "jfif"])
def test_frame_folder_in_every_picture_format(suffix, tmp_path):
    (tmp_path / "v").mkdir()
    path = tmp_path / f"v/0.{suffix.upper()}"
    Image.fromarray(picture(8, 12)).save(path, lossless=True)
    pixels = read(tmp_path / "v")[0].pixels
    np.testing.assert_array_equal(pixels, np.asarray(Image.open(path).convert("RGB")))
    np.testing.assert_allclose(pixels[0, 0], picture(8, 12)[0, 0], atol=40)


def test_frame_folder_with_grey_and_transparent_frames(tmp_path):
    folder = tmp_path / "v"
    folder.mkdir()
    Image.new("L", (6, 4), 100).save(folder / "0.png")
    Image.new("RGBA", (6, 4), (1, 2, 3, 4)).save(folder / "1.png")
    frames = read(folder)
    assert [f.pixels.shape for f in frames] == [(4, 6, 3)] * 2
    assert frames[0].pixels[0, 0].tolist() == [100] * 3


def test_frame_folder_of_differing_sizes(tmp_path):
    folder = write_images(tmp_path / "v", [picture(8, 12), picture(8, 12), picture(8, 10)])
    reason = reason_against(folder)
    assert reason == "its frame size changes from (12, 8) to (10, 8) (width, height) at frame 00002.png"


def test_frame_folder_with_a_broken_frame(tmp_path):
    folder = write_images(tmp_path / "v", [picture(8, 12)] * 3)
    (folder / "00001.png").write_bytes(b"no image")
    assert reason_against(folder) == "frame 00001.png can't be decoded (cannot identify image file)"
    (folder / "00001.png").write_bytes((folder / "00000.png").read_bytes()[:60])
    assert "00001.png" in reason_against(folder)


# --- masks ------------------------------------------------------------------------------------------------


@pytest.fixture
def labels():
    """Three frames: two objects, one of them and void, none."""
    labels = np.zeros((3, 64, 96), np.uint8)
    labels[0, :16, :16], labels[0, 32:, 48:] = 3, 7
    labels[1, 8:24, 8:24], labels[1, 40:, :] = 3, 255
    return labels


@pytest.fixture
def video(tmp_path):
    return write_video(tmp_path / "a.mp4", [picture()] * 3)


def test_masks(video, tmp_path, labels):
    frames = read(video, write_images(tmp_path / "masks" / "a", labels))
    assert [sorted(f.masks) for f in frames] == [[3, 7], [3], []]
    for frame, label in zip(frames, labels, strict=True):
        for object_id, mask in frame.masks.items():
            assert mask.dtype == bool
            np.testing.assert_array_equal(mask, label == object_id)


def test_masks_follow_the_resized_frames(video, tmp_path, labels):
    frames = read(video, write_images(tmp_path / "masks", labels), short_side=32)
    assert frames[0].masks[3].shape == (32, 48)
    np.testing.assert_array_equal(frames[0].masks[7], labels[0, ::2, ::2] == 7)


def test_masks_stay_with_their_frames_when_frames_are_dropped(video, tmp_path, labels):
    frames = read(video, write_images(tmp_path / "masks", labels), fps=5)
    assert [sorted(f.masks) for f in frames] == [[3, 7], []]


@pytest.mark.parametrize(
    ("masks", "expected"), [(2, "has more frames than masks (2)"), (4, "has 3 frames but 4 masks")]
)
def test_too_few_or_many_masks(video, tmp_path, masks, expected):
    folder = write_images(tmp_path / "masks", np.zeros((masks, 64, 96), np.uint8))
    assert reason_against(video, folder) == expected


def test_mask_of_another_shape(video, tmp_path):
    folder = write_images(tmp_path / "masks", np.zeros((1, 64, 64), np.uint8))
    assert reason_against(video, folder) == "mask 00000.png is 64x64, its frame 96x64 pixels"


def test_mask_that_a_lossy_format_has_changed(video, tmp_path, labels):
    folder = write_images(tmp_path / "masks", labels[:1], "{}.jpg")
    assert reason_against(video, folder) == "mask 0.jpg is a JPEG, which does not keep labels; save it as PNG"


def test_masks_in_a_format_that_is_not_read(video, tmp_path, labels):
    folder = tmp_path / "masks/v"
    folder.mkdir(parents=True)
    for index, label in enumerate(labels):
        Image.fromarray(label).save(folder / f"{index}.tif")
    with pytest.raises(
        BadVideo, match=r"its masks are in a format that is not read \(0\.tif, …\); save them as PNG"
    ):
        next(read_video(VideoRef("v", str(video), details={"masks": str(folder)})))


def test_masks_are_resized_as_in_the_first_release(tmp_path):
    """4 / 3 pixels of a mask for each of a frame: every third centre lies between two of them, and rounding decides."""
    labels = np.broadcast_to(np.arange(1, 49, dtype=np.uint8), (1, 48, 48))
    video = write_video(tmp_path / "a.mp4", [picture(48, 48)])
    frames = read(video, write_images(tmp_path / "masks", labels), short_side=36)
    seen = np.zeros((36, 36), int)
    for object_id, mask in frames[0].masks.items():
        seen[mask] = object_id
    pillow = Image.fromarray(labels[0]).resize((36, 36), Image.Resampling.NEAREST)
    np.testing.assert_array_equal(seen, pillow)
    assert seen[0, :6].tolist() == [1, 3, 4, 5, 6, 8]


def test_masks_of_another_size_and_the_frames_shape(tmp_path, labels):
    video = write_video(tmp_path / "a.mp4", [picture(32, 48)] * 3)
    frames = read(video, write_images(tmp_path / "masks", labels, "{}.bmp"))
    np.testing.assert_array_equal(frames[0].masks[7], labels[0, 1::2, 1::2] == 7)


# --- finding videos -----------------------------------------------------------------------------------------


def test_list_videos(tmp_path):
    for name in ("b.mp4", "a.MKV", "deep/er/c.webm", "notes.txt", ".hidden.mp4", ".git/d.mp4"):
        storage.write_bytes(str(tmp_path / name), name.encode())
    write_images(tmp_path / "frames" / "one", [picture(4, 6)])
    write_images(tmp_path / "masks" / "b", np.zeros((1, 4, 6), np.uint8))
    videos = list_videos(str(tmp_path), "masks")
    assert [v.video_id for v in videos] == ["a", "b", "deep/er/c", "frames/one"]
    assert [v.details.get("masks") for v in videos] == [None, str(tmp_path / "masks" / "b"), None, None]
    assert videos[0].path == str(tmp_path / "a.MKV")
    assert videos[1].bytes == 5


def test_content_follows_the_bytes_and_not_the_place(tmp_path):
    """Equal videos in another folder are equal work; changed bytes or masks are not."""

    def contents(folder):
        return [v.content for v in list_videos(str(folder), "masks")]

    for folder in (tmp_path / "here", tmp_path / "there"):
        folder.mkdir()
        (folder / "a.mp4").write_bytes(b"some video")
        write_images(folder / "masks" / "a", np.zeros((1, 4, 6), np.uint8))
    before = contents(tmp_path / "here")
    assert before == contents(tmp_path / "there")
    Image.fromarray(np.ones((4, 6), np.uint8)).save(tmp_path / "there" / "masks" / "a" / "00000.png")
    with_other_masks = contents(tmp_path / "there")
    (tmp_path / "there" / "a.mp4").write_bytes(b"some_video")
    assert len({*before, *with_other_masks, *contents(tmp_path / "there")}) == 3


def test_two_videos_of_one_name(place):
    for name in ("a.mp4", "a.mkv"):
        storage.write_bytes(storage.join(place, name), b"x")
    with pytest.raises(ValueError, match="would both be the video 'a'; rename one"):
        list_videos(place, "masks")


def test_no_videos(tmp_path):
    (tmp_path / "notes.txt").write_text("no video")
    with pytest.raises(FileNotFoundError, match="no video in"):
        list_videos(str(tmp_path), "masks")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        list_videos(str(tmp_path / "nowhere"), "masks")


def test_a_dangling_link_does_not_stop_the_others(tmp_path):
    write_video(tmp_path / "a.mp4", [picture()])
    (tmp_path / "b.mp4").symlink_to(tmp_path / "gone.mp4")
    good, dangling = list_videos(str(tmp_path), "masks")
    assert len(read(good.path)) == 1
    assert "No such file" in reason_against(Path(dangling.path))


def test_natural_key():
    names = ["frame10", "frame9", "frame1", "10", "2", "a2b10", "a2b9", "x²"]
    assert sorted(names, key=natural_key) == ["2", "10", "a2b9", "a2b10", "frame1", "frame9", "frame10", "x²"]


def test_ffmpeg_does_not_call_into_python(text):
    """PyAV's own log callback waits for the GIL and has stopped Ray workers for good."""
    with pytest.raises(BadVideo) as error:
        read(text)
    assert error.value.__cause__.log is None  # PyAV knows no line of FFmpeg's log


def test_masks_and_the_evaluation_folder_are_no_training_videos(tmp_path):
    for path in ("a.mp4", "val/x.mp4", "val/masks/x/00000.png", "deep/masks/y/00000.png", "deep/b.mp4"):
        storage.write_bytes(str(tmp_path / path), b"x")
    assert [v.video_id for v in list_videos(str(tmp_path), "masks")] == ["a", "deep/b", "val/x"]
    assert [v.video_id for v in list_videos(str(tmp_path), "masks", exclude="val")] == ["a", "deep/b"]


def test_remembered_hashes_follow_changes(tmp_path):
    folder, memo = tmp_path / "videos", str(tmp_path / "memo.json")
    folder.mkdir()
    (folder / "a.mp4").write_bytes(b"one")
    first = list_videos(str(folder), "masks", memo_uri=memo)
    assert list_videos(str(folder), "masks", memo_uri=memo) == first == list_videos(str(folder), "masks")
    (folder / "a.mp4").write_bytes(b"two")
    assert list_videos(str(folder), "masks", memo_uri=memo)[0].content != first[0].content

"""Overlay videos: playable while they download, at the source's times, with its sound, by the encoders there are."""

import os
import shutil
import struct
import subprocess
from fractions import Fraction

import av
import numpy as np
import pytest
from tiny_models import tiny_model
from video_files import BLUE, RED, WHITE, picture, write_noise

from pipeline import storage
from pipeline.clips.sources import BadVideo, VideoRef
from pipeline.segment import video_writer
from pipeline.segment.stage import segment
from pipeline.segment.video_writer import VideoWriter
from pipeline.storage import StorageError

EVEN = tuple(i / 10 for i in range(20))
UNEVEN = (0.0, 0.1, 0.2, 0.24, 0.4, 10.4, 10.5, 10.75)
LAST = 0.3  # seconds that a last frame is shown
CLICK = 0.5  # seconds from a sound's start to the one that is heard in it
CODECS = {".webm": "libvpx-vp9", ".flv": "flv"}


@pytest.fixture
def model():
    return tiny_model().eval()


def write(path, times=EVEN, sounds=(), starts=0.0, seconds=1.0):
    """A video with frames at `times`, and a click in each of its sounds: (encoder, samples a second, layout)."""
    unit = Fraction(1, 10) if path.suffix == ".avi" else Fraction(1, 1000)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(CODECS.get(path.suffix, "mpeg4"), rate=10, width=96, height=64)
        stream.codec_context.time_base = unit
        tracks = [container.add_stream(encoder, rate=rate, layout=layout) for encoder, rate, layout in sounds]
        if len(tracks) > 1:  # the last is the one to be heard
            tracks[-1].disposition = av.stream.Disposition.default
        packets = []
        for index, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(picture(shade=index), format="rgb24")
            frame.pts, frame.time_base = round(time / unit), unit
            packets += stream.encode(frame)
        packets += stream.encode()
        packets[-1].duration = 1 if path.suffix == ".avi" else round(LAST / unit)
        for track in tracks:
            packets += _encode_click(track, starts, seconds)
        for packet in sorted(packets, key=lambda packet: packet.dts * packet.time_base):
            container.mux(packet)
    return path


def _encode_click(track, starts, seconds):
    rate, layout = track.codec_context.sample_rate, track.codec_context.layout
    samples = np.zeros((layout.nb_channels, round(seconds * rate)), np.float32)
    samples[:, round(CLICK * rate) : round((CLICK + 0.01) * rate)] = 0.8
    packets = []
    for begin in range(0, samples.shape[1], 1024):
        part = samples[:, begin : begin + 1024].T.reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(part, format="flt", layout=layout.name)
        frame.sample_rate, frame.time_base = rate, Fraction(1, rate)
        frame.pts = begin + round(starts * rate)
        packets += track.encode(frame)
    return packets + track.encode()


def packets_of(path, kind="video"):
    """(bytes, second, duration in seconds) of each packet of a file's last stream of its kind."""
    with av.open(str(path)) as container:
        stream = [stream for stream in container.streams if stream.type == kind][-1]
        return [
            (bytes(packet), float(packet.pts * packet.time_base), float(packet.duration * packet.time_base))
            for packet in container.demux(stream)
            if packet.size
        ]


def length_of(path):
    """Seconds until the last frame ends."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return float((stream.start_time + stream.duration) * stream.time_base)


def times_of(path, kind="video"):
    return [second for _, second, _ in packets_of(path, kind)]


def click_after_first_frame(path):
    """Seconds from the first frame to where the sound becomes loud."""
    with av.open(str(path)) as container:
        resampler = av.AudioResampler("fltp", "mono")
        for decoded in container.decode(container.streams.audio[-1]):
            for frame in resampler.resample(decoded):
                loud = np.flatnonzero(np.abs(frame.to_ndarray()[0]) > 0.3)
                if loud.size:
                    return float(frame.time) + loud[0] / frame.sample_rate - times_of(path)[0]
    raise AssertionError("no click is heard")


def boxes_of(content):
    """The names of an MP4 file's outer boxes, in order."""
    boxes, at = [], 0
    while at < len(content):
        size, name = struct.unpack_from(">I4s", content, at)
        boxes.append(name.decode())
        at += size
    return boxes


# --- times -----------------------------------------------------------------------------------------------


@pytest.mark.fault(
    "a video of uneven frame times, with a gap",
    "segment",
    "its overlay plays while it downloads, each frame at its time",
)
@pytest.mark.parametrize("start", [0.0, 0.7, 6.0])
@pytest.mark.parametrize("name", ["a.mp4", "a.mov", "a.mkv"])
def test_frames_are_shown_when_the_video_shows_them(model, tmp_path, name, start):
    write(tmp_path / name, [start + time for time in UNEVEN])
    done = segment(model, tmp_path / name, tmp_path / "out", chunk_frames=3)
    assert done["frames"] == len(UNEVEN)
    assert times_of(done["overlay"]) == pytest.approx([start + time for time in UNEVEN], abs=1e-4)
    assert length_of(done["overlay"]) == pytest.approx(start + UNEVEN[-1] + LAST, abs=1e-4)
    boxes = boxes_of(storage.read_bytes(done["overlay"]))
    assert boxes.index("moov") < boxes.index("mdat")


def test_what_a_player_makes_of_it(model, tmp_path):
    """With ffprobe: the decoded frames' times, and the length."""
    if shutil.which("ffprobe") is None:
        pytest.skip("ffprobe is not installed")
    write(tmp_path / "a.mp4", UNEVEN, [("aac", 48000, "stereo")])
    done = segment(model, tmp_path / "a.mp4", tmp_path / "out")
    command = ["ffprobe", "-v", "error", "-select_streams", "v", "-of", "csv=p=0", "-show_entries"]
    command += ["frame=best_effort_timestamp_time:stream=duration"]
    shown = [
        subprocess.run([*command, path], capture_output=True, text=True, check=True).stdout.split()
        for path in (tmp_path / "a.mp4", done["overlay"])
    ]
    assert [float(value.strip(",")) for value in shown[1]] == [float(value.strip(",")) for value in shown[0]]


def test_the_clock_of_a_transport_stream_starts_with_it(model, tmp_path):
    """Its own begins anywhere, here after a day."""
    write(tmp_path / "a.ts", [86_000 + time for time in EVEN], [("aac", 48000, "stereo")], starts=86_000.5)
    done = segment(model, tmp_path / "a.ts", tmp_path / "out")
    assert times_of(done["overlay"]) == pytest.approx(EVEN, abs=1e-4)
    assert click_after_first_frame(done["overlay"]) == pytest.approx(0.5 + CLICK, abs=0.003)


def test_folders_of_frames_have_twelve_a_second(model, tmp_path):
    (tmp_path / "dance").mkdir()
    for index in range(3):
        (tmp_path / "dance" / f"{index}.png").write_bytes(_png(index))
    done = segment(model, tmp_path / "dance", tmp_path / "out")
    assert times_of(done["overlay"]) == pytest.approx([0, 1 / 12, 2 / 12])
    assert length_of(done["overlay"]) == pytest.approx(3 / 12)
    assert done["overlay_audio"] == "none"


def _png(shade):
    encoder = av.CodecContext.create("png", "w")
    encoder.width, encoder.height, encoder.pix_fmt, encoder.time_base = 96, 64, "rgb24", Fraction(1)
    return bytes(encoder.encode(av.VideoFrame.from_ndarray(picture(shade=shade), format="rgb24"))[0])


def test_times_that_stand_still_or_go_back_follow_each_other(tmp_path):
    with VideoWriter(tmp_path / "a.mp4", Fraction(10)) as writer:
        for time in (-0.5, -0.5, 0.0, -0.2, 1.0):
            writer.write(picture(), time)
    ticks = np.array(times_of(tmp_path / "a.mp4")) * video_writer.TICKS
    assert ticks.round().tolist() == [0, 1, 45_000, 45_001, 135_000]


@pytest.mark.parametrize("encoder", ["aac", "mp2"])
def test_joined_recordings_follow_each_other(model, tmp_path, encoder):
    """The clock starts again in the middle."""
    one = write(tmp_path / "one.ts", EVEN, [(encoder, 48000, "stereo")], seconds=2).read_bytes()
    (tmp_path / "a.ts").write_bytes(one + one)
    overlay = segment(model, tmp_path / "a.ts", tmp_path / "out")["overlay"]
    assert np.diff(times_of(overlay)) == pytest.approx([0.1] * 39, abs=0.07)
    sounds = times_of(overlay, "audio")
    assert np.diff(sounds) == pytest.approx([sounds[2] - sounds[1]] * (len(sounds) - 1), abs=0.002)
    assert sounds[-1] == pytest.approx(4, abs=0.1)


# --- sound -----------------------------------------------------------------------------------------------


@pytest.mark.fault(
    "a video with sound", "segment", "the overlay has it, packet for packet where MP4 takes it"
)
@pytest.mark.parametrize(
    ("name", "encoder", "layout"),
    [
        ("a.mp4", "aac", "stereo"),
        ("a.flv", "aac", "mono"),
        ("a.mp4", "libmp3lame", "mono"),
        ("a.avi", "libmp3lame", "stereo"),
        ("a.webm", "libopus", "stereo"),
        ("a.mkv", "ac3", "5.1"),
        ("a.mkv", "eac3", "stereo"),
        ("a.mkv", "flac", "stereo"),
        ("a.mov", "alac", "stereo"),
    ],
)
def test_sound_that_mp4_takes_is_copied(model, tmp_path, name, encoder, layout):
    rate = 44100 if name == "a.flv" else 48000
    write(tmp_path / name, EVEN, [(encoder, rate, layout)], starts=0.1)
    done = segment(model, tmp_path / name, tmp_path / "out")
    source, copy = packets_of(tmp_path / name, "audio"), packets_of(done["overlay"], "audio")
    assert [content for content, _, _ in copy] == [content for content, _, _ in source]
    assert [second for _, second, _ in copy] == pytest.approx([second for _, second, _ in source], abs=1e-4)
    assert click_after_first_frame(done["overlay"]) == pytest.approx(
        click_after_first_frame(tmp_path / name), abs=1e-3
    )
    with av.open(done["overlay"]) as container:
        assert done["overlay_audio"] == f"{container.streams.audio[0].codec.canonical_name}, copied"


@pytest.mark.parametrize("starts", [0.0, 1.25])
@pytest.mark.parametrize(
    ("name", "encoder", "rate", "layout"),
    [
        ("a.avi", "pcm_s16le", 22050, "mono"),
        ("a.avi", "pcm_u8", 8000, "stereo"),
        ("a.mov", "pcm_s16be", 48000, "stereo"),
        ("a.mkv", "pcm_f32le", 192_000, "5.1"),
        ("a.mov", "pcm_s24le", 48000, "7.1"),
        ("a.ts", "mp2", 48000, "stereo"),  # MP4 doesn't tell it from MP3
    ],
)
def test_other_sound_is_encoded_again(model, tmp_path, name, encoder, rate, layout, starts):
    starts = 0 if name == "a.avi" else starts
    write(tmp_path / name, EVEN, [(encoder, rate, layout)], starts=starts)
    done = segment(model, tmp_path / name, tmp_path / "out")
    assert done["overlay_audio"] == f"aac, encoded from {encoder}"
    with av.open(done["overlay"]) as container:
        assert container.streams.audio[0].codec.name == "aac"
    assert click_after_first_frame(done["overlay"]) == pytest.approx(starts + CLICK, abs=0.003)


@pytest.mark.fault(
    "channels in an order of the file's own", "segment", "PyAV, which frees it twice, is not asked"
)
def test_channels_in_an_order_of_the_file_s_own(model, tmp_path):
    content = bytearray(write(tmp_path / "a.mov", EVEN, [("pcm_s16le", 48000, "5.1")]).read_bytes())
    struct.pack_into(">I", content, content.index(b"chan") + 8, 122 << 16 | 6)  # L R Ls Rs C LFE
    (tmp_path / "a.mov").write_bytes(content)
    done = segment(model, tmp_path / "a.mov", tmp_path / "out")
    assert done["overlay_audio"] == "aac, encoded from pcm_s16le"
    assert click_after_first_frame(done["overlay"]) == pytest.approx(CLICK, abs=0.003)
    with av.open(done["overlay"]) as container:
        assert container.streams.audio[0].codec_context.layout.nb_channels == 6


@pytest.mark.parametrize("starts", [0.25, 1.5])
def test_sound_that_starts_later_and_ends_later(model, tmp_path, starts, capsys):
    write(tmp_path / "a.mkv", EVEN, [("aac", 48000, "stereo")], starts=starts, seconds=5)
    done = segment(model, tmp_path / "a.mkv", tmp_path / "out")
    assert click_after_first_frame(done["overlay"]) == pytest.approx(starts + CLICK, abs=0.003)
    assert times_of(done["overlay"], "audio")[-1] == pytest.approx(starts + 5, abs=0.03)
    assert "a.mkv: overlay in h264 (libx264), audio: aac, copied\n" in capsys.readouterr().err


def test_of_several_sounds_it_is_the_one_that_is_played(model, tmp_path):
    write(tmp_path / "a.mkv", EVEN, [("libmp3lame", 48000, "mono"), ("aac", 48000, "stereo")])
    assert segment(model, tmp_path / "a.mkv", tmp_path / "out")["overlay_audio"] == "aac, copied"


def test_sound_that_nothing_encodes_is_left_out(model, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.segment.sound.ENCODERS", ())
    write(tmp_path / "a.avi", EVEN, [("pcm_s16le", 48000, "mono")])
    done = segment(model, tmp_path / "a.avi", tmp_path / "out")
    assert done["overlay_audio"] == "left out (pcm_s16le)"
    with av.open(done["overlay"]) as container:
        assert [stream.type for stream in container.streams] == ["video"]


def test_pictures_and_sound_lie_beside_each_other_in_the_file(tmp_path):
    """So that a player needs no more than what is downloaded, and nobody holds the sound of a long video."""
    source = write(tmp_path / "a.mkv", EVEN, [("aac", 8000, "mono")], seconds=30)
    times = np.arange(300) / 10
    with VideoWriter(tmp_path / "out.mp4", Fraction(10), VideoRef("a", str(source))) as writer:
        for time in times:
            writer.write(picture(), float(time))
    with av.open(str(tmp_path / "out.mp4")) as container:
        packets = [
            (packet.pos, packet.stream.type, float(packet.pts * packet.time_base))
            for packet in container.demux()
            if packet.size
        ]
    reached = {"video": 0.0, "audio": 0.0}
    for _, kind, second in sorted(packets):
        reached[kind] = second
        assert abs(reached["video"] - reached["audio"]) < 1


def test_from_one_bucket_to_another(model, tmp_path, s3):
    source = write(tmp_path / "a.mkv", UNEVEN, [("libopus", 48000, "stereo")])
    root = storage.join(s3, tmp_path.name)
    storage.upload_file(source, f"{root}/a.mkv")
    done = segment(model, f"{root}/a.mkv", f"{root}/out")
    assert done["overlay_audio"] == "opus, copied"
    with storage.local_copy(done["overlay"]) as overlay:
        assert [content for content, _, _ in packets_of(overlay, "audio")] == [
            content for content, _, _ in packets_of(source, "audio")
        ]
        assert times_of(overlay) == pytest.approx(UNEVEN, abs=1e-4)
        boxes = boxes_of(storage.read_bytes(str(overlay)))
    assert boxes.index("moov") < boxes.index("mdat")


def test_storage_that_fails_is_no_end_of_the_sound(tmp_path, monkeypatch):
    source = write(tmp_path / "a.mkv", EVEN, [("pcm_s16le", 48000, "stereo")])

    class Failing(storage.RangeFile):
        def _fetch(self, start, stop):
            if start > 100_000:
                self.failure = StorageError("the bucket is gone")
                raise self.failure
            super()._fetch(start, stop)

    monkeypatch.setattr(
        storage, "RangeFile", lambda _, *place, ahead: Failing(str(source), *place, ahead=4096)
    )
    video = VideoRef("a", "s3://bucket/a.mkv", bytes=source.stat().st_size)

    def write_overlay():
        with VideoWriter(tmp_path / "out.mp4", Fraction(10), video) as writer:
            for time in EVEN:
                writer.write(picture(), time)

    with pytest.raises(StorageError, match="the bucket is gone"):
        write_overlay()


# --- encoders --------------------------------------------------------------------------------------------


@pytest.mark.fault("a PyAV without H.264", "segment", "the overlay is VP9 or AV1, as the summary says")
@pytest.mark.parametrize(("encoder", "codec"), [("libvpx-vp9", "vp9"), ("libsvtav1", "av1")])
def test_what_encodes_where_there_is_no_h264(model, tmp_path, monkeypatch, encoder, codec):
    options = video_writer.ENCODERS[encoder]
    monkeypatch.setattr(video_writer, "ENCODERS", {"libnone264": {}, encoder: options})
    write(tmp_path / "a.mp4", UNEVEN, [("aac", 48000, "stereo")])
    done = segment(model, tmp_path / "a.mp4", tmp_path / "out")
    assert (done["overlay_codec"], done["overlay_encoder"]) == (codec, encoder)
    assert os.sched_getscheduler(0) == os.SCHED_OTHER, "no real-time thread is left that would starve others"
    assert times_of(done["overlay"]) == pytest.approx(UNEVEN, abs=1e-4)
    assert length_of(done["overlay"]) == pytest.approx(UNEVEN[-1] + LAST, abs=1e-4)
    with av.open(done["overlay"]) as container:
        assert sum(1 for _ in container.decode(video=0)) == len(UNEVEN)


def test_without_any_encoder_it_says_so(model, tmp_path, monkeypatch):
    monkeypatch.setattr(video_writer, "ENCODERS", {"libnone264": {}})
    write(tmp_path / "a.mp4")
    with pytest.raises(ValueError, match="none of libnone264 that takes it"):
        segment(model, tmp_path / "a.mp4", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("encoder", ["libx264", "libvpx-vp9"])
def test_colours_are_those_that_were_drawn(tmp_path, monkeypatch, encoder):
    monkeypatch.setattr(video_writer, "ENCODERS", {encoder: video_writer.ENCODERS[encoder]})
    with VideoWriter(tmp_path / "a.mp4", Fraction(10)) as writer:
        for index in range(3):
            writer.write(picture(65, 97), index / 10)
    with av.open(str(tmp_path / "a.mp4")) as container:
        context = container.streams.video[0].codec_context
        assert (context.width, context.height) == (96, 64)
        assert (context.colorspace, context.color_range) == (1, 1)  # BT.709, limited
        assert (context.color_primaries, context.color_trc) == (1, 1)
        frame = next(container.decode(video=0)).to_ndarray(format="rgb24")
    for at, colour in (((40, 20), RED), ((40, 80), BLUE), ((8, 6), WHITE)):
        assert frame[at].tolist() == pytest.approx(colour, abs=4)


def test_an_error_half_way_leaves_the_earlier_overlay(model, tmp_path):
    video = tmp_path / "a.mp4"
    write_noise(video, 20, codec="mpeg4")
    overlay = storage.join(str(tmp_path), "out", "a_overlay.mp4")
    segment(model, video, tmp_path / "out")
    before = storage.read_bytes(overlay)
    video.write_bytes(video.read_bytes()[:-2000])
    with pytest.raises(BadVideo):
        segment(model, video, tmp_path / "out", chunk_frames=2)
    assert storage.read_bytes(overlay) == before
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"a_labels", "a_overlay.mp4", "a_sheet.png"}

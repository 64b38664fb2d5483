"""The reader of video files: what a player shows of one, for all that opens them.

FFmpeg decodes; what a player adds to it is here: the stream that it takes, the display matrix, the shape of a pixel,
the time of every frame, and whether the file has been read to its end.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from itertools import islice
from typing import Any, NamedTuple

import av
import numpy as np
from av.sidedata.sidedata import Type
from av.stream import Disposition

from pipeline import storage
from pipeline.clips.sources.base import BadVideo, VideoRef
from pipeline.clips.sources.clock import Clock
from pipeline.clips.sources.frames import RawFrame, reason, target_size
from pipeline.clips.sources.pictures import Orientation

AHEAD = 1 << 20  # bytes that are read at a time of a remote video
HEADER = 1 << 18  # the same where its header and first frames are all that is needed
_LOOKED_AT = (
    32  # frames at most, to know how a file was read before: where times are wrong, so are early ones
)
# Numbers (H.273) of the colour matrices that FFmpeg converts; of others it refuses every frame.
_MATRICES = (0, 1, 2, 4, 5, 6, 7, 9)
_UNSPECIFIED, _BT2020, _BT2020_CONSTANT = 2, 9, 10

_OF_A_PIPE = b"\xff" * 4  # an AVI's size, where its writer could not go back
_ASF_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")  # of a file, in the header
_ASF_HEAD = 1 << 14  # bytes, in which they are

# PyAV's logging callback takes the GIL from FFmpeg's threads and can deadlock inside Ray workers.
# FFmpeg's own callback does not; `set_level` would bring PyAV's back.
av.logging.restore_default_callback()
av.logging.set_libav_level(av.logging.PANIC)


class Outline(NamedTuple):
    """What is known of a video from its first frame.

    Attributes:
        rate: frames a second, of a variable rate the average.
        frames: how many, where the file says so.
        size: (height, width) of its frames as they are shown.
        aspect: how much wider than high a stored pixel is on display; 1 of square ones.
    """

    rate: Fraction
    frames: int | None
    size: tuple[int, int]
    aspect: Fraction


def read_file(video: VideoRef, short_side: int | None, *, square: bool = True) -> Iterator[RawFrame]:
    """The frames of a video file as they are shown. FFmpeg resizes them while it converts their colours.

    Args:
        square: show square pixels; else as many columns as are stored, whatever shape the file says they have.

    Raises:
        BadVideo: what can't be decoded to its end.
        StorageError: storage failed, which is no fault of the video.
    """
    with _opened(video, AHEAD) as (container, stream):
        aspect = _pixel_aspect(stream) if square else Fraction(1)
        orientation, angle = Orientation(), None
        for index, (frame, seconds) in enumerate(_decode(container, stream)):
            # Not of every frame: PyAV keeps one whose side data is looked at until Python collects garbage.
            if frame.rotation != angle:
                orientation, angle = _orientation(frame), frame.rotation
            height, width = target_size(*_shown_size(frame, orientation, aspect), short_side)
            if orientation.transposed:
                height, width = width, height
            if frame.colorspace not in _MATRICES:
                frame.colorspace = _taken_for(frame.colorspace)
            image = frame.reformat(width, height, "rgb24", interpolation="BICUBIC", threads=1)
            yield RawFrame(str(index), orientation.of(image.to_ndarray()), seconds=seconds)


def outline(video: VideoRef) -> Outline:
    """A video file's rate, length and size; raises as `read_file`."""
    with _opened(video, HEADER) as (container, stream):
        frame, _ = next(_decode(container, stream))
        orientation, aspect = _orientation(frame), _pixel_aspect(stream)
        size = _shown_size(frame, orientation, aspect)
        rate = Fraction(stream.average_rate or stream.guessed_rate or 25).limit_denominator(60_000)
        is_piped = container.format.name == "avi" and _head(container, 8)[0][4:] == _OF_A_PIPE
        frames = None if is_piped else stream.frames or None
        return Outline(rate, frames, size, 1 / aspect if orientation.transposed else aspect)


def reads_differently(video: VideoRef) -> bool:
    """Whether the first reader showed a video file in another way, or refused it for what is no fault.

    It took the first stream, whatever the pixels' shape, turned frames by the angle of their matrix alone, believed
    every time, took all that a header counts for frames, and refused colours that FFmpeg does not convert. A file that
    can't be read was not read before either.
    """
    try:
        with _opened(video, HEADER) as (container, stream):
            if stream.index != _streams(container)[0].index or _pixel_aspect(stream) != 1:
                return True
            if _counts_too_many(container, stream) or _begins_late(container, stream):
                return True
            clock = Clock(stream)
            for index, (frame, seconds) in enumerate(islice(_timed(container, stream, clock), _LOOKED_AT)):
                if index == 0 and _orientation(frame) != _quarter_turns(frame):
                    return True
                if frame.colorspace not in _MATRICES:
                    return True
                if clock.skipped or frame.time is None or abs(frame.time - seconds) > 1e-6:
                    return True
                if not clock.doubtful:
                    break
    except BadVideo:
        pass
    return False


@contextmanager
def _opened(video: VideoRef, ahead: int) -> Iterator[tuple[Any, Any]]:
    """A video file's container and the stream that is shown; what goes wrong while it is open is a BadVideo."""
    try:
        if (video.bytes if storage.is_remote(video.path) else os.path.getsize(video.path)) == 0:
            raise BadVideo("the file is empty")
        with open_container(video, ahead) as container:
            yield container, shown_stream(container)
    except (BadVideo, storage.StorageError):
        raise
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise BadVideo(f"can't be decoded ({reason(error, video.path)})") from error


@contextmanager
def open_container(video: VideoRef, ahead: int) -> Iterator[Any]:
    """A file as PyAV opens it, local or remote; `ahead`: bytes of a remote one to read at a time, at least.

    Raises:
        StorageError: at the end, where storage failed, which FFmpeg takes for the end of the file, or for damage.
    """
    remote = None
    if storage.is_remote(video.path):
        remote = storage.RangeFile(video.path, 0, video.bytes, ahead=ahead)
    try:
        with av.open(remote or storage.absolute(video.path)) as container:
            yield container
    finally:
        if remote and remote.failure:
            raise remote.failure


def shown_stream(container: Any) -> Any:
    """The video stream that a player shows; raises BadVideo where there is none."""
    return max(_streams(container), key=_rank)


def _streams(container: Any) -> list[Any]:
    """The video streams of a file in their order, at least one."""
    # A picture attached to an audio file is a video stream too.
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        raise BadVideo("the file has no video stream")
    known = [s for s in streams if s.codec_context is not None]
    if not known:
        raise BadVideo("there is no decoder for its video stream")
    return known


def _rank(stream: Any) -> int:
    """As the ffmpeg command chooses one: those with data, then by pixels, of which a default one has 5 million more."""
    pixels = stream.codec_context.width * stream.codec_context.height
    default = bool(stream.disposition & Disposition.default)
    return 100_000_000 * (stream.start_time is not None) + 5_000_000 * default + pixels


def _taken_for(matrix: int) -> int:
    """What a colour matrix that FFmpeg can't convert is shown as, by earlier FFmpegs and players."""
    return _BT2020 if matrix == _BT2020_CONSTANT else _UNSPECIFIED


def _pixel_aspect(stream: Any) -> Fraction:
    aspect = stream.sample_aspect_ratio
    return aspect if aspect and aspect > 0 else Fraction(1)


def _shown_size(frame: Any, orientation: Orientation, aspect: Fraction) -> tuple[int, int]:
    """(height, width) in square pixels: as ffmpeg's `scale=iw*sar:ih` behind its turns, the width gives way."""
    height, width = frame.height, frame.width
    if orientation.transposed:
        height, width, aspect = width, height, 1 / aspect
    return height, width if aspect == 1 else max(1, int(width * aspect))


def _orientation(frame: Any) -> Orientation:
    """How a frame's display matrix lays it, the nearest of the eight ways: as ffmpeg does where it is one of them."""
    try:
        data = frame.side_data.get(Type.DISPLAYMATRIX)
    except ValueError:  # a newer kind of side data, which this PyAV has no name for, hides all others
        return _quarter_turns(frame)
    if data is None:
        return Orientation()
    a, b, _, c, d = np.frombuffer(data, np.int32, 5).tolist()
    across, down = math.hypot(a, c), math.hypot(b, d)
    if not across or not down:  # as writers leave it that fill in nothing
        return Orientation()
    if abs(b) / down > abs(a) / across:
        return Orientation(True, c < 0, b < 0)
    return Orientation(False, a < 0, d < 0)


def _quarter_turns(frame: Any) -> Orientation:
    """The orientation by the angle of a frame's display matrix alone, which knows no mirrors."""
    turns = round(frame.rotation / 90) % 4  # counter-clockwise
    return Orientation(turns % 2 == 1, turns in (2, 3), turns in (1, 2))


def _decode(container: Any, stream: Any) -> Iterator[tuple[Any, float]]:
    """Every frame with its time in seconds; raises BadVideo where there is none, or the file has been cut."""
    clock = Clock(stream)
    empty = True
    for shown in _timed(container, stream, clock):
        empty = False
        yield shown
    if empty:
        raise BadVideo("not one frame could be decoded")
    _check_end(container, stream, clock)


def _timed(container: Any, stream: Any, clock: Clock) -> Iterator[tuple[Any, float]]:
    stream.thread_count = 1  # Ray runs one task a core
    begun = False
    for packet in container.demux():
        clock.pass_packet(packet)
        if packet.stream is not stream:
            continue
        begun = begun or packet.is_keyframe
        try:
            frames = packet.decode()
        except av.error.InvalidDataError:
            if begun:
                raise
            clock.skipped = True  # a recording begins anywhere, and is shown from its first key frame
            continue
        for frame in frames:
            yield frame, clock.time_of(frame)


def _stored_frames(stream: Any) -> int:
    """How many frames a file's index has that are not empty; 0 without an index."""
    return sum(entry.size > 0 for entry in stream.index_entries)


def _counts_too_many(container: Any, stream: Any) -> bool:
    """Whether a whole file's header counts more frames than it has: an AVI that was cut has lost its index."""
    if container.format.name == "avi" and _missing_bytes(container) > 0:
        return False
    return 0 < _stored_frames(stream) < stream.frames


def _check_end(container: Any, stream: Any, clock: Clock) -> None:
    """Raises BadVideo where a file has been cut, which often just ends.

    AVI and MP4 declare their frames, ASF its bytes, others their time.
    AVI counts the frames that a capture tool left out, MP4 those that are edited away.
    """
    if stream.frames and clock.packets < stream.frames:
        expected = stream.frames
        if container.format.name == "avi":
            missing = _missing_bytes(container)
            if missing == 0 or (missing < 0 and clock.places >= expected):
                return
        if "mp4" in container.format.name:
            expected = _stored_frames(stream) or expected
        if clock.packets < expected:
            raise BadVideo(f"truncated: {clock.packets} of {expected} frames are there")
    if container.format.name == "asf" and (missing := _missing_bytes(container)) > 0:
        raise BadVideo(f"truncated: its last {missing} bytes are missing")
    declared, slack = _declared_seconds(container)
    there = clock.reach - (0 if _counts_from_zero(container) else _start_seconds(container))
    if declared and not stream.frames and there < declared - slack:
        raise BadVideo(f"truncated: {there:.1f} of {declared:.1f} seconds are there")


def _declared_seconds(container: Any) -> tuple[float, float]:
    """How long a file says that it is, and how much less than that is no sign of a cut."""
    declared = (container.duration or 0) / av.time_base
    return declared, max(1.0, 0.05 * declared)


def _start_seconds(container: Any) -> float:
    return (container.start_time or 0) / av.time_base


def _counts_from_zero(container: Any) -> bool:
    """Whether a container's duration is the time of its end, whenever its first frame is."""
    return "matroska" in container.format.name


def _begins_late(container: Any, stream: Any) -> bool:
    """Whether the first reader took a whole file for a cut one, because nothing is shown at its beginning."""
    declared, slack = _declared_seconds(container)
    return (
        bool(declared)
        and not stream.frames
        and _counts_from_zero(container)
        and _start_seconds(container) > slack
    )


def _missing_bytes(container: Any) -> int:
    """How many bytes an AVI or ASF file lacks of what its header says; negative: it has further parts, or says nothing.

    One that was written into a pipe says nothing that is true, and lacks 0.
    """
    if container.format.name == "asf":
        head, size = _head(container, _ASF_HEAD)
        at = head.find(_ASF_PROPERTIES)  # its size, who wrote it, and then the file's size
        said = int.from_bytes(head[at + 40 : at + 48], "little") if at >= 0 else 0
        return said - size
    head, size = _head(container, 8)
    missing = 8 + int.from_bytes(head[4:], "little") - size
    # A last byte to make it even may be counted or not.
    return 0 if abs(missing) <= 1 or head[4:] == _OF_A_PIPE else missing


def _head(container: Any, length: int) -> tuple[bytes, int]:
    """The first bytes of a file, and its size."""
    if container.file is None:
        with open(container.name, "rb") as file:
            return file.read(length), os.path.getsize(container.name)
    file = container.file.file
    position = file.tell()  # FFmpeg goes on reading there
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(length)
    file.seek(position)
    return head, size

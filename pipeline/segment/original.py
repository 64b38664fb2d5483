"""What an overlay takes over from the file it is made of, besides the pictures: its clock and its sound."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import av
from av.format import Flags
from av.stream import Discard

from pipeline.clips.sources import VideoRef
from pipeline.clips.sources.container import AHEAD, open_container, shown_stream
from pipeline.segment.sound import Sound


class Original:
    """A video file, opened beside the reader of its frames.

    Attributes:
        start: the second of its clock that a player shows as 0.
        sound: its audio, None without any.
    """

    def __init__(self, video: VideoRef) -> None:
        """Raises StorageError where storage fails, FFmpegError for a file that can't be opened."""
        self._video = video
        with contextlib.ExitStack() as stack:
            container = stack.enter_context(open_container(video, AHEAD))
            # The clock of a transport stream starts anywhere, that of others at 0, whatever comes first.
            anywhere = container.format.flags & Flags.ts_discont.value
            self.start = Fraction(container.start_time or 0, av.time_base) if anywhere else Fraction(0)
            self.sound = _find_sound(container)
            self._stack = stack.pop_all()

    def close(self) -> None:
        """Raises StorageError where storage failed, which FFmpeg takes for the end of a file."""
        self._stack.close()

    def duration_of(self, seconds: float) -> Fraction | None:
        """How long the frame of that time is shown by the file's own account; None where it doesn't say."""
        with contextlib.suppress(av.error.FFmpegError), open_container(self._video, AHEAD) as container:
            stream = shown_stream(container)
            if stream.duration and "mp4" in container.format.name:
                # As FFmpeg makes up the durations of some codecs' packets.
                end = ((stream.start_time or 0) + stream.duration) * stream.time_base
                return max(end - Fraction(seconds), Fraction(0))
            container.seek(math.floor(seconds / stream.time_base), stream=stream)
            for packet in container.demux(stream):
                if packet.pts is not None and abs(packet.pts * packet.time_base - seconds) < packet.time_base:
                    return packet.duration * packet.time_base if packet.duration else None
        return None


def _find_sound(container: Any) -> Sound | None:
    """The audio that FFmpeg would play; None where there is none, or not a packet of it."""
    stream = container.streams.best("audio", related=shown_stream(container))
    if stream is None:
        return None
    for other in container.streams:
        if other is not stream:
            other.discard = Discard.all
    packets = _packets(container, stream)
    first = next(packets, None)
    return None if first is None else Sound(stream, first, packets)


def _packets(container: Any, stream: Any) -> Iterator[Any]:
    """A stream's packets, one at a time, up to where the file is damaged, which the reader of its frames says."""
    with contextlib.suppress(av.error.FFmpegError):
        for packet in container.demux(stream):
            if packet.size:
                yield packet

"""When each frame of a video file is shown, whatever times the file has."""

from __future__ import annotations

import heapq
from fractions import Fraction
from typing import Any

_JUMP = 0.1  # seconds back that are no slip but another beginning, as where recordings have been joined


class Clock:
    """Times of frames, which always grow.

    A packet has a time of display or, in AVI and bare streams, just a place in the file; for those libav makes times up
    that are wrong where frames are stored in another order than they are shown in. But decoders give frames in the
    order they are shown in, so that each frame has the earliest time that is left of the packets so far.

    Attributes:
        packets: of the stream that hold something.
        places: those, and the ones that an AVI file counts between them and that hold nothing.
        reach: seconds up to which any stream has data.
        doubtful: whether the time of the last frame may have been made up.
        skipped: whether the file begins with packets that can't be decoded.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._unit = stream.time_base
        # AVI counts its packets and has no times of display: those that libav makes up may even go back.
        self._is_counted = stream.container.format.name == "avi"
        rate = stream.average_rate or stream.guessed_rate or 25
        self._step = float(1 / Fraction(rate))
        self._waiting: list[float] = []  # times of packets whose frames have not come out yet
        self._ordered = True  # packets' times grow in the order they are stored in
        self._latest: float | None = None
        self._shown: float | None = None
        self._shift = 0.0
        self.packets = self.places = 0
        self.reach = 0.0
        self.doubtful = self.skipped = False

    def pass_packet(self, packet: Any) -> None:
        """Takes note of a packet of any stream before it is decoded."""
        time = packet.dts if packet.pts is None else packet.pts
        if packet.size and time is not None:
            self.reach = max(self.reach, float((time + (packet.duration or 0)) * packet.time_base))
        if packet.stream is not self._stream or not packet.size:
            return
        self.packets += 1
        self.places = self.packets if packet.dts is None else max(self.packets, packet.dts + 1)
        if self._is_counted and packet.dts is not None:
            time = packet.dts
        if time is not None:
            # To the last bit as PyAV says it of a frame.
            shown = float(time) * self._unit.numerator / self._unit.denominator
        else:
            shown = 0.0 if self._latest is None else self._latest + self._length(packet)
        if self._is_counted and self._latest is not None:
            self._step = shown - self._latest
        self._ordered = self._ordered and (self._latest is None or shown > self._latest)
        self._latest = shown
        if not packet.is_discard:
            heapq.heappush(self._waiting, shown)

    def time_of(self, frame: Any) -> float:
        """The seconds of the frame that was decoded next."""
        depth, time, waiting = self._stream.codec_context.reorder_depth, frame.time, self._waiting
        is_first = self._shown is None and time is not None
        begin = float(frame.dts * self._unit) if self._is_counted and frame.dts is not None else time
        while len(waiting) > depth + 2 or (is_first and waiting and waiting[0] < begin):
            heapq.heappop(waiting)  # it gave no frame, or is of before the first key frame
        earliest = heapq.heappop(waiting) if waiting else None
        self.doubtful = time is None or (self._ordered and depth > 0)
        if self._is_counted:
            if is_first and earliest is not None:
                self._shift = time - earliest
            time = time if is_first else earliest
        elif self.doubtful and self._ordered and earliest is not None:
            time = earliest
        return self._grown(time, frame)

    def _length(self, of: Any) -> float:
        """Seconds that a packet or frame is shown for."""
        return float(of.duration * self._unit) if of.duration and not self._is_counted else self._step

    def _grown(self, time: float | None, frame: Any) -> float:
        """The time, or where it is none, or does not grow, one behind the last."""
        last = self._shown
        if last is None:
            time = 0.0 if time is None else time
        elif time is None:
            time = last + self._length(frame)
        else:
            time += self._shift
            if time <= last - _JUMP:
                self._shift += last + self._length(frame) - time
                time = last + self._length(frame)
            elif time <= last:
                time = last + self._length(frame) / 2
        self._shown = time
        return time

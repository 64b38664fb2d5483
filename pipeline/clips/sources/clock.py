"""When each frame of a video file is shown, whatever times the file has."""

from __future__ import annotations

import heapq
from fractions import Fraction
from typing import Any

_JUMP = 0.1  # seconds back that are no slip but another beginning, as where recordings have been joined


def _seconds(time: int, unit: Fraction) -> float:
    """To the last bit what PyAV says of a frame."""
    return float(time) * unit.numerator / unit.denominator


class Clock:
    """Times of frames, which always grow.

    A packet has a time of display or, in AVI and bare streams, just a place in the file; for those libav makes times up
    that are wrong where frames are stored in another order than they are shown in. But decoders give frames in the
    order they are shown in, so that each frame has the earliest time that is left of the packets so far.

    Attributes:
        packets: of the stream that hold something.
        places: those, and the ones that an AVI file counts between them and that hold nothing.
        reach: seconds up to which any stream has data.
        doubtful: whether times may be made up.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        rate = stream.average_rate or stream.guessed_rate or 25
        self._step = float(1 / Fraction(rate))
        self._waiting: list[float] = []  # times of packets whose frames have not come out yet
        self._ordered = True  # packets' times grow in the order they are stored in
        self._latest: float | None = None
        self._shown: float | None = None
        self._shift = 0.0
        self.packets = self.places = 0
        self.reach = 0.0
        self.doubtful = False

    def pass_packet(self, packet: Any) -> None:
        """Takes note of a packet of any stream before it is decoded."""
        time = packet.dts if packet.pts is None else packet.pts
        if packet.size and time is not None:
            self.reach = max(self.reach, float((time + (packet.duration or 0)) * packet.time_base))
        if packet.stream is not self._stream or not packet.size:
            return
        self.packets += 1
        self.places = self.packets if packet.dts is None else max(self.packets, packet.dts + 1)
        if time is not None:
            shown = _seconds(time, packet.time_base)
        else:
            shown = 0.0 if self._latest is None else self._latest + self._length(packet)
        self._ordered = self._ordered and (self._latest is None or shown > self._latest)
        self._latest = shown
        if not packet.is_discard:
            heapq.heappush(self._waiting, shown)

    def time_of(self, frame: Any) -> float:
        """The seconds of the frame that was decoded next."""
        depth = self._stream.codec_context.reorder_depth
        while len(self._waiting) > depth + 2:  # these gave no frame
            heapq.heappop(self._waiting)
        earliest = heapq.heappop(self._waiting) if self._waiting else None
        made_up = self._ordered and (depth > 0 or frame.time is None)
        self.doubtful = self.doubtful or made_up or frame.time is None
        time = earliest if made_up and earliest is not None else frame.time
        return self._grown(time, self._length(frame))

    def _length(self, of: Any) -> float:
        """Seconds that a packet or frame is shown for."""
        return float(of.duration * of.time_base) if of.duration else self._step

    def _grown(self, time: float | None, step: float) -> float:
        if self._shown is None:
            self._shown = 0.0 if time is None else time
            return self._shown
        if time is None:
            time = self._shown + step
        else:
            time += self._shift
            if time <= self._shown - _JUMP:
                self._shift += self._shown + step - time
                time = self._shown + step
            elif time <= self._shown:
                time = self._shown + step / 2
        self._shown = time
        return time

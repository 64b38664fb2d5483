"""Overlay videos in MP4: playable while they download, with the times and the sound of what they are made of."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc

from pipeline import storage
from pipeline.clips.sources import VideoRef
from pipeline.segment.original import Original

TICKS = 90_000  # a second: whole numbers at the usual frame rates, and finer than milliseconds
# The best first, with its options. Without B-frames, decoding's order is showing's, whatever the times.
ENCODERS = {
    "libx264": {"crf": "20", "bf": "0"},
    "libopenh264": {},
    "libvpx-vp9": {"crf": "24", "deadline": "good", "cpu-used": "5", "row-mt": "1"},
    "libaom-av1": {"crf": "24", "cpu-used": "6", "row-mt": "1"},
    "libsvtav1": {"crf": "26", "preset": "9"},
}
OPENH264_BITS = 0.2  # a pixel, as OpenH264 has no constant quality


class VideoWriter:
    """Frames of odd size lose their last row or column, which H.264 in 4:2:0 requires; a single one is shown twice.

    Attributes:
        codec, encoder: "h264", "libx264" and the like, once a frame is written.
        audio: what has become of the original's sound, for people.
    """

    def __init__(self, path: Path, rate: Fraction, video: VideoRef | None = None) -> None:
        """
        Args:
            rate: frames a second, for encoders, and for the last frame where nothing says how long it is shown.
            video: the file whose clock `write` is told, and whose sound goes along; None: neither.
        """
        self._path, self._rate, self._video = path, rate, video
        self._original: Original | None = None
        self._container: Any = None
        self._stream: Any = None
        self._held: Any = None  # the last packet of the encoder's, whose duration depends on the next
        self._sound: Iterator[Any] = iter(())
        self._next_sound: Any = None
        self._start = Fraction(0)
        self._seconds, self._tick = 0.0, -1  # of the last frame
        self.codec = self.encoder = ""
        self.audio = "none"

    def __enter__(self) -> VideoWriter:
        return self

    def write(self, picture: np.ndarray, seconds: float) -> None:
        """Adds a frame `(H, W, 3)` uint8, shown from `seconds` on until the next.

        Raises:
            ValueError: the installed PyAV can't encode it.
        """
        picture = np.repeat(picture, 2, axis=0) if picture.shape[0] == 1 else picture
        picture = np.repeat(picture, 2, axis=1) if picture.shape[1] == 1 else picture
        height, width = picture.shape[0] // 2 * 2, picture.shape[1] // 2 * 2
        if self._stream is None:
            self._begin(width, height, seconds)
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture[:height, :width]), format="rgb24")
        frame = frame.reformat(
            format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
        )
        frame.color_primaries, frame.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        frame.pts, frame.time_base = self._next_tick(seconds), Fraction(1, TICKS)
        self._mux(self._stream.encode(frame))

    def __exit__(self, failure: object, *_: object) -> None:
        with contextlib.ExitStack() as stack:
            if self._original:
                stack.callback(self._original.close)
            if self._stream is None:
                return
            if failure:
                stack.enter_context(contextlib.suppress(av.error.FFmpegError))
            stack.callback(self._container.close)
            if not failure:
                self._end()

    def _begin(self, width: int, height: int, seconds: float) -> None:
        self._container, self._stream = self._open(width, height)
        self.encoder = self._stream.codec_context.codec.name
        self.codec = self._stream.codec_context.codec.canonical_name
        self._start = min(Fraction(0), Fraction(seconds))  # a player shows nothing before 0
        if self._video is not None:
            self._original = Original(self._video)
            self._start = min(self._original.start, Fraction(seconds))
        sound = self._original.sound if self._original else None
        if sound:
            sound.add_to(self._container)
        self._container.start_encoding()
        if sound:
            self._sound = sound.packets(self._start)
            self._next_sound = next(self._sound, None)

    def _next_tick(self, seconds: float) -> int:
        """When a frame is shown. Damaged files have times that stand still or go back, which MP4 can't."""
        tick = round((Fraction(seconds) - self._start) * TICKS)
        self._seconds, self._tick = seconds, max(self._tick + 1, tick)
        return self._tick

    def _open(self, width: int, height: int) -> tuple[Any, Any]:
        """The container, and its video stream by the first encoder that works here."""
        for name, options in ENCODERS.items():
            # Its path is absolute, as FFmpeg takes what precedes a colon for a protocol.
            container = av.open(
                storage.absolute(str(self._path)),
                "w",
                format="mp4",
                container_options={"movflags": "+faststart", "movie_timescale": str(TICKS)},
            )
            with contextlib.suppress(av.error.FFmpegError, ValueError):
                stream = container.add_stream(
                    name,
                    rate=self._rate,
                    options=options,
                    width=width,
                    height=height,
                    pix_fmt="yuv420p",
                    time_base=Fraction(1, TICKS),
                )
                _describe(stream.codec_context)
                if name == "libopenh264":
                    stream.codec_context.bit_rate = round(width * height * self._rate * OPENH264_BITS)
                _open_encoder(stream.codec_context)
                return container, stream
            container.close()
        raise ValueError(
            f"the installed PyAV can't encode a video of {width}x{height} pixels (it has none of {', '.join(ENCODERS)} "
            "that takes it); install one that does: pip install av"
        )

    def _mux(self, packets: list[Any]) -> None:
        """Writes what comes before the last packet, the sound of that time between."""
        for packet in packets:
            if self._held is not None:
                self._mux_sound(self._held.pts * self._held.time_base)
                self._container.mux(self._held)
            self._held = packet

    def _mux_sound(self, until: Fraction | None) -> None:
        while (packet := self._next_sound) is not None:
            if until is not None and packet.pts * packet.time_base > until:
                return
            self._container.mux(packet)
            self._next_sound = next(self._sound, None)

    def _end(self) -> None:
        self._mux(self._stream.encode())
        shown = self._original.duration_of(self._seconds) if self._original else None
        self._held.duration = max(1, round((shown or 1 / self._rate) * TICKS))
        self._mux_sound(self._held.pts * self._held.time_base)
        self._container.mux(self._held)
        self._mux_sound(None)  # one that is longer than the pictures is heard to its end, as in the original
        if self._original and self._original.sound:
            self.audio = self._original.sound.said()


def _describe(context: Any) -> None:
    """Tells an encoder which colours it gets."""
    context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
    context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709


def _open_encoder(context: Any) -> None:
    """SVT-AV1 makes root's thread a real-time one, which would starve all others from then on."""
    if not hasattr(os, "sched_getscheduler"):
        context.open()
        return
    policy, priority = os.sched_getscheduler(0), os.sched_getparam(0)
    context.open()
    if os.sched_getscheduler(0) != policy:
        os.sched_setscheduler(0, policy, priority)

"""An audio stream as packets for MP4: its own where MP4 takes them, else encoded again."""

from __future__ import annotations

import contextlib
import io
import itertools
import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, NamedTuple

import av

COPIED = ("aac", "ac3", "alac", "eac3", "flac", "mp3", "opus")  # that players know in MP4
ENCODERS = ("aac", "libfdk_aac")
BIT_RATE = 96_000  # a channel
LAYOUTS = ("mono", "stereo", "2.1", "4.0", "5.0", "5.1", "6.1", "7.1")  # of 1, 2 … channels by default


class Encoding(NamedTuple):
    """What audio is encoded to: the encoder's name, its sample format, samples a second, and channels."""

    encoder: str
    format: str
    rate: int
    layout: str


class Sound:
    """An audio stream and all of its packets, which are read as they are asked for."""

    def __init__(self, stream: Any, first: Any, rest: Iterator[Any]) -> None:
        """
        Args:
            first: the first packet, which says whether MP4 takes them.
            rest: those after it.
        """
        self._stream, self._packets = stream, itertools.chain([first], rest)
        context = stream.codec_context
        self._codec = context.codec.canonical_name if context is not None else "an unknown codec"
        self._copies = self._codec in COPIED and _mp4_takes(stream, first)
        can_decode = not self._copies and context is not None and _name_channels(stream, first)
        self._encoding = _find_encoding(context) if can_decode else None
        self._output: Any = None
        self._count = 0

    def said(self) -> str:
        """What has become of it, for people."""
        if not self._count:
            return f"left out ({self._codec})"
        return f"{self._codec}, copied" if self._copies else f"aac, encoded from {self._codec}"

    def add_to(self, container: Any) -> None:
        """Adds its stream to an output, unless it is left out."""
        if self._copies:
            self._output = container.add_stream_from_template(self._stream)
        elif self._encoding:
            encoder, _, rate, layout = self._encoding
            bit_rate = BIT_RATE * av.AudioLayout(layout).nb_channels
            self._output = container.add_stream(encoder, rate=rate, layout=layout, bit_rate=bit_rate)

    def packets(self, start: Fraction) -> Iterator[Any]:
        """Packets of the stream that was added to an output whose header is written.

        Args:
            start: the second of the original's clock that is 0 in the output.
        """
        if self._output is None:
            return
        base, after, end = self._output.time_base, None, 0
        offset = start if self._copies else Fraction(0)
        for packet in self._packets if self._copies else self._encoded(start):
            stamp = packet.pts if packet.pts is not None else packet.dts
            tick = end if stamp is None else round((stamp * packet.time_base - offset) / base)
            if tick < end - 1 / base:  # more than a second back: the clock starts again
                offset -= (end - tick) * base
                tick = end
            tick = tick if after is None else max(tick, after)  # MP4 knows no time twice
            duration = round((packet.duration or 0) * packet.time_base / base)
            packet.time_base, packet.stream = base, self._output
            packet.pts = packet.dts = tick
            packet.duration = duration
            after, end = tick + 1, tick + max(1, duration)
            self._count += 1
            yield packet

    def _encoded(self, start: Fraction) -> Iterator[Any]:
        """Packets of the output's encoder, times from `start` on."""
        for frame in self._resampled(start):
            yield from self._output.encode(frame)
        if self._output.codec_context.is_open:
            yield from self._output.encode()

    def _resampled(self, start: Fraction) -> Iterator[Any]:
        """Decoded frames as the encoder takes them; how they are stored may change in mid-stream."""
        resampler, stored, end = None, None, Fraction(0)
        _, kind, rate, layout = self._encoding  # type: ignore[misc]
        for frame in self._decoded():
            if (frame.format.name, frame.layout.name, frame.sample_rate) != stored:
                stored = (frame.format.name, frame.layout.name, frame.sample_rate)
                yield from resampler.resample(None) if resampler else ()
                resampler = av.AudioResampler(kind, layout, rate)
            seconds = end if frame.pts is None else frame.pts * frame.time_base - start
            frame.time_base = Fraction(1, frame.sample_rate)
            frame.pts = round(seconds * frame.sample_rate)
            end = seconds + Fraction(frame.samples, frame.sample_rate)
            with contextlib.suppress(av.error.FFmpegError):  # channels that nobody can mix are silence
                yield from resampler.resample(frame)  # type: ignore[union-attr]
        yield from resampler.resample(None) if resampler else ()

    def _decoded(self) -> Iterator[Any]:
        """Frames; a packet that can't be decoded is silence."""
        for packet in itertools.chain(self._packets, [None]):
            with contextlib.suppress(av.error.FFmpegError):
                yield from self._stream.codec_context.decode(packet)


def _mp4_takes(stream: Any, packet: Any) -> bool:
    """Whether FFmpeg writes such packets into MP4, tried with the first."""
    trial = av.Packet(bytes(packet))
    trial.time_base, trial.pts, trial.dts = packet.time_base, 0, 0
    try:
        with av.open(io.BytesIO(), "w", format="mp4") as container:
            trial.stream = container.add_stream_from_template(stream)
            container.mux(trial)
    except (av.error.FFmpegError, ValueError):
        return False
    return True


def _name_channels(stream: Any, packet: Any) -> bool:
    """Names the channels of a decoder where its file doesn't, or in an order of its own; False where it can't."""
    context = stream.codec_context
    if context.codec.name.startswith("pcm_") and "mov" in stream.container.format.name:
        # To ask PyAV for a layout of the file's own ends the process: it is freed twice.
        bits = int((re.findall(r"\d+", context.codec.name) or [8])[0])
        seconds = packet.duration * packet.time_base
        channels = round(packet.size * 8 / (bits * context.sample_rate * seconds)) if seconds else 0
    elif context.layout.name.endswith(" channels"):
        channels = context.layout.nb_channels
    else:
        return True
    if not 0 < channels <= len(LAYOUTS):
        return False
    context.layout = LAYOUTS[channels - 1]
    return True


def _find_encoding(decoder: Any) -> Encoding | None:
    """What audio of a decoder is encoded to, as near to it as can be; None: there is no encoder for it."""
    for name in ENCODERS:
        for layout in (decoder.layout.name, "stereo"):
            with contextlib.suppress(av.error.FFmpegError, ValueError):
                encoder: Any = av.CodecContext.create(name, "w")
                rates = encoder.codec.audio_rates or [decoder.sample_rate]
                encoder.sample_rate = min(rates, key=lambda rate: abs(rate - decoder.sample_rate))
                encoder.format, encoder.layout = encoder.codec.audio_formats[0], layout
                encoder.open()
                return Encoding(name, encoder.format.name, encoder.sample_rate, encoder.layout.name)
    return None

"""Video files as cameras, editors and capture tools write them, made with PyAV, and what a player shows of each.

All have the same scene: four quarters in four colours, which change places in the last frame.
"""

import shutil
import struct
import subprocess
from fractions import Fraction
from typing import NamedTuple

import av
import numpy as np

RED, BLUE, WHITE, GREEN = (200, 30, 30), (30, 30, 200), (230, 230, 230), (30, 160, 30)
QUARTERS = np.array([[RED, BLUE], [WHITE, GREEN]], np.uint8)
LAST = QUARTERS[::-1, ::-1]
GREY_QUARTERS = np.array([[[20] * 3, [90] * 3], [[220] * 3, [160] * 3]], np.uint8)
# By what each does to the stored picture (H, W, 3): the matrix (a, b, c, d), by which (x, y) goes to
# (a x + c y, b x + d y).
MATRICES = {
    "mirrored": ((-1, 0, 0, 1), lambda p: p[:, ::-1]),
    "upside down": ((1, 0, 0, -1), lambda p: p[::-1]),
    "turned by 180": ((-1, 0, 0, -1), lambda p: p[::-1, ::-1]),
    "turned clockwise": ((0, 1, -1, 0), lambda p: np.rot90(p, -1)),
    "turned counter-clockwise": ((0, -1, 1, 0), lambda p: np.rot90(p)),
    "transposed": ((0, 1, 1, 0), lambda p: p.swapaxes(0, 1)),
    "transposed the other way": ((0, -1, -1, 0), lambda p: np.rot90(p.swapaxes(0, 1), 2)),
    "as stored": ((1, 0, 0, 1), lambda p: p),
}


class Odd(NamedTuple):
    """How a file is written, and what is shown of it.

    Attributes:
        size: (height, width) as stored.
        matrix: a key of MATRICES, or what is in its place.
        aspect: a stored pixel's width by its height.
        at: times of frames, in 1 / rate.
        colours: differ from those painted by at most that much; None where the format has none.
        stored: the quarters that are painted.
    """

    suffix: str
    codec: str
    pix_fmt: str = "yuv420p"
    size: tuple = (48, 64)
    rate: object = 10
    matrix: str = ""
    aspect: Fraction = Fraction(1)
    at: tuple = tuple(range(8))
    options: dict = {}  # noqa: RUF012 (never changed)
    encoder: dict = {}  # noqa: RUF012 (never changed)
    full_range: bool = False
    form: str | None = None
    colours: float = 30
    stored: np.ndarray = QUARTERS

    @property
    def shown(self):
        """(height, width) in square pixels."""
        (height, width), aspect = self.size, self.aspect
        if "clockwise" in self.matrix or "transposed" in self.matrix:
            height, width, aspect = width, height, 1 / aspect
        return height, int(width * aspect)

    def quarters(self, last):
        """What is shown in the four quarters of the first or the last frame."""
        return MATRICES[self.matrix or "as stored"][1](self.stored[::-1, ::-1] if last else self.stored)


X265 = {"x265-params": "log-level=none"}
B = {"bf": "3", "b-pyramid": "none"}
B2 = {"bf": "2"}
ODD = {
    "h264 in mp4": Odd("mp4", "libx264"),
    "hevc in mp4": Odd("mp4", "libx265", encoder=X265),
    "av1 in mp4": Odd("mp4", "libsvtav1", size=(64, 96)),
    "h264 in mov": Odd("mov", "libx264", encoder=B),
    "h264 in mkv": Odd("mkv", "libx264", encoder=B),
    "h264 in ts": Odd("ts", "libx264", encoder=B),
    "h264 in mts": Odd("mts", "libx264", form="mpegts"),
    "h264 in m2ts": Odd("m2ts", "libx264", form="mpegts", options={"mpegts_m2ts_mode": "1"}),
    "h264 in flv": Odd("flv", "libx264", encoder=B),
    "h264 in f4v": Odd("f4v", "libx264", form="mp4"),
    "h264 without B-frames in avi": Odd("avi", "libx264", encoder={"bf": "0"}),
    "h264 with B-frames in avi": Odd("avi", "libx264", encoder=B),
    "h264 with B-frames that refer in avi": Odd("avi", "libx264", encoder={"bf": "5", "b-pyramid": "strict"}),
    "h264 bare": Odd("h264", "libx264", encoder=B),
    "h264 bare and without B-frames": Odd("264", "libx264", form="h264", encoder={"bf": "0"}),
    "hevc bare": Odd("hevc", "libx265", encoder=X265),
    "mpeg4 bare": Odd("m4v", "mpeg4", form="m4v", rate=25, encoder=B2),
    "mpeg2 bare": Odd("m2v", "mpeg2video", form="mpeg2video", rate=25, encoder=B2),
    "h264 in fragments": Odd("mp4", "libx264", options={"movflags": "frag_keyframe+empty_moov"}),
    "vp8 in webm": Odd("webm", "libvpx", encoder={"auto-alt-ref": "1", "lag-in-frames": "6"}),
    "vp9 in webm": Odd("webm", "libvpx-vp9"),
    "vp9 in ivf": Odd("ivf", "libvpx-vp9"),
    "ffv1 in mk3d": Odd("mk3d", "ffv1", form="matroska"),
    "mpeg4 with B-frames in avi": Odd("avi", "mpeg4", encoder=B2),
    "mjpeg in avi": Odd("avi", "mjpeg", "yuvj420p"),
    "uncompressed in avi": Odd("avi", "rawvideo", "bgr24"),
    "mpeg1 in mpg": Odd("mpg", "mpeg1video", rate=25),
    "mpeg2 in mpeg": Odd("mpeg", "mpeg2video", rate=25, form="mpeg", encoder=B2),
    "mpeg2 in vob": Odd("vob", "mpeg2video", rate=25, encoder=B2),
    "mpeg2 in mxf": Odd("mxf", "mpeg2video", rate=25),
    "wmv2 in wmv": Odd("wmv", "wmv2"),
    "msmpeg4 in asf": Odd("asf", "msmpeg4"),
    "sorenson in flv": Odd("flv", "flv"),
    "h263 in 3gp": Odd(
        "3gp", "h263", size=(96, 128), aspect=Fraction(12, 11)
    ),  # as its encoder says of this size
    "mpeg4 in 3g2": Odd("3g2", "mpeg4"),
    "gif": Odd("gif", "gif", "rgb8", colours=60),
    "y4m": Odd("y4m", "wrapped_avframe", "yuv420p"),
    "ffv1 in nut": Odd("nut", "ffv1"),
    "apng": Odd("apng", "apng", "rgb24", options={"plays": "1"}),
    "prores of 10 bits": Odd("mov", "prores_ks", "yuv422p10le"),
    "h264 of 10 bits": Odd("mkv", "libx264", "yuv420p10le"),
    "hevc of 10 bits": Odd("mkv", "libx265", "yuv420p10le", encoder=X265),
    "ffv1 of 16 bits, grey": Odd("mkv", "ffv1", "gray16le", colours=4, stored=GREY_QUARTERS),
    "ffv1 of 8 bits, grey": Odd("mkv", "ffv1", "gray", colours=4, stored=GREY_QUARTERS),
    "png of 16 bits": Odd("mov", "png", "rgb48be", colours=4),
    "png with transparency": Odd("mov", "png", "rgba", colours=4),
    "qtrle with transparency": Odd("mov", "qtrle", "argb", colours=4),
    "full range": Odd("mp4", "libx264", "yuvj420p"),
    "4:4:4": Odd("mkv", "libx264", "yuv444p"),
    "4:1:1": Odd("mkv", "ffv1", "yuv411p"),
    "of odd sides": Odd("mkv", "ffv1", size=(47, 63)),
    "of odd sides in h264": Odd("mp4", "libx264", "yuv444p", size=(47, 63)),
    "60000/1001 a second": Odd("mp4", "libx264", rate=Fraction(60000, 1001)),
    "one a second": Odd("mp4", "libx264", rate=1),
    "a variable rate in mkv": Odd("mkv", "libx264", at=(0, 1, 2, 9, 10, 30, 31, 40), encoder=B),
    "a variable rate in mp4": Odd("mp4", "libx264", at=(0, 1, 2, 9, 10, 30, 31, 40), encoder=B),
    "null frames in avi": Odd("avi", "mpeg4", at=(0, 1, 2, 5, 6, 9, 10, 11)),
    "pixels 4:3 in mp4": Odd("mp4", "libx264", aspect=Fraction(4, 3)),
    "pixels 1:2 in mkv": Odd("mkv", "libx264", aspect=Fraction(1, 2)),
    "pixels 16:11 in avi": Odd("avi", "mpeg4", aspect=Fraction(16, 11)),
    "pixels 4:3 in ts": Odd("ts", "mpeg2video", rate=25, size=(72, 96), aspect=Fraction(4, 3)),
    "pixels 4:3, turned": Odd("mp4", "libx264", aspect=Fraction(4, 3), matrix="turned clockwise"),
    "pixels 4:3, mirrored": Odd("mp4", "libx264", aspect=Fraction(4, 3), matrix="mirrored"),
    **{name: Odd("mp4", "libx264", matrix=name) for name in MATRICES},
    "mirrored in mov": Odd("mov", "libx264", matrix="mirrored", encoder=B),
    "transposed hevc": Odd("mp4", "libx265", matrix="transposed", encoder=X265),
}


def paint(quarters, size):
    """A picture (H, W, 3) of the colours (2, 2, 3)."""
    rows, columns = (np.arange(n) * 2 // n for n in size)
    return quarters[rows][:, columns]


def write_odd(path, odd):
    """Writes the file of a row."""
    with av.open(str(path), "w", format=odd.form, options=odd.options) as container:
        mux(container, add_stream(container, odd), odd)
    if odd.matrix:
        set_matrix(path, MATRICES[odd.matrix][0])
    return path


def add_stream(container, odd):
    stream = container.add_stream(odd.codec, rate=odd.rate, options=odd.encoder)
    stream.height, stream.width = odd.size
    stream.pix_fmt = odd.pix_fmt
    if odd.aspect != 1:
        stream.sample_aspect_ratio = odd.aspect
    return stream


def mux(container, stream, odd):
    """All frames, the last with the colours in other places."""
    unit = 1 / Fraction(odd.rate)
    for index, time in enumerate(odd.at):
        quarters = odd.stored[::-1, ::-1] if index == len(odd.at) - 1 else odd.stored
        frame = av.VideoFrame.from_ndarray(paint(quarters, odd.size), format="rgb24").reformat(
            format=odd.pix_fmt
        )
        frame.pts, frame.time_base = time, unit
        container.mux(stream.encode(frame))
    container.mux(stream.encode())


def set_matrix(path, matrix):
    """Gives an MP4 another display matrix (a, b, c, d), or nine numbers as the file has them."""
    content = bytearray(path.read_bytes())
    start = content.index(b"tkhd") + 4 + 40  # ISO 14496-12: behind version, times, ids, layer and volume
    one = 1 << 16
    if len(matrix) == 4:
        a, b, c, d = (round(value * one) for value in matrix)
        matrix = (a, b, 0, c, d, 0, 0, 0, 1 << 30)
    content[start : start + 36] = struct.pack(">9i", *matrix)
    path.write_bytes(content)


def has_ffmpeg():
    return shutil.which("ffmpeg") is not None


def as_ffmpeg_shows(path, size):
    """The frames (T, H, W, 3) that the ffmpeg command decodes, turns and scales to square pixels of that size."""
    command = ["ffmpeg", "-v", "error", "-i", str(path), "-vf", "scale=iw*sar:ih:flags=bicubic"]
    raw = subprocess.run(
        [*command, "-vsync", "passthrough", "-f", "rawvideo", "-pix_fmt", "rgb24", "-"],
        capture_output=True,
        check=True,
    ).stdout
    return np.frombuffer(raw, np.uint8).reshape(-1, *size, 3)

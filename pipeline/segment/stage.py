"""Stage `segment`: a video of any length through a model, to an overlay video, label maps and a sheet."""

from __future__ import annotations

import math
import re
import shutil
import tempfile
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from pipeline import storage
from pipeline.clips.sources import Frame, VideoRef, read_video
from pipeline.log import Progress, printable
from pipeline.models.exported import Segmenter
from pipeline.segment.figures import overlay, slot_colours

SHEET_FRAMES = 12
KINDS = {"overlay": "overlay.mp4", "labels": "labels", "sheet": "sheet.png"}  # what is written of a video
LONGEST_NAME = 255  # bytes, of a file on Linux, macOS and in most others
_HEADER = 1 << 20  # bytes that are read at a time of a remote file to find its frame rate


def segment(
    model: Segmenter,
    video: str | Path | VideoRef,
    out: str | Path,
    *,
    max_side: int = 1280,
    chunk_frames: int = 8,
) -> dict[str, Any]:
    """Writes `OUT/NAME_overlay.mp4`, `OUT/NAME_labels/000000.png …` and `OUT/NAME_sheet.png`, here or remote.

    The whole frame is resized to the model's square input, its masks back to the frame. Memory does not
    grow with the video's length. Label images are palette PNGs whose index is the slot.

    Args:
        video: a video file or a folder of frames, local or remote, or a video of a data set.
        max_side: longest side of the overlay and the labels in pixels; larger videos are scaled down.

    Raises:
        FileNotFoundError: no such video.
        BadVideo: it can't be decoded.
    """
    reference = video if isinstance(video, VideoRef) else video_reference(str(video))
    if storage.is_remote(str(out)):
        with tempfile.TemporaryDirectory() as local:
            done = segment(model, reference, local, max_side=max_side, chunk_frames=chunk_frames)
            places = {kind: storage.join(str(out), Path(done[kind]).name) for kind in KINDS}
            storage.delete(places["labels"])
            storage.upload_tree(local, str(out))
        return {**done, "uri": str(out), **places}
    out = Path(out)
    name = _output_name(reference.video_id)
    out.mkdir(parents=True, exist_ok=True)
    # Written aside and moved when whole, so that an error leaves an earlier result as it was.
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=out) as scratch:
        frames = _write_all(model, reference, Path(scratch), max_side, chunk_frames)
        results = {kind: out / f"{name}_{file}" for kind, file in KINDS.items()}
        shutil.rmtree(results["labels"], ignore_errors=True)
        for kind, target in results.items():
            (Path(scratch) / KINDS[kind]).replace(target)
    return {
        "uri": str(out.absolute()),
        "frames": frames,
        **{kind: str(target) for kind, target in results.items()},
    }


def _output_name(video_id: str) -> str:
    """What outputs are named by: no other folder, and short enough for a file system; what is cut off is hashed."""
    name = re.sub(r"[/\\]", "_", printable(video_id))
    most = LONGEST_NAME - max(len(f"_{file}") for file in KINDS.values())
    if len(name.encode()) <= most:
        return name
    ending = f"-{storage.fingerprint(video_id)}"
    return name.encode()[: most - len(ending)].decode(errors="ignore") + ending


def _write_all(model: Segmenter, video: VideoRef, folder: Path, max_side: int, chunk_frames: int) -> int:
    """Writes overlay, labels and sheet of a video into a folder; returns its number of frames."""
    fps, expected, short_side = _probe(video, max_side)
    frames = read_video(video, short_side=short_side)
    sheet = _Sheet(expected or 240)
    labels_folder = folder / KINDS["labels"]
    labels_folder.mkdir()
    with (
        Progress(f"segment {printable(video.name)}", expected, "frames") as progress,
        _VideoWriter(folder / KINDS["overlay"], fps) as writer,
    ):
        for pixels, _, masks in model.stream(_chunks(frames, chunk_frames)):
            labels = model.label_maps(masks, pixels.shape[1:3]).cpu().numpy()
            for frame, label in zip(pixels, labels, strict=True):
                picture = overlay(frame, label, model.config.num_slots)
                writer.write(picture)
                _save_labels(label, labels_folder / f"{progress.done:06d}.png")
                sheet.add(progress.done, frame, picture)
                progress.advance()
    sheet.draw().save(folder / KINDS["sheet"])
    return progress.done


def video_reference(video: str) -> VideoRef:
    """A video file or a folder of frames, local or remote. Raises FileNotFoundError where there is none."""
    if not storage.exists(video):
        raise FileNotFoundError(f"there is no video {video!r}")
    is_folder = storage.is_folder(video)
    details = {"folder": True} if is_folder else {}
    return VideoRef(
        Path(storage.name(video)).stem, video, bytes=0 if is_folder else storage.size(video), details=details
    )


def _save_labels(labels: np.ndarray, path: Path) -> None:
    image = Image.fromarray(labels, mode="P")
    image.putpalette(slot_colours(256).flatten().tolist())
    image.save(path)


def _probe(video: VideoRef, max_side: int) -> tuple[Fraction, int | None, int | None]:
    """Frame rate, number of frames where the file declares it, and the short side to decode to."""
    if video.kind != "videos" or video.details.get("folder") or Path(video.path).is_dir():
        return Fraction(12), None, None
    try:
        remote = storage.is_remote(video.path)
        file = (
            storage.RangeFile(video.path, 0, video.bytes, ahead=_HEADER)
            if remote
            else storage.absolute(video.path)
        )
        with av.open(file) as container:
            stream = container.streams.video[0]
            rate = Fraction(stream.average_rate or 25).limit_denominator(60_000)
            sides = sorted((stream.codec_context.width, stream.codec_context.height))
            short = round(sides[0] * max_side / sides[1]) if sides[1] > max_side else None
            return rate, stream.frames or None, short
    except (av.error.FFmpegError, IndexError):
        return Fraction(25), None, None  # decoding it will say what is wrong


def _chunks(frames: Iterator[Frame], size: int) -> Iterator[np.ndarray]:
    chunk: list[np.ndarray] = []
    for frame in frames:
        chunk.append(frame.pixels)
        if len(chunk) == size:
            yield np.stack(chunk)
            chunk = []
    if chunk:
        yield np.stack(chunk)


class _VideoWriter:
    """H.264 at a constant rate; frames of odd size lose their last row or column, which H.264 requires."""

    def __init__(self, path: Path, fps: Fraction) -> None:
        self._container = av.open(str(path), "w", format="mp4")
        self._fps = fps
        self._stream: Any = None

    def __enter__(self) -> _VideoWriter:
        return self

    def write(self, picture: np.ndarray) -> None:
        height, width = picture.shape[0] // 2 * 2, picture.shape[1] // 2 * 2
        if self._stream is None:
            self._stream = self._container.add_stream("libx264", rate=self._fps, options={"crf": "20"})
            self._stream.width, self._stream.height = width, height
            self._stream.pix_fmt = "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture[:height, :width]), format="rgb24")
        self._container.mux(self._stream.encode(frame))

    def __exit__(self, *_: object) -> None:
        if self._stream is not None:
            self._container.mux(self._stream.encode())
        self._container.close()


class _Sheet:
    """A contact sheet of about `SHEET_FRAMES` evenly spaced frames, with a bounded number in memory."""

    def __init__(self, expected: int) -> None:
        self._every = max(1, math.ceil(expected / SHEET_FRAMES))
        self._pictures: list[Image.Image] = []

    def add(self, index: int, frame: np.ndarray, picture: np.ndarray) -> None:
        if index % self._every:
            return
        pair = Image.fromarray(np.concatenate([frame, picture], axis=0))
        pair.thumbnail((240, 480))
        self._pictures.append(pair)
        if len(self._pictures) >= 2 * SHEET_FRAMES:  # the video is longer than it said
            self._pictures = self._pictures[::2]
            self._every *= 2

    def draw(self) -> Image.Image:
        columns = min(6, len(self._pictures))
        rows = math.ceil(len(self._pictures) / columns)
        width, height = self._pictures[0].size
        sheet = Image.new("RGB", (columns * (width + 4) - 4, rows * (height + 4) - 4), "white")
        for i, picture in enumerate(self._pictures):
            sheet.paste(picture, (i % columns * (width + 4), i // columns * (height + 4)))
        return sheet

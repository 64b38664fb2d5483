"""Stage `segment`: a video of any length through a model, to an overlay video, label maps and a sheet."""

from __future__ import annotations

import math
import re
import shutil
import tempfile
from collections import deque
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline import storage
from pipeline.clips.sources import BadVideo, Frame, VideoRef, read_video
from pipeline.clips.sources.container import outline
from pipeline.clips.sources.videos import is_folder
from pipeline.log import Progress, log, printable
from pipeline.models.segmenter import Segmenter
from pipeline.segment.figures import overlay, slot_colours
from pipeline.segment.video_writer import VideoWriter

SHEET_FRAMES = 12
KINDS = {"overlay": "overlay.mp4", "labels": "labels", "sheet": "sheet.png"}  # what is written of a video
LONGEST_NAME = 255  # bytes, of a file on Linux, macOS and in most others


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
        ValueError: the installed PyAV has no encoder for the overlay.
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
        written = _write_all(model, reference, Path(scratch), max_side, chunk_frames)
        results = {kind: out / f"{name}_{file}" for kind, file in KINDS.items()}
        shutil.rmtree(results["labels"], ignore_errors=True)
        for kind, target in results.items():
            (Path(scratch) / KINDS[kind]).replace(target)
    return {
        "uri": str(out.absolute()),
        **written,
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


def _write_all(
    model: Segmenter, video: VideoRef, folder: Path, max_side: int, chunk_frames: int
) -> dict[str, Any]:
    """Writes overlay, labels and sheet of a video into a folder; returns what the summary says of them."""
    fps, expected, short_side = _probe(video, max_side)
    has_clock = _is_file(video)
    frames = read_video(video, short_side=short_side)
    times: deque[float] = deque()  # of the frames that are in the model
    sheet = _Sheet(expected or 240)
    labels_folder = folder / KINDS["labels"]
    labels_folder.mkdir()
    with (
        Progress(f"segment {printable(video.name)}", expected, "frames") as progress,
        VideoWriter(folder / KINDS["overlay"], fps, video if has_clock else None) as writer,
    ):
        for pixels, _, masks in model.stream(_chunks(frames, chunk_frames, times)):
            labels = model.label_maps(masks, pixels.shape[1:3]).cpu().numpy()
            for frame, label in zip(pixels, labels, strict=True):
                picture = overlay(frame, label, model.config.num_slots)
                seconds = times.popleft()
                writer.write(picture, seconds if has_clock else seconds / float(fps))
                _save_labels(label, labels_folder / f"{progress.done:06d}.png")
                sheet.add(progress.done, frame, picture)
                progress.advance()
    sheet.draw().save(folder / KINDS["sheet"])
    log(f"{progress.label}: overlay in {writer.codec} ({writer.encoder}), audio: {writer.audio}")
    return {
        "frames": progress.done,
        "overlay_codec": writer.codec,
        "overlay_encoder": writer.encoder,
        "overlay_audio": writer.audio,
    }


def _is_file(video: VideoRef) -> bool:
    """Whether it has a clock, which folders of frames and other layouts lack."""
    return video.kind == "videos" and not is_folder(video)


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
    if not _is_file(video):
        return Fraction(12), None, None
    try:
        found = outline(video)
    except BadVideo:
        return Fraction(25), None, None  # decoding it will say what is wrong
    sides = sorted(found.size)
    short = round(sides[0] * max_side / sides[1]) if sides[1] > max_side else None
    return found.rate, found.frames, short


def _chunks(frames: Iterator[Frame], size: int, times: deque[float]) -> Iterator[np.ndarray]:
    """Their pixels, so many at a time; their times go into `times`."""
    chunk: list[np.ndarray] = []
    for frame in frames:
        chunk.append(frame.pixels)
        times.append(frame.seconds)
        if len(chunk) == size:
            yield np.stack(chunk)
            chunk = []
    if chunk:
        yield np.stack(chunk)


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

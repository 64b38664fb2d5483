"""Which scores say nothing on some data: counted from the objects of its videos, whatever the data set is called."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from statistics import fmean

from pipeline.clips.table import ClipSet
from pipeline.config.protocols import Protocol
from pipeline.evaluate.table import one_decimal

HIGH = 1 / 3  # mBO of one slot over everything, from which on it is told


def score_warnings(clips: ClipSet, protocol: Protocol) -> tuple[str, ...]:
    """A sentence for each score in which even one slot over everything is good, or perfect.

    Objects are counted in whole frames and videos. A protocol that looks at a part of them sees no more of them, so
    what is said holds for it too.
    """
    if protocol.background == "object":
        # One slot's overlaps with the background and n objects are their areas, which add up to the frame.
        one_slot = fmean(1 / (1 + len(ids)) for _, frames in _objects(clips) for ids in frames)
        if one_slot < HIGH:
            return ()
        return (
            "The background counts as an object beside few others: one slot over everything already scores about "
            f"{one_decimal(100 * one_slot)} mBO.",
        )
    of_videos: dict[str, set[int]] = {}
    with contextlib.closing(_objects(clips)) as found:
        for video_id, frames in found:
            if any(len(ids) > 1 for ids in frames):
                return ()
            of_videos.setdefault(video_id, set()).update(*frames)
    what, where = ("FG-ARI", "video") if max(map(len, of_videos.values())) <= 1 else ("image FG-ARI", "frame")
    return (
        f"No {where} has more than one object, so {what} says nothing here: one slot over everything scores 100.",
    )


def _objects(clips: ClipSet) -> Generator[tuple[str, list[set[int]]], None, None]:
    """Of each clip with masks the video, and the ids of the objects in each frame."""
    for shard in sorted({video.shard for video in clips.videos if video.annotated}):
        for row in clips.reader.rows(shard, ["video_id", "masks"]):
            values = row.to_pylist()[0]
            if values["masks"] is not None:
                frames = [{entry["object_id"] for entry in frame} for frame in values["masks"]]
                yield values["video_id"], frames

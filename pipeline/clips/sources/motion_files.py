"""Motion segments that somebody has made: label images below `dataset.motion`, laid out as masks of videos are.

`FOLDER/<video>/00000.png …`, one a frame in order, 0 where nothing moves; whatever layout the videos have.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipeline import storage
from pipeline.clips.sources.base import FrameIterator, VideoRef
from pipeline.clips.sources.files import HashMemo, is_image
from pipeline.clips.sources.pictures import label_mark
from pipeline.clips.sources.videos import with_labels_of
from pipeline.storage import FileInfo


def with_motion_files(found: Sequence[VideoRef], folder: str, memo: HashMemo) -> list[VideoRef]:
    """The videos with their motion segments, which count as their contents; those without any have a problem.

    Raises:
        FileNotFoundError: no label image of any of them.
    """
    root = storage.absolute(folder).rstrip("/")
    files: dict[str, list[FileInfo]] = {}
    for file in storage.list_files(root):
        if is_image(file.name):
            files.setdefault(file.name.rpartition("/")[0], []).append(file)
    if not any(video.video_id in files for video in found):
        raise FileNotFoundError(
            f"dataset.motion: no motion segments in {root!r} (looked for {found[0].video_id}/00000.png and such of "
            f"{len(found)} videos)"
        )

    def joined(video: VideoRef) -> VideoRef:
        own = files.get(video.video_id, [])
        problem = "" if own else f"has no motion segments in {root} (dataset.motion)"
        hashes = [(storage.name(file.name), memo.content(root, file, label_mark)) for file in own]
        return video._replace(
            content=storage.fingerprint(["motion", video.content, hashes]),
            details={**video.details, "motion": storage.join(root, video.video_id)},
            problem=video.problem or problem,
        )

    return [joined(video) for video in found]


def with_motion(frames: FrameIterator, video: VideoRef) -> FrameIterator:
    """Frames with their motion segments; raises BadVideo where these can't be read or don't fit."""
    for frame, motion in with_labels_of(video.details["motion"], frames, video, "motion segments"):
        yield frame._replace(motion=motion)

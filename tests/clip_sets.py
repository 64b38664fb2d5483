"""Publishes a clip set of arrays, without videos and without Ray."""

from dataclasses import asdict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.artifacts.manifests import ClipManifest
from pipeline.clips.schema import clip_schema, encode_flow, encode_frame, encode_masks
from pipeline.clips.table import INDEX_FILE, SHARD_FOLDER, ClipSet, VideoEntry


def make_clip_set(folder, videos, *, clip_frames=4, videos_per_shard=2, motion=False, flow=None):
    """`videos` maps an id to `(frames (T, H, W, 3), masks [{object id: (H, W) bool}] or None)`.

    With `motion`, the masks are also the motion segments; `flow` maps ids to `(T, H, W, 2)`.
    """
    entries, rows = [], {}
    for number, (video_id, (frames, masks)) in enumerate(videos.items()):
        shard = f"shard-{number // videos_per_shard:05d}.parquet"
        shard_rows = rows.setdefault(shard, [])
        starts = range(0, len(frames), clip_frames)
        size, full = frames.shape[1:3], len(frames) // clip_frames
        place = (shard, len(shard_rows), len(starts))
        entries.append(VideoEntry(video_id, *place, full, len(frames), *size, masks is not None))
        for index, start in enumerate(starts):
            part = slice(start, start + clip_frames)
            count = len(frames[part])
            shard_rows.append(
                {
                    "video_id": video_id,
                    "clip_index": index,
                    "start_frame": start,
                    "full": count == clip_frames,
                    **dict(zip(("height", "width"), size, strict=True)),
                    "timestamps": [float(start + i) for i in range(count)],
                    "frames": [encode_frame(f, "png", 0) for f in frames[part]],
                    "masks": None if masks is None else [encode_masks(m) for m in masks[part]],
                }
            )
            if motion:
                shard_rows[-1]["motion"] = shard_rows[-1]["masks"]
            if flow:
                shard_rows[-1]["flow"] = [encode_flow(own) for own in flow[video_id][part]]
    schema = clip_schema("png", motion=motion, flow=flow is not None)
    for shard, shard_rows in rows.items():
        with storage.atomic_write(storage.join(str(folder), SHARD_FOLDER, shard)) as file:
            pq.write_table(pa.Table.from_pylist(shard_rows, schema), file, row_group_size=2)
    shards = [{"name": shard, "rows": len(shard_rows)} for shard, shard_rows in rows.items()]
    columns = {"motion": "masks" if motion else None, "flow": "dataset" if flow else None}
    settings = {"clip_frames": clip_frames, **{key: kind for key, kind in columns.items() if kind}}
    return publish_clips(str(folder), entries, shards, settings)


def publish_clips(uri, entries, shards, settings):
    """The index and the manifest of shards that are there."""
    with storage.atomic_write(storage.join(uri, INDEX_FILE)) as file:
        pq.write_table(pa.Table.from_pylist([asdict(entry) for entry in entries]), file)
    counts = {"videos": len(entries), "clips": sum(entry.clips for entry in entries)}
    counts["annotated_videos"] = sum(entry.annotated for entry in entries)
    name = storage.name(uri)
    ClipManifest(fingerprint=name, settings=settings, shards=tuple(shards), **counts).publish(uri)
    return ClipSet(uri)


def random_video(rng, frames=9, size=(24, 32), objects=3):
    """Frames, and masks that overlap, come and go; frame 2 is without any object."""
    height, width = size
    pixels = rng.integers(0, 256, (frames, height, width, 3), dtype=np.uint8)
    masks = []
    for t in range(frames):
        current = {}
        for object_id in range(1, objects + 1):
            top, left = rng.integers(0, height - 6), rng.integers(0, width - 6)
            mask = np.zeros(size, bool)
            mask[top : top + rng.integers(3, 9), left : left + rng.integers(3, 9)] = True
            if t != 2 and rng.random() < 0.8:
                current[object_id] = mask
        masks.append(current)
    return pixels, masks


def random_clips(folder, lengths, *, videos_per_shard=2, **video):
    """A clip set of random videos; `lengths` maps ids to numbers of frames."""
    rng = np.random.default_rng(0)
    videos = {name: random_video(rng, frames, **video) for name, frames in lengths.items()}
    return make_clip_set(folder, videos, videos_per_shard=videos_per_shard)

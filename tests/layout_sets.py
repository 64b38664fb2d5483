"""Listing and sharding a data set in a public layout without Ray."""

from dataclasses import asdict

import pyarrow as pa
import pyarrow.parquet as pq
from layouts import training_split

from pipeline import storage
from pipeline.clips.sources import list_videos
from pipeline.clips.table import ClipSet
from pipeline.clips.write import write_shard
from pipeline.config import Clips, Dataset


def find(kind, folder, split=None, *, memo=None, **settings):
    split = training_split(kind) if split is None else split
    dataset = Dataset(kind=kind, path=str(folder), **settings)
    return list_videos(dataset, split, held_out=None, memo_folder=memo and str(memo))


def clip_set(videos, tmp_path, **settings):
    """A published clip set of one shard, and the shard's report."""
    settings = Clips(**{"codec": "png", "clip_frames": 4, **settings})
    uri = str(tmp_path / f"set-{storage.fingerprint([v.video_id for v in videos])}")
    report = write_shard(videos, f"{uri}/data/shard-00000.parquet", settings)
    pq.write_table(pa.Table.from_pylist([asdict(v) for v in report.videos]), f"{uri}/index.parquet")
    shards = [{key: getattr(report, key) for key in ("name", "rows", "bytes")}]
    manifest = {"kind": "clips", "fingerprint": "x", "settings": settings.model_dump(), "shards": shards}
    storage.publish(uri, manifest)
    return ClipSet(uri), report

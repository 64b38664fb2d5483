"""Listing and sharding videos without Ray."""

import numpy as np
from clip_sets import publish_clips
from layouts import training_split
from PIL import Image

from pipeline import storage
from pipeline.clips.sources import list_videos
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
    shards = [{key: getattr(report, key) for key in ("name", "rows", "bytes")}]
    return publish_clips(uri, report.videos, shards, settings.model_dump()), report


def write_images(folder, images, names="{:05d}.png"):
    """A folder of frames or of label maps."""
    folder.mkdir(parents=True)
    for index, image in enumerate(images):
        Image.fromarray(image).save(folder / names.format(index))
    return folder


def write_folders(folder, lengths, size=(12, 16)):
    """Videos of noise as folders of frames; returns their pixels by name."""
    rng = np.random.default_rng(0)
    pixels = {name: rng.integers(0, 256, (count, *size, 3), np.uint8) for name, count in lengths.items()}
    for name, frames in pixels.items():
        write_images(folder / name, frames, "{}.png")
    return pixels

"""Which videos a config means, which clip sets there are of them, and so what `artifacts` is asked with."""

from __future__ import annotations

import itertools
import tempfile
from dataclasses import asdict
from pathlib import PurePosixPath

from pipeline import storage
from pipeline.artifacts.identity import Artifact, Artifacts
from pipeline.artifacts.manifests import ClipManifest, GeneratedManifest
from pipeline.artifacts.once import is_whole, once, require_files
from pipeline.clips.sources import VideoRef, list_videos
from pipeline.clips.sources.synthetic import SyntheticSettings, video_file, write_dataset
from pipeline.clips.sources.videos import list_videos as list_local
from pipeline.clips.table import INDEX_FILE, SHARD_FOLDER, ClipSet
from pipeline.compute import map_tasks
from pipeline.config import Config, ConfigError, parse_split
from pipeline.log import Progress, is_storable, printable

GENERATED_AT_ONCE = 20  # videos, by one task


class ClipLibrary:
    """Looks videos up for `Artifacts`; a data set is listed once, however often it is asked for.

    So what a job makes is of the videos that were there when it began, whatever comes in meanwhile.
    """

    def __init__(self) -> None:
        self._found: dict[tuple[str | None, ...], list[VideoRef]] = {}
        self._annotated: dict[str, list[str]] = {}

    def videos(self, config: Config, split: str) -> list[VideoRef]:
        """The videos of a split, which may be a slice; errors as in `sources.list_videos`.

        Where a whole folder of videos is trained on, its sub-folder for evaluation is not.
        """
        key = (repr(config.dataset), config.evaluate.split, split, config.storage.root)
        if key not in self._found:
            self._found[key] = _list(config, split)
        return self._found[key]

    def sources(self, config: Config, split: str) -> list[tuple[str, str]]:
        return [(video.video_id, video.content) for video in self.videos(config, split)]

    def annotated(self, clips_uri: str) -> list[str]:
        if clips_uri not in self._annotated:
            videos = ClipSet(clips_uri).videos
            self._annotated[clips_uri] = [video.video_id for video in videos if video.annotated]
        return self._annotated[clips_uri]


def artifacts_of(
    config: Config, clips_uri: str | None = None, *, library: ClipLibrary | None = None
) -> Artifacts:
    """What is made of a config: of its own videos, or of a published clip set.

    Args:
        library: what has looked videos up before.

    Raises:
        ConfigError: `storage.root`, which is kept beside all that is made, has bytes that are no UTF-8.
    """
    root = storage.absolute(config.storage.root)
    if not is_storable(root):
        raise ConfigError(
            f"storage.root: '{printable(root)}' can't be used: it has bytes that are no UTF-8, which MLflow, Ray and "
            "S3 can't hold; give it another name"
        )
    return Artifacts(config, library or ClipLibrary(), clips_uri=clips_uri)


def _list(config: Config, split: str) -> list[VideoRef]:
    dataset = config.dataset
    if config.clips_of(split).motion != "files":
        dataset = dataset.model_copy(update={"motion": None})
    contents: dict[str, str] = {}
    if dataset.kind == "synthetic":
        folder = _generate(config, split)
        contents = GeneratedManifest.read(folder).contents
        dataset = dataset.model_copy(update={"kind": "videos", "path": folder})
        split = split[len(parse_split(split)[0]) :]  # the slice alone
    held_out = dataset.listed(config.evaluate.split or "") or None
    memo_folder = storage.join(storage.absolute(config.storage.root), "sources")
    videos = list_videos(dataset, split, held_out=held_out, memo_folder=memo_folder)
    return [v._replace(content=contents.get(v.video_id, v.content)) for v in videos]


def _synthetic(config: Config, split: str) -> SyntheticSettings:
    settings = config.dataset.synthetic
    kind = parse_split(split)[0] or "train"
    counts = {
        "train": settings.videos,
        "validation": settings.validation_videos,
        "test": settings.test_videos,
    }
    return SyntheticSettings(
        videos=counts[kind],
        frames=settings.frames,
        size=settings.size,
        seed=len(counts) * settings.seed + list(counts).index(kind),  # no split shares a video with another
    )


def _video_files(settings: SyntheticSettings) -> list[str]:
    return [video_file(i) for i in range(settings.videos)]


def require_generated(config: Config, split: str) -> str:
    """The folder of a split's generated videos, which is not made here.

    Raises:
        ConfigError: they have not been made, or some are gone.
    """
    synthetic = _synthetic(config, split)
    folder = artifacts_of(config).generated(synthetic).uri
    if not is_whole(folder, lambda uri: _video_files(synthetic)):
        raise ConfigError(
            f"the generated videos of this config are not there ({folder}); make them: python -m jobs.shard CONFIG"
        )
    return folder


def _generate(config: Config, split: str) -> str:
    synthetic = _synthetic(config, split)
    folder, label = artifacts_of(config).generated(synthetic).uri, f"generate {split or 'videos'}"
    with once(folder, label, files=lambda uri: _video_files(synthetic)) as needed:
        if not needed:
            return folder
        contents: dict[str, str] = {}
        if not storage.is_remote(folder):
            _write_videos(config, synthetic, folder, label)
        else:
            with tempfile.TemporaryDirectory() as local:
                _write_videos(config, synthetic, local, label, here=True)  # no other node sees it
                # Hashes of what was made, so that clips have the same fingerprint wherever they are stored.
                contents = {v.video_id: v.content for v in list_local(local, config.dataset.masks)}
                storage.upload_tree(local, folder)
        GeneratedManifest(settings=asdict(synthetic), contents=contents).publish(folder)
    return folder


def _write_videos(
    config: Config, settings: SyntheticSettings, folder: str, label: str, *, here: bool = False
) -> None:
    starts = range(0, settings.videos, GENERATED_AT_ONCE)
    rows = [{"start": n, "stop": min(n + GENERATED_AT_ONCE, settings.videos)} for n in starts]
    arguments = (settings, folder)
    made = (
        (generate_task(row, *arguments) for row in rows)
        if here
        else map_tasks(config, generate_task, rows, arguments=arguments)
    )
    with Progress(label, settings.videos, "videos") as progress:
        for row in made:
            progress.advance(row["videos"])


def generate_task(row: dict[str, int], settings: SyntheticSettings, folder: str) -> dict[str, int]:
    """A task (see `map_tasks`): writes a few of the generated videos."""
    write_dataset(settings, folder, indices=range(row["start"], row["stop"]))
    return {"videos": row["stop"] - row["start"]}


def clip_files(uri: str) -> list[str]:
    """The files that a published clip set can't do without."""
    names = ClipManifest.read(uri).shard_names
    return [INDEX_FILE, *(f"{SHARD_FOLDER}/{name}" for name in names)]


def require_clips(clips: Artifact) -> None:
    """Makes sure that a clip set has been published.

    Raises:
        ConfigError: it has not.
    """
    if not storage.is_complete(clips.uri):
        raise ConfigError(
            f"the clips of these videos and settings are not there ({clips.uri}); make them: "
            "python -m jobs.shard CONFIG"
        )


def open_clips(clips: Artifact) -> ClipSet:
    """A published clip set with all its files.

    Raises:
        ConfigError: it has not been made, or has lost files.
    """
    require_clips(clips)
    require_files(clips.uri, clip_files, "shard")
    return ClipSet(clips.uri)


def check_disjoint(artifacts: Artifacts) -> None:
    """Raises ConfigError where parts of one split overlap: a video would be trained on and scored."""
    config = artifacts.config
    training = ("dataset.split", config.dataset.split)
    _check_apart(artifacts, ("evaluate.split", config.evaluate.split), training, "trained on and scored")


def check_held_out(artifacts: Artifacts) -> None:
    """Raises ConfigError where `evidence.split` has a video that is trained or chosen on."""
    config = artifacts.config
    held_out = ("evidence.split", config.evidence.split)
    for key, split in (("dataset.split", config.dataset.split), ("evaluate.split", config.evaluate.split)):
        _check_apart(artifacts, held_out, (key, split), "seen before they are held out")


def _check_apart(
    artifacts: Artifacts, one: tuple[str, str | None], other: tuple[str, str | None], what: str
) -> None:
    (key, split), (other_key, other_split) = one, other
    if split is None or other_split is None or split == other_split:
        return  # the same one twice is refused, unless nothing is trained on it
    dataset = artifacts.config.dataset
    folders = [PurePosixPath(dataset.listed(part)) for part in (other_split, split)]
    nested = dataset.kind == "videos" and any(a in b.parents for a, b in itertools.permutations(folders))
    if folders[0] != folders[1] and not nested:
        return  # video ids are unique in a split only
    ids = [
        {
            str(folder / video) if nested else video
            for video, _ in artifacts.library.sources(artifacts.config, part)
        }
        for folder, part in zip(folders, (other_split, split), strict=True)
    ]
    if both := sorted(ids[0] & ids[1]):
        raise ConfigError(
            f"{key}: {split!r} and {other_key} {other_split!r} share {len(both)} videos ({both[0]}, …): they would be "
            f"{what}"
        )

"""What lies below a storage.root: the folders that stages fill, what each is made of, and what is nobody's.

A folder is known by its place, `clips/0123456789abcdef`, wherever the root is: manifests and MLflow name it by a
path, which a moved root or another way to it has changed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property

import pyarrow.parquet as pq

from pipeline import storage
from pipeline.artifacts.manifests import (
    ClipManifest,
    EvaluationManifest,
    FeatureManifest,
    GeneratedManifest,
    Manifest,
    RunManifest,
    SweepManifest,
    TargetManifest,
)
from pipeline.artifacts.once import INPUTS_FILE, LEASE_FILE, held_by
from pipeline.clips.table import SOURCES_FILE
from pipeline.config import ConfigError
from pipeline.distill.checkpoint import CHECKPOINT_FOLDER
from pipeline.storage import FileInfo

# What a folder of each kind may be made of. What depends comes before what it depends on.
KINDS: dict[str, tuple[str, ...]] = {
    "evaluations": ("students", "teachers", "pulled", "clips"),
    "sweeps": ("students", "targets", "teachers", "features", "pulled", "clips"),
    "students": ("students", "targets", "teachers", "features", "pulled", "clips"),
    "targets": ("students", "teachers", "pulled", "clips"),
    "teachers": ("features", "clips"),
    "features": ("clips",),
    "pulled": (),
    "clips": ("generated",),
    "generated": (),
}
_MANIFESTS: dict[str, type[Manifest]] = {
    "evaluations": EvaluationManifest,
    "sweeps": SweepManifest,
    "students": RunManifest,
    "targets": TargetManifest,
    "teachers": RunManifest,
    "features": FeatureManifest,
    "clips": ClipManifest,
    "generated": GeneratedManifest,
}
RAY = "ray"
# Known and never pruned: MLflow's, what is remembered of source files, the backbones of slim models, which may have
# been copied anywhere, and what people look at.
_LEFT = re.compile(r"mlflow\.(db|lock)|mlflow\.db[.-].+|mlartifacts|sources|backbones|evidence|report|demo")
_FINGERPRINT = r"[0-9a-f]{16}"
_KINDS = "|".join(kind for kind in KINDS if kind != "pulled")
_PLACE = re.compile(rf"(?:^|/)((?:{_KINDS})/{_FINGERPRINT}|pulled/[^/]+-\d+-{_FINGERPRINT})(?=/|$)")
_THREADS = 16


class Spared(Exception):
    """What was to be deleted is in use, or has changed since it was listed."""


def place_of(uri: str) -> str | None:
    """The place that a path leads to or into; None where it is no stage's."""
    found = _PLACE.findall(uri)
    return found[-1] if found else None


def places_of(uris: Iterable[str | None]) -> set[str]:
    """The places that paths lead to or into, and those of checkpoints, `students/0123456789abcdef/checkpoints`."""
    found = set()
    for uri in uris:
        if uri and (place := place_of(uri)):
            found.add(place)
            if f"{place}/{CHECKPOINT_FOLDER}/" in uri:
                found.add(f"{place}/{CHECKPOINT_FOLDER}")
    return found


def any_of(*kinds: str) -> set[str]:
    """Stands for all places of the kinds."""
    return {f"{kind}/*" for kind in kinds}


@dataclass(frozen=True)
class Folder:
    """A folder that a stage has filled or begun to fill."""

    place: str
    uri: str
    files: tuple[FileInfo, ...]

    @property
    def kind(self) -> str:
        return self.place.partition("/")[0]

    @cached_property
    def names(self) -> frozenset[str]:
        return frozenset(file.name for file in self.files)

    @property
    def complete(self) -> bool:
        return storage.MANIFEST in self.names

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def changed(self) -> float:
        """When the last of its files was written, but for the lease."""
        return max((file.changed for file in self.files if file.name != LEASE_FILE), default=0.0)

    def holder(self) -> str:
        """Who works in it; empty where nobody does."""
        return held_by(self.uri) if LEASE_FILE in self.names else ""

    @cached_property
    def manifest(self) -> Manifest:
        """Raises ConfigError where it is damaged, as then nobody knows what the folder needs."""
        try:
            return _MANIFESTS[self.kind].read(self.uri)
        except ValueError as error:
            raise ConfigError(f"what {self.uri} needs can't be known: {error}") from error

    def made_of(self) -> set[str]:
        """The places that it needs."""
        if self.kind == "pulled":
            return set()
        if not self.complete:
            return self._inputs()
        manifest = self.manifest
        if isinstance(manifest, SweepManifest):
            finished = [trial.run for trial in manifest.trials if trial.status == "finished"]
            return places_of([manifest.clips_uri, *finished])
        if isinstance(manifest, ClipManifest):
            return self._generated(manifest)
        uris: list[str | None] = []
        if isinstance(manifest, RunManifest):
            uris = [manifest.clips_uri, manifest.targets_uri, manifest.features_uri, manifest.teacher_uri]
            uris += [f"clips/{manifest.tags.get('clips')}", f"targets/{manifest.tags.get('targets')}"]
        elif isinstance(manifest, TargetManifest):
            uris = [manifest.clips_uri, manifest.teacher_uri, f"clips/{manifest.clips}"]
        elif isinstance(manifest, FeatureManifest):
            uris = [manifest.clips_uri, f"clips/{manifest.clips}"]
        elif isinstance(manifest, EvaluationManifest):
            uris = [manifest.clips_uri, f"clips/{manifest.protocol.clips}"]
        return places_of(uris)

    def _inputs(self) -> set[str]:
        """What its job has noted; that of an earlier version noted nothing, and may need anything."""
        if INPUTS_FILE not in self.names:
            return any_of(*KINDS[self.kind])
        return places_of(storage.read_json(storage.join(self.uri, INPUTS_FILE)))

    def _generated(self, manifest: ClipManifest) -> set[str]:
        """The folder of generated videos that clips were made of, which only the list of their sources names."""
        if manifest.dataset is not None and manifest.dataset.kind != "synthetic":
            return places_of([manifest.dataset.path])
        if SOURCES_FILE not in self.names:
            return any_of("generated")
        with storage.open_read(storage.join(self.uri, SOURCES_FILE)) as file:
            return places_of(pq.read_table(file, columns=["path"]).column("path").to_pylist())


@dataclass(frozen=True)
class Stock:
    """All that is below a root."""

    root: str
    folders: dict[str, Folder]  # by their places
    ray: tuple[Folder, ...]  # which Ray's own drivers have left
    unknown: tuple[str, ...] = ()  # URIs of what no stage makes
    links: frozenset[str] = field(default_factory=frozenset)  # places that lead elsewhere

    def matching(self, places: Iterable[str]) -> set[str]:
        """The folders of these places that are there, with those that `any_of` stands for."""
        wanted = set(places)
        kinds = {place.removesuffix("/*") for place in wanted if place.endswith("/*")}
        return {place for place, folder in self.folders.items() if place in wanted or folder.kind in kinds}


def take_stock(root: str) -> Stock:
    """Lists a root; only names, sizes and times are read."""
    folders: dict[str, Folder] = {}
    ray: list[Folder] = []
    unknown, links = [], set()
    for top in storage.list_names(root):
        if top not in (*KINDS, RAY):
            unknown += [] if _LEFT.fullmatch(top) else [storage.join(root, top)]
            continue
        for name, files in _by_folder(storage.join(root, top)).items():
            place, uri = f"{top}/{name}", storage.join(root, top, name)
            if top == RAY and files[0].name:
                ray.append(Folder(place, uri, files))
            elif place_of(place) != place or not files[0].name:
                unknown.append(uri)
            else:
                folders[place] = Folder(place, uri, files)
                links |= {place} if storage.is_link(uri) else set()
    return Stock(root, folders, tuple(ray), tuple(unknown), frozenset(links))


def _by_folder(uri: str) -> dict[str, tuple[FileInfo, ...]]:
    """The files of each entry by their paths in it; of an entry that is a file itself, one without a name."""
    found: dict[str, list[FileInfo]] = {}
    for file in storage.list_files(uri):
        name, _, below = file.name.partition("/")
        found.setdefault(name, []).append(file._replace(name=below))
    return {name: tuple(files) for name, files in found.items()}


def read_manifests(folders: Iterable[Folder]) -> None:
    """Reads those of several complete folders at a time, which the folders keep."""
    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(lambda folder: folder.manifest, folders))

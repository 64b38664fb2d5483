"""Which files below a folder are videos: by their names, since a large folder can't be opened file by file."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import PurePosixPath
from typing import NamedTuple

from pipeline import storage
from pipeline.clips.sources.files import is_image
from pipeline.log import printable

# Those of the first reader; what it made of other files never was a video.
FIRST_SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v")
_FURTHER = """264 265 266 3g2 3gp 3gp2 3gpp amv apng asf av1 avc avs2 avs3 bik braw cavs cine dav dif divx dv dvr-ms
    evo f4v fli flc flv gif gxf h261 h263 h264 h265 h266 hevc insv ismv ivf k3g lvf m1v m2p m2t m2ts m2v mjpeg mjpg mj2
    mk3d mlv moflex mp4v mpe mpeg mpg mpv mqv mts mxf nsv nut nuv obu ogm ogv ogx pva qt rm rmvb roq rv ser smk tod tp
    trp ts vc1 viv vob vro vvc wm wmv wtv xesc xvid y4m"""
VIDEO_SUFFIXES = (*FIRST_SUFFIXES, *(f".{suffix}" for suffix in _FURTHER.split()))
_REASONS = {
    "sound alone": "aac ac3 aif aiff alac amr ape au caf dts flac m4a m4b mka mp2 mp3 oga ogg opus spx wav wma wv",
    "a picture of a format that is not read; save it as PNG or JPEG": """arw avif cr2 cr3 dng dpx exr hdr heic heif ico
        j2k jp2 jxl nef orf pam pbm pcx pfm pgm pnm ppm psd raw rw2 svg tga tif tiff""",
    "a camera's preview": "lrf lrv thm",
    "text": """ass csv gpx html idx ini json jsonl log md nfo pdf rst smi srt ssa sub sup toml tsv txt vtt xml xmp yaml
        yml""",
}
_WHY = {f".{suffix}": reason for reason, suffixes in _REASONS.items() for suffix in suffixes.split()}
_SHOWN = 5  # names in a message


class Choice(NamedTuple):
    """The paths of videos below a folder by id, and other files there with the reason why they are none."""

    paths: dict[str, str]
    left_out: list[tuple[str, str]]

    def left_out_in_words(self) -> str:
        """What is left out, in one line; empty where nothing is."""
        if not self.left_out:
            return ""
        names = [f"{printable(path)} ({why})" for path, why in self.left_out[:_SHOWN]]
        more = len(self.left_out) - len(names)
        files = "1 file" if len(self.left_out) == 1 else f"{len(self.left_out)} files"
        return f"left out {files}: {', '.join(names)}{f' and {more} more' if more else ''}"


def walk(root: str, masks: str, exclude: str | None) -> Iterator[tuple[str, list[str]]]:
    """Folders below a local one, as paths from there, with the names of their files.

    Links to folders are followed, each to what has not been listed yet: so a link upwards has an end, and one to the
    masks or the held out videos adds nothing.
    """
    real_root = os.path.realpath(root)
    pending, listed = [root], set()
    while pending:
        top = pending.pop(0)
        below = PurePosixPath(os.path.relpath(os.path.realpath(top), real_root))
        if ".." not in below.parts and is_apart(str(below), masks, exclude, hidden=False):
            continue
        for directory, folders, names in os.walk(top):
            real = os.path.realpath(directory)
            here = os.path.relpath(directory, root).replace(os.sep, "/").removeprefix(".")
            folders[:] = sorted(f for f in folders if not is_apart(f"{here}/{f}".lstrip("/"), masks, exclude))
            if real in listed:
                folders.clear()
                continue
            listed.add(real)
            pending += [p for f in folders if os.path.islink(p := os.path.join(directory, f))]
            yield here, names


def is_apart(folder: str, masks: str, exclude: str | None, *, hidden: bool = True) -> bool:
    """Whether a folder, or one that it is in, is of masks, or `exclude`, or hidden where that counts."""
    parts = PurePosixPath(folder).parts
    if any(part == masks or (hidden and part.startswith(".")) for part in parts):
        return True
    return exclude is not None and parts[: len(PurePosixPath(exclude).parts)] == PurePosixPath(exclude).parts


def choose(root: str, folders: Iterable[tuple[str, Sequence[str]]]) -> Choice:
    """The videos below `root`, from its folders with the names of their files: video files and folders of frames.

    Raises:
        ValueError: two videos that would have the same id (`a.mp4` and `a.mkv`).
    """
    listing = [(here, sorted(n for n in names if not _is_hidden(here, n))) for here, names in folders]
    # A GIF may be a frame itself, and says nothing of frames that have its name elsewhere.
    videos = [n for _, names in listing for n in names if _is_video(n) and not n.lower().endswith(".gif")]
    stems = {stem for name in videos for stem in _stems(name)}
    choice = Choice({}, [])
    for here, names in listing:
        reasons = _reasons(here, names, stems)
        choice.left_out.extend((_inside(here, name), why) for name, why in reasons.items() if why)
        pictures = [name for name in names if is_image(name)]
        found = [_inside(here, name) for name in names if _is_video(name) and not reasons.get(name)]
        if any(not reasons[name] for name in pictures):
            found.append(here)
        for path in found:
            video_id = path if path == here else str(PurePosixPath(path).with_suffix(""))
            if video_id in choice.paths:
                raise ValueError(
                    f"{storage.join(root, path)} and {storage.join(root, choice.paths[video_id])} would both be the "
                    f"video {video_id!r}; rename one"
                )
            choice.paths[video_id] = path
    return choice


def _reasons(here: str, names: Sequence[str], stems: set[str]) -> dict[str, str]:
    """Why each file of a folder is no video or frame; empty for those that are.

    Args:
        stems: of all video files below the root, but for GIFs.
    """
    videos = {name for name in names if _is_video(name)}
    gifs = {name for name in videos if name.lower().endswith(".gif")}
    others = {stem for name in videos - gifs for stem in _stems(name)}
    reasons = {name: _WHY.get(PurePosixPath(name).suffix.lower(), "no video by its name") for name in names}
    reasons |= dict.fromkeys(videos, "")
    reasons |= {name: "a preview of the video of its name" for name in gifs if others & _stems(name)}
    pictures = [name for name in names if is_image(name)]
    if videos - gifs or not here:
        return reasons | dict.fromkeys(
            pictures, "a picture beside videos" if videos else "a picture outside of a folder of frames"
        )
    if pictures and all(stems & _stems(name) for name in pictures):
        return reasons | dict.fromkeys(pictures, "a picture that has a video's name")
    # A GIF beside frames often is their preview: they are a video as they were before GIFs were read.
    return reasons | dict.fromkeys(pictures, "")


def _is_hidden(here: str, name: str) -> bool:
    """Whether a file is nobody's to see: of generated videos the manifest too, which makes their folder complete."""
    return not name or name.startswith(".") or (not here and name == storage.MANIFEST)


def _is_video(name: str) -> bool:
    return name.lower().endswith(VIDEO_SUFFIXES)


def _stems(name: str) -> set[str]:
    """`a` of `a.jpg`, `a` and `a.mp4` of `a.mp4.jpg`."""
    stem = PurePosixPath(name).stem
    return {stem, PurePosixPath(stem).stem} if _is_video(stem) else {stem}


def _inside(here: str, name: str) -> str:
    return f"{here}/{name}".lstrip("/")

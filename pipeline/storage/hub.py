"""The Hugging Face Hub: repositories of models, read as `hf://USER/REPO[@REVISION][/PATH]` and pushed to.

What is read is downloaded into huggingface_hub's own cache (`HF_HOME`), once, and then read from there, also without a
network. `HF_ENDPOINT`, `HF_TOKEN` and `HF_HUB_OFFLINE` mean what they mean to huggingface_hub, which is imported here
alone, where it is used.
"""

from __future__ import annotations

import contextlib
import difflib
import os
from collections.abc import Collection, Iterator
from typing import NamedTuple

from pipeline.storage import disk
from pipeline.storage.errors import AccessError, HubError, UnavailableError

SCHEME = "hf://"
_FORM = "hf://USER/REPO/FILE or, with a branch, tag or commit, hf://USER/REPO@REVISION/FILE"


class _Place(NamedTuple):
    repository: str  # USER/REPO
    revision: str | None  # None: the repository's default branch
    path: str  # of a file or folder in it; empty for its root


class _Repository(NamedTuple):
    """A repository at one revision."""

    commit: str
    files: tuple[str, ...]
    whole: bool  # False where the Hub did not answer, and `files` are those of the cache


def on_hub(uri: str) -> bool:
    return uri.startswith(SCHEME)


def is_file(uri: str) -> bool:
    """Raises as `path`, but for a missing file."""
    place = _split(uri)
    return place.path in _look(place).files


def is_folder(uri: str) -> bool:
    """Raises as `path`, but for a missing folder."""
    place = _split(uri)
    return not place.path or any(file.startswith(place.path + "/") for file in _look(place).files)


def version(uri: str) -> str:
    """The commit; raises as `path`."""
    place = _split(uri)
    return _require(uri, place).commit


def pinned(uri: str) -> str:
    """The same file or folder by its commit, so that it stays the same when somebody pushes; raises as `path`."""
    place = _split(uri)
    below = f"/{place.path}" if place.path else ""
    return f"{SCHEME}{place.repository}@{_look(place).commit}{below}"


def path(uri: str) -> str:
    """A local file with the content of one on the Hub.

    Raises:
        ValueError: not of the form `hf://USER/REPO[@REVISION][/PATH]`.
        FileNotFoundError: no such file in the repository.
        HubError: no such repository or revision.
        AccessError: permission or token.
        UnavailableError: the Hub can't be reached, and the cache has no such file.
    """
    place = _split(uri)
    repository = _require(uri, place)
    return _download(place, repository.commit)


def folder(uri: str, names: Collection[str] | None) -> str:
    """A local folder with the files of one on the Hub; it may have others beside them.

    Args:
        names: of the files, each of which must be there; None: all that are directly in it.

    Raises:
        FileNotFoundError: one of them is not there; else as `path`.
    """
    place = _split(uri)
    repository, inside = _look(place), f"{place.path}/" if place.path else ""
    if names is None:
        below = [file.removeprefix(inside) for file in repository.files if file.startswith(inside)]
        names = [name for name in below if "/" not in name]
    paths = [path(f"{uri.rstrip('/')}/{name}") for name in names]
    return os.path.dirname(paths[0])


def nearest(uri: str) -> str:
    """What an error adds of the files of a repository for one that it doesn't have."""
    place = _split(uri)
    return _nearest(place, _look(place))


def _nearest(place: _Place, repository: _Repository) -> str:
    if not repository.files:
        return "; it has no files"
    near = difflib.get_close_matches(place.path, repository.files, n=3)
    if near:
        return f"; did you mean {' or '.join(near)}?"
    more = f" and {len(repository.files) - 10} more" if len(repository.files) > 10 else ""
    return f"; its files: {', '.join(repository.files[:10])}{more}"


def _split(uri: str) -> _Place:
    from huggingface_hub.errors import HfUriError
    from huggingface_hub.utils import parse_hf_uri

    try:
        found = parse_hf_uri(uri)
    except HfUriError as error:
        raise ValueError(f"{uri!r} is not of the form {_FORM} ({error.msg.strip()})") from None
    if found.type != "model":
        raise ValueError(f"{uri!r} is a {found.type}, not a model; models are {_FORM}")
    return _Place(found.id, found.revision, found.path_in_repo.rstrip("/"))


_known: dict[tuple[str, str | None], _Repository] = {}


def _look(place: _Place) -> _Repository:
    """A place's repository, asked for once in a process, so that a branch means one commit to all that it does."""
    key = (place.repository, place.revision)
    if key not in _known:
        _known[key] = _ask(place)
    return _known[key]


def _ask(place: _Place) -> _Repository:
    from huggingface_hub import HfApi, snapshot_download

    name, api = place.repository, HfApi()
    with _explained(place):  # without a network a branch is what it was when it was last asked for
        commit = api.resolve_revision(name, revision=place.revision).resolved
    try:
        with _explained(place):
            found = (
                api.model_info(name, revision=commit).siblings or []
            )  # not tried again, as a listing would be
        return _Repository(commit, tuple(sorted(file.rfilename for file in found)), whole=True)
    except UnavailableError:
        with _explained(place):
            cached = snapshot_download(name, revision=commit, local_files_only=True, allow_patterns=[])
        return _Repository(commit, tuple(found.name for found in disk.list_files(cached)), whole=False)


def _require(uri: str, place: _Place) -> _Repository:
    """The repository of a file that must be there; raises as `path`."""
    repository = _look(place)
    if place.path not in repository.files:
        if not repository.whole:
            raise UnavailableError(
                f"{uri}: {_endpoint()} can't be reached, and the cache does not have it{_how_to_fill(place)}"
            )
        raise FileNotFoundError(f"there is no file {uri!r}{_nearest(place, repository)}")
    return repository


def _download(place: _Place, commit: str) -> str:
    from huggingface_hub import hf_hub_download

    with _explained(place):
        return hf_hub_download(place.repository, place.path, revision=commit)


def push(local: str, name: str, *, private: bool | None, branch: str | None, message: str) -> str:
    """Uploads the files of a local folder as one commit to a repository, which is made if there is none.

    Args:
        name: `USER/REPO`.
        private: of a new repository; None: as the user's account says.
        branch: made if there is none; None: the default branch.

    Returns:
        `hf://USER/REPO@COMMIT`.

    Raises:
        ValueError: not such a name.
        AccessError: no token, or one that may not write there; else as `path`.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    place, api = _split(f"{SCHEME}{name}"), HfApi()
    if (place.repository, place.revision) != (name, None):
        raise ValueError(f"{name!r} is not the name of a repository, USER/REPO")
    with _explained(place._replace(revision=branch), writes=True):
        api.create_repo(name, private=private, exist_ok=True)
        if branch is not None:
            api.create_branch(name, branch=branch, exist_ok=True)
        # Not `upload_folder`, which may make several commits of one folder.
        files = [
            CommitOperationAdd(file.name, os.path.join(local, file.name)) for file in disk.list_files(local)
        ]
        commit = api.create_commit(name, files, commit_message=message, revision=branch)
    return f"{SCHEME}{name}@{commit.oid}"


@contextlib.contextmanager
def _explained(place: _Place, *, writes: bool = False) -> Iterator[None]:
    """A block of huggingface_hub's calls whose errors say what is wrong and what to do; raises as `path`."""
    from huggingface_hub import errors

    try:
        yield
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status >= 500 or status == 429:
            raise UnavailableError(_unavailable(place, f"it answered {status}", writes)) from error
        raise _refused(place, error, writes) from error
    except (
        errors.HTTPError,
        errors.RevisionResolutionError,
        errors.XetDownloadError,
        ConnectionError,  # of Xet, which moves large files, and where HF_HUB_OFFLINE is set
        errors.LocalEntryNotFoundError,
    ) as error:
        offline = "HF_HUB_OFFLINE is set" if _is_offline() else _network_reason(error)
        raise UnavailableError(_unavailable(place, offline, writes)) from error


def _refused(place: _Place, error: Exception, writes: bool) -> OSError:
    """The error for what the Hub did not do."""
    from huggingface_hub import errors

    where, status = f"{SCHEME}{place.repository}", error.response.status_code  # type: ignore[attr-defined]
    if isinstance(error, errors.GatedRepoError):
        return AccessError(
            f"{where}: is gated: ask for access at {_endpoint()}/{place.repository}, then set HF_TOKEN to a token of "
            f"that account (asked with {_token()})"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return HubError(
            f"{where}: has no revision {place.revision!r}; give a branch, a tag or a whole commit, or leave it out"
        )
    if writes and status in (401, 403):
        return AccessError(
            f"{where}: {_endpoint()} refused to write there ({status}): set HF_TOKEN to a token that may write to "
            f"this repository (asked with {_token()})"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return HubError(
            f"{where}: there is no such repository of models at {_endpoint()}, or it is private: then set HF_TOKEN to "
            f"a token that may read it (asked with {_token()})"
        )
    if status in (401, 403):
        return AccessError(
            f"{where}: {_endpoint()} refused it ({status}): set HF_TOKEN to a token that may read it (asked with "
            f"{_token()})"
        )
    said = getattr(error, "server_message", None) or type(error).__name__
    return HubError(f"{where}: {_endpoint()} answered {status} ({said})")


def _unavailable(place: _Place, why: str, writes: bool) -> str:
    begin = f"{SCHEME}{place.repository}: {_endpoint()} can't be reached ({why})"
    return begin if writes else f"{begin}, and the cache does not have it{_how_to_fill(place)}"


def _how_to_fill(place: _Place) -> str:
    words = ["hf download", place.repository, place.path or "[FILE]"]
    words += ["--revision", place.revision] if place.revision else []
    from huggingface_hub.constants import HF_HUB_CACHE

    return (
        f" ({HF_HUB_CACHE}); where there is a network, `{' '.join(words)}` fills it, without HF_HUB_OFFLINE"
    )


def _network_reason(error: BaseException) -> str:
    """The first cause in one line: what the network said."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join([f"{type(error).__name__}:", *str(error).split()])


def _endpoint() -> str:
    from huggingface_hub import constants

    return constants.ENDPOINT


def _is_offline() -> bool:
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def _token() -> str:
    """Whom the Hub was asked as, without anything of the token."""
    from huggingface_hub import get_token

    if os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN"):
        return "that of HF_TOKEN"
    return "one that `hf auth login` has stored" if get_token() else "none"

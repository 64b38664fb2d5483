"""A stand-in for the Hugging Face Hub on loopback: what huggingface_hub asks of it to read and to push models."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

SECRET = "hf_" + "aBcDeFgHiJ" * 3 + "1234"  # a token of the form that the Hub gives
LARGE = (".ckpt", ".safetensors")  # kept aside, where the answer leads to


@dataclass
class Repository:
    """Commits as path -> bytes, by their hashes; branches and tags by name. A private one is missing to strangers."""

    commits: dict = field(default_factory=dict)
    names: dict = field(default_factory=dict)
    private: bool = False
    gated: bool = False

    def commit(self, files, name="main"):
        """Adds files to what a branch has; returns the new commit's hash."""
        whole = {**self.commits.get(self.names.get(name), {}), **files}
        sha = hashlib.sha1(repr((sorted(whole.items()), len(self.commits))).encode()).hexdigest()
        self.commits[sha], self.names[name] = whole, sha
        return sha

    def at(self, revision):
        """The hash that a revision means; None where there is none."""
        sha = self.names.get(revision, revision)
        return sha if sha in self.commits else None


class HubServer:
    """Use as a context manager; `url` is what `HF_ENDPOINT` says, `asked` all requests as "METHOD path"."""

    def __init__(self):
        self.repositories, self.large, self.asked, self.broken = {}, {}, [], False
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.aside = (
            f"http://localhost:{self._server.server_port}/aside"  # another host, as the Hub's storage is
        )

    def repository(self, name, **settings):
        return self.repositories.setdefault(name, Repository(**settings))

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()


class _Refused(Exception):
    """An answer: its status and the Hub's own code for the reason."""


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self):
        self._body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        try:
            if self.hub.broken:
                raise _Refused(500, "")
            for pattern, answer in _ROUTES:
                if match := re.fullmatch(pattern, path):
                    answer(self, *match.groups())
                    return
            raise _Refused(404, "RepoNotFound")
        except _Refused as refused:
            status, code = refused.args
            self._send(b"", status, {"X-Error-Code": code} if code else {})

    def _send(self, body, status=200, headers=None):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _send_json(self, value):
        self._send(json.dumps(value).encode(), headers={"Content-Type": "application/json"})

    def _known(self):
        return self.headers.get("Authorization") == f"Bearer {SECRET}"

    def _repository(self, name):
        found = self.hub.repositories.get(name)
        if found is None or (found.private and not self._known()):
            raise _Refused(404 if self._known() else 401, "RepoNotFound")
        return found

    def _commit(self, name, revision):
        repository = self._repository(name)
        if (sha := repository.at(revision)) is None:
            raise _Refused(404, "RevisionNotFound")
        return repository, sha

    # --- reading ----------------------------------------------------------------------------------

    def _about(self, name, revision):
        repository, sha = self._commit(name, revision or "main")
        self._send_json(
            {"id": name, "sha": sha, "siblings": [{"rfilename": p} for p in repository.commits[sha]]}
        )

    def _resolve(self, name, revision, path):
        repository, sha = self._commit(name, revision)
        if repository.gated and not self._known():
            raise _Refused(401, "GatedRepo")
        content = repository.commits[sha].get(path)
        if content is None:
            raise _Refused(404, "EntryNotFound")
        headers = {"X-Repo-Commit": sha}
        if not path.endswith(LARGE):
            self._send(content, headers={**headers, "ETag": f'"{_git(content)}"'})
            return
        digest = hashlib.sha256(content).hexdigest()
        self.hub.large[digest] = content
        headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content))}
        self._send(b"", 302, {**headers, "Location": f"{self.hub.aside}/{digest}"})

    def _large(self, digest):
        assert "Authorization" not in self.headers, "a token was sent to a host that is not the Hub's"
        if self.command == "PUT":
            assert hashlib.sha256(self._body).hexdigest() == digest
            self.hub.large[digest] = self._body
            self._send(b"")
        else:
            self._send(self.hub.large[digest])

    # --- pushing ----------------------------------------------------------------------------------

    def _may_write(self):
        if not self._known():
            raise _Refused(401, "")

    def _create(self):
        self._may_write()
        asked = json.loads(self._body)
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.hub.repositories:
            self._send(json.dumps({"url": f"{self.hub.url}/{name}"}).encode(), 409)
            return
        self.hub.repository(name, private=asked.get("visibility") == "private").commit(
            {".gitattributes": b""}
        )
        self._send_json({"url": f"{self.hub.url}/{name}"})

    def _branch(self, name, branch):
        self._may_write()
        repository = self._repository(name)
        repository.names.setdefault(branch, repository.at("main"))
        self._send(b"")

    def _check_card(self):
        self._send_json({"warnings": [], "errors": []})

    def _how_to_upload(self, name, revision):
        self._commit(name, revision)
        files = [file["path"] for file in json.loads(self._body)["files"]]
        modes = {path: "lfs" if path.endswith(LARGE) else "regular" for path in files}
        self._send_json(
            {"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]}
        )

    def _where_to_upload(self, name):
        self._may_write()
        objects = json.loads(self._body)["objects"]
        actions = [{"upload": {"href": f"{self.hub.aside}/{found['oid']}"}} for found in objects]
        self._send_json(
            {
                "objects": [{**o, "actions": a} for o, a in zip(objects, actions, strict=True)],
                "transfer": "basic",
            }
        )

    def _write(self, name, branch):
        self._may_write()
        files = {}
        for line in self._body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
        sha = self._repository(name).commit(files, branch)
        self._send_json({"commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "commitOid": sha})


_NAME = r"([\w.-]+/[\w.-]+)"
_ROUTES = (
    (rf"/api/models/{_NAME}(?:/revision/(.+))?", _Handler._about),
    (rf"/api/models/{_NAME}/branch/(.+)", _Handler._branch),
    (rf"/api/models/{_NAME}/preupload/(.+)", _Handler._how_to_upload),
    (rf"/api/models/{_NAME}/commit/(.+)", _Handler._write),
    (rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler._where_to_upload),
    (rf"/{_NAME}/resolve/(\w+)/(.+)", _Handler._resolve),
    (r"/aside/(\w+)", _Handler._large),
    (r"/api/repos/create", _Handler._create),
    (r"/api/validate-yaml", _Handler._check_card),
)


def _git(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def hub_at(url, cache, monkeypatch):
    """This process's huggingface_hub at another endpoint and cache, which it reads from the environment on import."""
    from huggingface_hub import constants

    from pipeline.storage import hub

    with monkeypatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", url)
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        patch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
        patch.setattr(hub, "_known", {})
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # another protocol for large files
        patch.delenv("HF_TOKEN", raising=False)
        yield patch

"""Processes of this machine that outlive the one that started them, found again by a folder."""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import psutil

HOST = "127.0.0.1"
START_SECONDS = 300  # of a busy machine; 20 of an idle one
_Self = TypeVar("_Self", bound="Processes")


class StartError(RuntimeError):
    """A service ended or did not answer; the message holds the end of its log."""


@dataclass
class Processes:
    """Processes by name, and the environment that they and their clients share.

    Args:
        folder: holds logs, the services' data, and who runs (`state.json`).
        environment: of services and clients beside this process's own.
        preferred_ports: by service; a service without one, or whose port is taken, gets a free one.
    """

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)
    pids: dict[str, int] = field(default_factory=dict)
    ports: dict[str, int] = field(default_factory=dict)
    preferred_ports: dict[str, int] = field(default_factory=dict)

    def _port(self, name: str) -> int:
        wanted = self.ports.get(name, self.preferred_ports.get(name, 0))
        self.ports[name] = wanted if wanted and _is_free(wanted) else free_port()
        return self.ports[name]

    def _secret(self, name: str, size: int) -> str:
        return self.environment.setdefault(name, secrets.token_hex(size))

    def _env(self, own: dict[str, str]) -> dict[str, str]:
        # A cluster that the shell happens to know must not be the one that these processes join.
        kept = {
            k: v
            for k, v in os.environ.items()
            if k not in ("RAY_ADDRESS", "AWS_PROFILE", "AWS_SESSION_TOKEN")
        }
        # What is submitted says `python`, and means the one with our packages.
        path = f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', '')}"
        return {**kept, "PATH": path, **self.environment, **own}

    def _start(self, name: str, command: list[str], own: dict[str, str]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self._log(name), "wb") as log:
            process = subprocess.Popen(
                command,
                env=self._env(own),
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self.pids[name] = process.pid
        self.save()

    def _wait(self, name: str, ready: Callable[[], bool]) -> None:
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end and _began(self.pids[name]) < math.inf:
            if ready():
                return
            time.sleep(0.2)
        log = self._log(name)
        raise StartError(
            f"{name} did not start; the end of {log}:\n{log.read_text(errors='replace')[-2000:]}"
        )

    def _log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def family(self, name: str) -> list[psutil.Process]:
        """A service's process and all that it started."""
        try:
            process = psutil.Process(self.pids[name])
            return [process, *process.children(recursive=True)]
        except (psutil.NoSuchProcess, KeyError):
            return []

    def kill(self, name: str) -> None:
        """SIGKILL of a service with all that it started, as when its machine is gone."""
        for process in self.family(name):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._forget(name)

    def stop(self, name: str, seconds: float = 15) -> None:
        """SIGTERM, and SIGKILL for what is left after some seconds."""
        family = self.family(name)
        for process in family[:1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGTERM)
        _, alive = psutil.wait_procs(family, seconds)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, 5)
        self._forget(name)

    def _forget(self, name: str) -> None:
        pid = self.pids.pop(name, None)
        if pid is not None:
            with contextlib.suppress(ChildProcessError):  # started by another process
                os.waitpid(pid, os.WNOHANG)
        self.save()

    def save(self) -> None:
        """Writes `state.json` and `env`; only their owner can read the passwords in them."""
        self.folder.mkdir(parents=True, exist_ok=True)
        pids = {name: [pid, _began(pid)] for name, pid in self.pids.items()}
        state = {"pids": pids, "ports": self.ports, "environment": self.environment}
        exports = "".join(f"export {k}={shlex.quote(v)}\n" for k, v in sorted(self.environment.items()))
        exports += f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH\n"
        for name, content in (("state.json", json.dumps(state, indent=2) + "\n"), ("env", exports)):
            path = self.folder / name
            path.touch(mode=0o600)
            path.write_text(content)

    @classmethod
    def load(cls: type[_Self], folder: Path) -> _Self:
        """Those of a folder that still run, with their environment; none where there is no such folder."""
        found = cls(folder)
        with contextlib.suppress(FileNotFoundError):
            state = json.loads((folder / "state.json").read_text())
            found.environment, found.ports = state["environment"], state["ports"]
            # After a crash or a reboot a number may be another process's, which began at another time.
            known = state["pids"].items()
            found.pids = {name: pid for name, (pid, at) in known if abs(_began(pid) - at) < 5}
        return found


def _began(pid: int) -> float:
    """When a process began, in seconds since 1970; infinity where it has ended."""
    try:
        process = psutil.Process(pid)
        return math.inf if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.NoSuchProcess:
        return math.inf


def _is_free(port: int) -> bool:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((HOST, port))
        except OSError:
            return False
        return True


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind((HOST, 0))
        return sock.getsockname()[1]

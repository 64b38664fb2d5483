"""Real Ray clusters of several nodes for tests, and what they need to look at them and to hurt them."""

import contextlib
import json
import os
import subprocess
import sys
import time

from helpers import command_line

from cluster.local import LocalCluster
from pipeline.config import with_overrides

# A killed node is noticed in seconds, not in half a minute.
FAST_HEALTH_CHECKS = {"initial_delay_ms": 2000, "period_ms": 1000, "timeout_ms": 5000, "failure_threshold": 3}
FAST_HEALTH_CHECKS = {f"RAY_health_check_{name}": str(value) for name, value in FAST_HEALTH_CHECKS.items()}
SMALL_STORE = ("--object-store-memory=200000000",)


def processes(cluster, node, title):
    """Processes of a node by what Ray calls them, `ray::RayTrainWorker…`."""
    return [process for process in cluster.family(node) if title in command_line(process)]


class ClusterJob:
    """A job's driver that is connected to a cluster, started as a user starts it, or submitted."""

    def __init__(self, command, environment, log):
        self._log = log
        with open(log, "wb") as errors:
            self.popen = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
            )

    def output(self):
        return self._log.read_text(errors="replace")

    def running(self):
        return self.popen.poll() is None

    def end(self, timeout=600):
        """Exit code, and the summary (None where there is none)."""
        out, _ = self.popen.communicate(timeout=timeout)
        lines = [line for line in out.splitlines() if line.startswith('{"job": ')]
        return self.popen.returncode, json.loads(lines[-1]) if lines else None

    def finish(self, timeout=600):
        code, summary = self.end(timeout)
        assert code == 0, f"{summary}\n{self.output()[-4000:]}"
        return summary


class Cluster(LocalCluster):
    """A `LocalCluster` of Ray nodes alone, with a tail for jobs."""

    def node_ids(self):
        """Ray's ids of the nodes that are alive."""
        code = (
            "import json, logging, ray; ray.init(address='auto', logging_level=logging.ERROR)\n"
            "print(json.dumps([n['NodeID'] for n in ray.nodes() if n['Alive']]))"
        )
        command, options = [sys.executable, "-c", code], {"capture_output": True, "text": True, "check": True}
        result = subprocess.run(command, env=self.job_environment(), **options)
        return json.loads(result.stdout.splitlines()[-1])

    def job_environment(self):
        return {**os.environ, **self.environment, "RAY_ADDRESS": self.address, "OMP_NUM_THREADS": "1"}

    def job(self, name, config, *arguments):
        """Starts an entry point that connects to this cluster."""
        path = self._config(config)
        command = [sys.executable, "-m", f"jobs.{name}", str(path), *arguments]
        return ClusterJob(command, self.job_environment(), self._next("log"))

    def submit(self, name, config, *arguments):
        """Submits a stage with jobs/submit.sh."""
        environment = {**os.environ, **self.environment}
        environment["PATH"] = f"{os.path.dirname(sys.executable)}{os.pathsep}{environment['PATH']}"
        command = ["jobs/submit.sh", name, str(self._config(config)), *arguments]
        return ClusterJob(command, environment, self._next("log"))

    def _config(self, config):
        path = self._next("yaml")
        path.write_text(with_overrides(config, {"ray.teacher_cpus": 0.8}).to_yaml())
        return path

    def _next(self, suffix):
        return self.folder / f"job-{time.monotonic_ns()}.{suffix}"


@contextlib.contextmanager
def running_cluster(folder, nodes, environment=None, head_cpus=0, options=SMALL_STORE):
    """A head and further nodes of one CPU each; `nodes` counts the head too, which has none to run drivers only."""
    cluster = Cluster(folder, {"OMP_NUM_THREADS": "1", **FAST_HEALTH_CHECKS, **(environment or {})})
    try:
        cluster.start_head(head_cpus, *options)
        for number in range(1, nodes):
            cluster.start_worker(f"node-{number}", 1, *options)
        yield cluster
    finally:
        cluster.stop_all()

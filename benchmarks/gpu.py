"""`python -m benchmarks.gpu [PART …]`: the first half an hour on a GPU, in parts of less than ten minutes.

Each part says what it found beside what is expected, in the JSON file as soon as it is done and in the table at the
end; a part that was run before keeps its findings until it is run again. Without numbers all parts run in turn.
Needs neither Ray nor MLflow nor av.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_runs, gpu_steps
from benchmarks.gpu_steps import Finding, Scale
from benchmarks.report import machine

PARTS: dict[int, tuple[str, Callable[[Scale, Path], list[Finding]]]] = {
    1: ("versions and flags", gpu_steps.environment),
    2: ("training on the CPU and on the GPU", gpu_runs.equality),
    3: ("the teacher at several batch sizes, with and without TF32", gpu_steps.teacher_rounding),
    4: ("profile of one step", gpu_steps.profile),
    5: ("ways to distil", gpu_steps.ways),
    6: ("changes to a step, each alone", gpu_steps.changes),
    7: ("training from files, by threads of the loader", gpu_runs.loading),
    8: ("stopped, and resumed on the GPU and on the CPU", gpu_runs.resuming),
    9: ("targets: written and verified", gpu_runs.targets),
    10: ("one worker of a group", gpu_steps.one_worker),
}


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("parts", nargs="*", type=int, metavar="PART", help=_list_of_parts())
    parser.add_argument(
        "--json", type=Path, default=Path("gpu.json"), help="the findings (default: %(default)s)"
    )
    parser.add_argument("--batch", type=int, default=16, help="clips a step (default: %(default)s)")
    parser.add_argument(
        "--tiny", action="store_true", help="tiny sizes on any machine: checks that it runs, measures nothing"
    )
    arguments = parser.parse_args(words)
    unknown = sorted(set(arguments.parts) - set(PARTS))
    if unknown:
        parser.error(f"there is no part {unknown[0]}; parts: {_list_of_parts()}")
    if arguments.batch < 1:
        parser.error(f"--batch {arguments.batch}: must be at least 1")
    if not torch.cuda.is_available() and not arguments.tiny:
        parser.error(
            f"PyTorch {torch.__version__} sees no CUDA device here; on a machine without one --tiny checks that the "
            "parts run, and `python -m benchmarks` measures the CPU"
        )
    scale = Scale.tiny() if arguments.tiny else Scale.paper(arguments.batch)
    results = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
    failed = False
    for number in arguments.parts or PARTS:
        results[str(number)] = _run(number, scale)
        failed |= results[str(number)]["error"] is not None
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")
    print("\n".join(table(results)))
    return int(failed)


def _list_of_parts() -> str:
    return "; ".join(f"{number} {title}" for number, (title, _) in PARTS.items())


def _run(number: int, scale: Scale) -> dict[str, Any]:
    title, part = PARTS[number]
    print(f"part {number}: {title} …", file=sys.stderr, flush=True)
    began, error, findings = time.monotonic(), None, []
    with tempfile.TemporaryDirectory() as scratch:
        try:
            findings = part(scale, Path(scratch))
        except Exception as raised:  # the other parts are worth having
            traceback.print_exc()
            error = f"{type(raised).__name__}: {raised}"
    return {
        "title": title,
        "tiny": scale.is_tiny,
        "machine": machine(),
        "seconds": round(time.monotonic() - began, 1),
        "findings": [asdict(finding) for finding in findings],
        "error": error,
    }


def table(results: dict[str, Any]) -> list[str]:
    """Markdown lines of the findings of all parts, in their order."""
    lines = ["| found | value | expected | holds |", "| --- | ---: | --- | --- |"]
    for number in sorted(results, key=int):
        part = results[number]
        note = ", tiny sizes: no measurement" if part["tiny"] else ""
        lines.append(f"| **{number} {part['title']}** ({part['seconds']:.0f} s{note}) | | | |")
        if part["error"]:
            lines.append(f"| failed: {part['error'].splitlines()[0]} | | | no |")
        for row in part["findings"]:
            value = f"{row['value']:.4g}" if isinstance(row["value"], float) else str(row["value"])
            holds = {True: "yes", False: "**no**", None: ""}[row["holds"]]
            lines.append(f"| {row['name']} | {value} | {row['expected']} | {holds} |")
    return lines


if __name__ == "__main__":
    sys.exit(main())

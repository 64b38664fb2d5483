"""`python -m benchmarks`: measures the training step, the scores, `shard`, `cache` and `evaluate`, the loader, the
memory of an evaluation, and how the stages grow with the number of videos, and prints tables.

Times never fail; ways of doing the same work that give different results do (exit code 1).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from benchmarks.loader import Feeding, loader_comparisons, tiny_feeding
from benchmarks.memory import memory_report
from benchmarks.report import machine, table
from benchmarks.scale import measure_scale, scale_report
from benchmarks.scores import ScoreMismatch, score_comparison
from benchmarks.stages import (
    Load,
    cache_comparison,
    evaluate_comparison,
    ray_started,
    shard_comparison,
    tiny_load,
)
from benchmarks.step import LossMismatch, paper_sizes, step_comparison, tiny_sizes


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="of the step; the stages run half as often")
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes: checks that it runs, measures nothing"
    )
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    arguments = parser.parse_args()
    if arguments.repeats < 1:
        parser.error(f"--repeats {arguments.repeats}: must be at least 1")
    quick, repeats = arguments.quick, arguments.repeats

    host = machine()
    print("## Benchmarks" + (" (tiny sizes: no measurement)" if quick else ""))
    print(", ".join(f"{key}: {value}" for key, value in host.items()) + "\n", flush=True)
    try:
        comparisons = [
            *(step_comparison(sizes, repeats) for sizes in ([tiny_sizes()] if quick else paper_sizes())),
            score_comparison(repeats, **({"frames": 3, "side": 32} if quick else {})),
        ]
    except (LossMismatch, ScoreMismatch) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    load, repeats = tiny_load() if quick else Load(), (repeats + 1) // 2
    with tempfile.TemporaryDirectory() as scratch, ray_started() as started:
        comparisons.append(shard_comparison(load, repeats, Path(scratch), real=not quick))
        comparisons[-1].notes.append(started)
        comparisons.append(cache_comparison(load, repeats, Path(scratch)))
        comparisons.append(evaluate_comparison(load, repeats, Path(scratch)))
        comparisons += loader_comparisons(tiny_feeding() if quick else Feeding(), repeats, Path(scratch))
    print(table(comparisons))
    memory = memory_report(lengths=(8, 16), side=56) if quick else memory_report()
    print("\n".join(f"- memory of evaluating one video: {line}" for line in memory))
    points, index = measure_scale(20, (1,), index=1000) if quick else measure_scale()
    print("\n" + scale_report(points, index))
    if arguments.json:
        results = {
            "machine": host,
            "comparisons": [c.to_dict() for c in comparisons],
            "memory": memory,
            "scale": [asdict(point) for point in points],
        }
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

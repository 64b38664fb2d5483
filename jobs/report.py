"""The paper's tables from recorded evaluations, as Markdown and HTML: python -m jobs.report [CONFIG]

CONFIG is configs/demo.yaml where none is given.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from jobs._main import Parser, refuse, report, split_settings
from pipeline.config import Config, ConfigError, load_config

DEMO = Path(__file__).parents[1] / "configs" / "demo.yaml"


def main() -> int:
    parser = Parser(
        "python -m jobs.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", metavar="CONFIG | section.key=value")
    parser.add_argument("--folder", help="where to write; default: <storage.root>/report")
    parser.add_argument(
        "--latency-runs", type=int, default=5, metavar="N", help="timed passes of each model; 0: none"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config and stop")
    arguments = parser.parse_intermixed_args()

    try:
        config = _load(arguments)
    except ConfigError as error:
        return refuse("report", error)
    if arguments.dry_run:
        print(config.to_yaml(), end="")
        return 0

    def work() -> dict[str, object]:
        from pipeline.report import stage

        return stage.report(config, arguments.folder, latency_runs=arguments.latency_runs)

    return report("report", work)


def _load(arguments: argparse.Namespace) -> Config:
    paths, settings = split_settings(arguments.words)
    if len(paths) > 1:
        raise ConfigError(f"{paths[1]!r} is not of the form section.key=value")
    if arguments.latency_runs < 0:
        raise ConfigError(f"--latency-runs: {arguments.latency_runs} must be at least 0; nearest valid: 0")
    return load_config(paths[0] if paths else DEMO, [f"{key}={value}" for key, value in settings.items()])


if __name__ == "__main__":
    sys.exit(main())

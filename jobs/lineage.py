"""Where a registered model comes from, back to its videos: python -m jobs.lineage models:/slotmatch@champion

Settings: mlflow.tracking_uri=URI (default $MLFLOW_TRACKING_URI), or storage.root=DIR for its SQLite file.
The exit code is 1 where a link of the chain is missing.
"""

from __future__ import annotations

import argparse
import sys

from jobs._main import REGISTRY_SETTINGS, Parser, check_settings, registry_uri, report, split_settings
from pipeline.config import ConfigError


def main() -> int:
    parser = Parser(
        "python -m jobs.lineage", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="models:/NAME@ALIAS or models:/NAME/VERSION")
    parser.add_argument("settings", nargs="*", metavar="key=value")
    parser.add_argument("--videos", action="store_true", help="list every video, not the first few")
    arguments = parser.parse_intermixed_args()
    words, settings = split_settings(arguments.settings)
    complete = True

    def work() -> dict[str, object]:
        nonlocal complete
        from pipeline.registry.lineage import trace

        if words:
            raise ConfigError(f"{words[0]!r} is not of the form key=value")
        check_settings(settings, REGISTRY_SETTINGS)
        found = trace(arguments.model, registry_uri(settings))
        print(found.tree(all_videos=arguments.videos))
        complete = not found.missing
        return found.summary()

    return report("lineage", work) or int(not complete)


if __name__ == "__main__":
    sys.exit(main())

"""Write a registered model as safetensors + config: python -m jobs.pull models:/slotmatch@champion DIR

Settings: mlflow.tracking_uri=URI (default $MLFLOW_TRACKING_URI), or storage.root=DIR for its SQLite file.
"""

from __future__ import annotations

import argparse
import sys

from jobs._main import REGISTRY_SETTINGS, Parser, check_settings, registry_uri, report, split_settings
from pipeline.config import ConfigError


def main() -> int:
    parser = Parser(
        "python -m jobs.pull", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="models:/NAME@ALIAS or models:/NAME/VERSION")
    parser.add_argument("folder")
    parser.add_argument("settings", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    words, settings = split_settings(arguments.settings)

    def work() -> dict[str, object]:
        from pipeline.registry.stage import pull

        if words:
            raise ConfigError(f"{words[0]!r} is not of the form key=value")
        check_settings(settings, REGISTRY_SETTINGS)
        return pull(arguments.model, arguments.folder, registry_uri(settings))

    return report("pull", work)


if __name__ == "__main__":
    sys.exit(main())

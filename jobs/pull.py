"""Write a registered model as safetensors + config: python -m jobs.pull models:/slotmatch@champion DIR

Settings: mlflow.tracking_uri=URI (default $MLFLOW_TRACKING_URI), or storage.root=DIR for its SQLite file.
"""

from __future__ import annotations

import argparse
import sys

from jobs._main import registry_config, report, split_settings


def main() -> int:
    parser = argparse.ArgumentParser(
        "python -m jobs.pull", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="models:/NAME@ALIAS or models:/NAME/VERSION")
    parser.add_argument("folder")
    parser.add_argument("settings", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    _, settings = split_settings(arguments.settings)

    def work() -> dict[str, object]:
        from pipeline.registry import pull

        return pull(arguments.model, arguments.folder, registry_config(settings).tracking_uri)

    return report("pull", work)


if __name__ == "__main__":
    sys.exit(main())

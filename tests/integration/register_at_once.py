"""A process of its own for test_mlflow_faults: CONFIG GO hold | CONFIG GO race SHARED_RUN RUN LUCKY_RUN SCORE"""

import sys
import time
from pathlib import Path

from students import evaluation, refuse_export

from pipeline import tracking
from pipeline.config import load_config, with_overrides
from pipeline.registry import lock as registry_lock
from pipeline.registry import pack
from pipeline.registry.stage import register_run, set_champion


def hold(config):
    """Until it is killed."""
    with registry_lock.registry_lock(tracking.connect(config), config.mlflow.model_name):
        print("holds it", flush=True)
        time.sleep(1000)


def race(config, go, shared, run, lucky, score):
    """Registers by itself, then as a sweep of two students."""
    registry_lock.SECONDS_UNTIL_BROKEN = 30.0
    pack.trace = refuse_export
    print("ready", flush=True)
    while not Path(go).exists():
        time.sleep(0.01)
    register_run(config, shared, evaluation(0.25))
    register_run(config, run, evaluation(float(score)))
    swept = with_overrides(config, {"mlflow.model_name": f"{config.mlflow.model_name} swept"})
    chosen = register_run(swept, run, evaluation(float(score)), contend=False)["version"]
    rival = register_run(swept, lucky, evaluation(1 - float(score)), contend=False)["version"]
    set_champion(swept, chosen, {chosen, rival})


if __name__ == "__main__":
    _, config_file, go, what, *arguments = sys.argv
    if what == "hold":
        hold(load_config(config_file))
    else:
        race(load_config(config_file), go, *arguments)

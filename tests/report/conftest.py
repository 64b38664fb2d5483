"""Records as `pipeline.evaluate.records` gives them, without the runs behind them."""

import itertools
from dataclasses import asdict

import pytest

from pipeline.artifacts.manifests import Rules
from pipeline.config.protocols import PRESETS
from pipeline.evaluate.records import Record
from pipeline.models import CheckpointHints
from pipeline.report import costs

_counted = {}


@pytest.fixture
def counted_once(monkeypatch):
    """The paper's models take seconds to count, which one test of them all should spend."""
    count = costs.count_cost

    def counted(config):
        if repr(config) not in _counted:
            _counted[repr(config)] = count(config)
        return _counted[repr(config)]

    monkeypatch.setattr(costs, "count_cost", counted)


@pytest.fixture
def record():
    """Makes a record; the first one made counts as the latest."""
    numbers = itertools.count()

    def make(method, *, score=0.5, scores=None, protocol="slotcontrast", clips="c0ffee", **values):
        model = method != "baseline"
        name = values.pop("name", method)
        dataset = values.pop("dataset", "YTVIS-2021")
        defaults = {
            "uri": "evaluations/e",
            "trained_on": dataset if model else "",
            "teacher": "SlotContrast" if model and method != "no_kd" else "",
            "system": "",
            "beta": 0.2 if method.startswith("slotmatch") else None,
            "seed": 42 if model else None,
            "steps": 1000 if model else None,
            "settings": "s" if model else "",
            "precision": "",
            "model_uri": None,
            "hints": CheckpointHints(),
            "videos": 60,
        }
        rules = {"name": protocol, "fingerprint": f"{protocol}-rules", "in_words": f"the rules of {protocol}"}
        levels = ("image_fg_ari", "image_mbo", "video_fg_ari", "video_mbo")
        return Record(
            clips_uri=f"root/clips/{clips}",
            method=method,
            name=name,
            dataset=dataset,
            protocol=Rules(**{**asdict(PRESETS["slotcontrast"]), **rules}),
            scores={**dict.fromkeys(levels, score), "slots_in_use": 5.0, **(scores or {})},
            run_id=f"run{next(numbers)}",
            **{**defaults, **values},
        )

    return make

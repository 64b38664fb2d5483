"""Which models are in the table "Deployed", and where their exported forms are: those that were scored with the rest.

A folder of `export` belongs to the model whose weights it names, wherever either of them lies.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline import storage
from pipeline.evaluate.records import METHODS, Record
from pipeline.log import log
from pipeline.models import CheckpointHints, SlotModelConfig
from pipeline.models.build import load_model
from pipeline.models.checkpoints import CONFIG_FILE
from pipeline.models.export import exportable, hash_weights
from pipeline.models.exported import is_exported
from pipeline.registry.export import ABOUT_FILE
from pipeline.report.deployed import FORMS, OWN, Deployed
from pipeline.report.efficiency import count_parameters
from pipeline.report.scores import protocol_note
from pipeline.report.select import SLOTMATCH, TEACHER, main_evaluation


@dataclass(frozen=True)
class Found:
    """The models of the report's main evaluation: the teacher, and a student of each size, the largest first."""

    models: tuple[Deployed, ...]
    notes: tuple[str, ...]
    run_ids: frozenset[str]  # of the records that the table shows
    form_ids: frozenset[str]  # of those of them that are exported forms


@dataclass(frozen=True)
class _Export:
    """A folder that `export` wrote."""

    config: Any  # as JSON has it
    weights: str
    uris: Mapping[str, str]  # of the forms

    def is_of(self, config: SlotModelConfig) -> bool:
        return bool(self.config == json.loads(json.dumps(config.to_dict())))


def find_deployed(records: Sequence[Record], beta: float) -> Found:
    """Of each architecture the run that was exported; else SlotMatch with weight `beta`, most steps, the latest.

    Args:
        records: all evaluations, the latest first.
    """
    group = main_evaluation(records)
    forms: dict[str, Record] = {}
    kinds: dict[tuple[bool, str], list[tuple[Record, SlotModelConfig]]] = {}
    for record in group:
        uri = record.model_uri
        if uri is not None and is_exported(uri):
            forms.setdefault(uri, record)
        elif uri is not None and (config := _config(record)) is not None:
            kinds.setdefault((record.method != TEACHER, repr(config)), []).append((record, config))
    exports = _exports(forms)
    models: dict[str, Deployed] = {}  # by the id of the model's run
    for candidates in kinds.values():
        config = candidates[0][1]
        same = [export for export in exports if export.is_of(config)]
        record, uris = _choose([record for record, _ in candidates], same, beta)
        scores = {key: forms[uri].scores for key, uri in uris.items() if uri in forms}
        models[record.run_id] = Deployed(
            record.name if record.method == "other" else METHODS[record.method],
            config,
            {OWN: str(record.model_uri), **uris},
            record.hints,
            {OWN: record.scores, **scores},
        )
    students = {record.run_id: record.method != TEACHER for record in group}
    order = sorted(models, key=lambda run: (students[run], -count_parameters(models[run].config)))
    shown = {uri for model in models.values() for uri in model.uris.values()}
    form_ids = frozenset(record.run_id for uri, record in forms.items() if uri in shown)
    notes = (protocol_note(group[0]),) if models else ()
    return Found(tuple(models[run] for run in order), notes, form_ids | frozenset(models), form_ids)


def _config(record: Record) -> SlotModelConfig | None:
    """The model's architecture; None where the model was deleted or damaged: the report has more to show."""
    assert record.model_uri is not None
    own = storage.join(record.model_uri, CONFIG_FILE)
    try:
        if storage.exists(own):
            values = storage.read_json(own)
            if "system" in values:
                raise ValueError(f"of {values['system']} there is no exported form")
            return SlotModelConfig.from_dict(values)
        return exportable(load_model(record.model_uri, record.hints), record.name).config
    except (KeyError, TypeError, ValueError, OSError) as error:
        log(f"report: {record.name} is not in the table of deployed models: {error}")
        return None


def _exports(uris: Mapping[str, Any]) -> list[_Export]:
    """What the folders of exported files say of them; one that is gone, or of an earlier version, says nothing."""
    found = []
    for folder in dict.fromkeys(uri.rpartition("/")[0] for uri in uris):
        try:
            about = storage.read_json(storage.join(folder, ABOUT_FILE))
            there = {file: storage.join(folder, file) for file in FORMS if file in about["forms"]}
            found.append(_Export(about["config"], about["weights"], there))
        except (KeyError, TypeError, ValueError, OSError) as error:
            log(f"report: {folder} does not say of which weights it is ({error!r}): export that model again")
    return found


def _choose(
    records: Sequence[Record], exports: Sequence[_Export], beta: float
) -> tuple[Record, dict[str, str]]:
    """One of the records, which are of one architecture, and the places of its exported forms."""

    def first(record: Record) -> tuple[bool, bool, int]:
        return record.method != SLOTMATCH, record.beta != beta, -(record.steps or 0)

    ordered = sorted(records, key=first)  # keeps the latest first among equals
    for record in ordered if exports else []:
        own = _weights(record.model_uri, record.hints)
        uris: dict[str, str] = {}
        for export in exports:
            uris = {**export.uris, **uris} if export.weights == own else uris
        if uris:
            return record, uris
    return ordered[0], {}


def _weights(uri: str | None, hints: CheckpointHints) -> str | None:
    try:
        return hash_weights(load_model(str(uri), hints))
    except (ValueError, OSError):  # its files are damaged or gone, but for its config
        return None

"""The paper's Tables 1, 3 to 7 and 10 from recorded evaluations (Table 2 is in `costs`).

Every table appears, with dashes where nothing was recorded. A data set that the paper does not have gets its
own part of the tables that its records can fill.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from pipeline.config import Config
from pipeline.records import METHODS, Record
from pipeline.report.parts import (
    COCO,
    DAVIS,
    MOVI_E,
    OTHER_TEACHERS,
    OVIS,
    TEACHER,
    YTVIS,
    Part,
    recorded_parts,
)
from pipeline.report.scores import Wanted, accepts, baseline_rows, score_table
from pipeline.report.seeds import seed_table
from pipeline.report.table import DASH, Column, Table, listing, plural

PAPER_BETA = 0.2
METHOD = Column("method", numeric=False)


def paper_numbers() -> dict[str, Any]:
    """What the paper prints, see `paper.yaml`."""
    return yaml.safe_load(Path(__file__).with_name("paper.yaml").read_text(encoding="utf-8"))


def score_tables(config: Config, records: Sequence[Record]) -> list[Table]:
    """Tables 1, 3, 4, 5, 6, 7 and 10 in this order; `records` come the latest first."""
    paper = paper_numbers()
    beta = config.distill.beta or PAPER_BETA
    recorded = recorded_parts(records)
    own_tables = (OVIS, *OTHER_TEACHERS, COCO)

    def parts(of_paper: Sequence[Part], worth: Callable[[Sequence[Record]], bool]) -> list[Part]:
        """The paper's parts, and the others that were recorded and are worth a table; first what has runs."""
        rest = [part for part in recorded if part not in (*of_paper, *own_tables)]
        every = [*of_paper, *(part for part in rest if worth(part.of(records)))]
        return sorted(every, key=lambda part: not part.of(records))

    tables = [
        _table_1(part, records, paper, beta) for part in parts((MOVI_E, YTVIS, DAVIS), lambda found: True)
    ]
    tables.append(_table_3(records, paper, beta))
    tables += [
        _table_4(part, records, paper, beta) for part in parts((YTVIS,), lambda f: bool(_betas(f) - {beta}))
    ]
    tables += [
        _table_5(part, records, paper, beta) for part in parts((MOVI_E,), _has_method("slotmatch_hungarian"))
    ]
    tables += [_table_6(records, paper, beta), _table_7(records, paper, beta)]
    tables += [
        seed_table(part, records, paper["table_10"], beta)
        for part in parts((YTVIS,), _has_method("slotmatch"))
    ]
    return tables


def _has_method(method: str) -> Callable[[Sequence[Record]], bool]:
    return lambda records: any(record.method == method for record in records)


def _beta_note(beta: float, found: Sequence[Record]) -> list[str]:
    """Which weight our SlotMatch rows have."""
    if not found:
        return []
    paper = "" if beta == PAPER_BETA else f", the paper's with β = {PAPER_BETA:g}"
    return [f"Our SlotMatch rows are with β = {beta:g}{paper}."]


def _betas(records: Sequence[Record]) -> set[float]:
    return {record.beta for record in records if record.method == "slotmatch" and record.beta}


def _rows(lines: Sequence[dict[str, Any]], beta: float) -> list[Wanted]:
    """Rows from those of `paper.yaml`; SlotMatch without a weight is the one with weight `beta`."""
    rows = []
    for line in lines:
        method = line.get("method")
        weight = line.get("beta", beta if method == "slotmatch" else None)
        rows.append(Wanted(line["label"], accepts(method, weight, line.get("teacher")), line.get("scores")))
    return rows


def _table_1(part: Part, records: Sequence[Record], paper: dict[str, Any], beta: float) -> Table:
    printed = part in (MOVI_E, YTVIS, DAVIS)
    lines = [
        {**line, "scores": line["scores"].get(part.dataset) if printed else None}
        for line in paper["table_1"]
        if "method" in line or part.dataset in line["scores"]
    ]
    if not printed:
        lines = [
            {
                **line,
                "label": METHODS[line["method"]]
                if line["method"] != "teacher"
                else f"{part.family} (teacher)",
            }
            for line in lines
            if "method" in line
        ]
    found = part.of(records)
    return score_table(
        "Table 1",
        "Video object segmentation",
        part.title,
        [*_rows(lines, beta), *baseline_rows(found)],
        found,
        paper=printed,
        beta=beta,
        notes=_beta_note(beta, found),
    )


def _table_3(records: Sequence[Record], paper: dict[str, Any], beta: float) -> Table:
    found = OVIS.of(records)
    lines = list(paper["table_3"])
    printed = {line["method"] for line in lines}
    recorded = {record.method for record in found} - printed - {"baseline"}
    lines += [{"label": label, "method": key} for key, label in METHODS.items() if key in recorded]
    return score_table(
        "Table 3",
        "Zero-shot generalisation to OVIS of models trained on YTVIS-2021",
        "",
        [*_rows(lines, beta), *baseline_rows(found)],
        found,
        beta=beta,
        notes=_beta_note(beta, found),
    )


def _table_4(part: Part, records: Sequence[Record], paper: dict[str, Any], beta: float) -> Table:
    printed, found = part == YTVIS, part.of(records)
    fixed = [line for line in paper["table_4"] if line["method"] != "slotmatch"]
    scores = {line["beta"]: line["scores"] for line in paper["table_4"] if "beta" in line} if printed else {}
    weights = sorted(_betas(found) | set(scores))
    wanted = [
        Wanted(line["label"], accepts(line["method"]), line["scores"] if printed else None, (DASH,))
        for line in fixed
    ]
    wanted += [
        Wanted("SlotMatch", accepts("slotmatch", weight), scores.get(weight), (f"{weight:g}",))
        for weight in weights
    ]
    return score_table(
        "Table 4",
        "The weight β of the slot distillation loss",
        part.title,
        [*wanted, *baseline_rows(found, more=1)],
        found,
        lead=(METHOD, Column("β")),
        paper=printed,
        beta=beta,
    )


def _table_5(part: Part, records: Sequence[Record], paper: dict[str, Any], beta: float) -> Table:
    printed, found = part == MOVI_E, part.of(records)
    lines = [{**line, "scores": line["scores"] if printed else None} for line in paper["table_5"]]
    return score_table(
        "Table 5",
        "Slots matched by the Hungarian algorithm, or slot n to slot n",
        part.title,
        [*_rows(lines, beta), *baseline_rows(found)],
        found,
        paper=printed,
        beta=beta,
        notes=_beta_note(beta, found),
    )


def _table_6(records: Sequence[Record], paper: dict[str, Any], beta: float) -> Table:
    run_ids = {record.run_id for part in OTHER_TEACHERS for record in part.of(records)}
    found = [record for record in records if record.run_id in run_ids]
    return score_table(
        "Table 6",
        "Other teachers on DAVIS 2017",
        "",
        [*_rows(paper["table_6"], beta), *baseline_rows(found)],
        found,
        scores=("image_mbo", "video_mbo"),
        beta=beta,
        notes=[
            *_beta_note(beta, found),
            "A student stands below the teacher that it has (or, without distillation, whose design it has).",
        ],
    )


def _table_7(records: Sequence[Record], paper: dict[str, Any], beta: float) -> Table:
    found = COCO.of(records)
    return score_table(
        "Table 7",
        "Images: COCO with DINOSAURv2 as teacher",
        "",
        [*_rows(paper["table_7"], beta), *baseline_rows(found)],
        found,
        scores=("image_fg_ari", "image_mbo"),
        beta=beta,
        notes=_beta_note(beta, found),
    )


def left_out(records: Sequence[Record], tables: Sequence[Table]) -> list[str]:
    """One line for each kind of record that no table accounts for."""
    known = frozenset[str]().union(*(table.run_ids for table in tables))
    kinds: dict[str, list[Record]] = {}
    for record in records:
        if record.run_id not in known:
            where = Part(record.dataset, record.trained_on or record.dataset, record.teacher or TEACHER).title
            weight = f", β = {record.beta:g}" if record.beta else ""
            kinds.setdefault(f"{METHODS.get(record.method, record.method)}{weight} on {where}", []).append(
                record
            )
    return [
        f"{kind}: {plural(len(found), 'evaluation')} ({listing([r.name for r in found])})"
        for kind, found in kinds.items()
    ]

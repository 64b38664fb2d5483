"""The paper's Tables 1, 3 to 7 and 10 from recorded evaluations (Table 2 is in `costs`).

Every table appears, with dashes where nothing was recorded. A data set that the paper does not have gets its
own part of the tables that its records can fill.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.config import Config
from pipeline.evaluate.records import METHODS, RIVALS, Record
from pipeline.evaluate.table import DASH, Cell, Column, Row, Table, listing, one_decimal, plural
from pipeline.report.scores import (
    SAMPLE_STD,
    RowSpec,
    accepts,
    baseline_rows,
    method_table,
    of_system,
    protocol_note,
    run_notes,
    score_columns,
)
from pipeline.report.select import Choice, choose, most_common, scores_in_percent

PAPER_BETA = 0.2
METHOD = Column("method", numeric=False)
SEED_SCORES = ("video_fg_ari", "video_mbo")  # of Table 10


def paper_numbers() -> dict[str, Any]:
    """What the paper prints, see `paper.yaml`."""
    return yaml.safe_load(Path(__file__).with_name("paper.yaml").read_text(encoding="utf-8"))


# --- what a table is about ------------------------------------------------------------------------

TEACHER = "SlotContrast"  # the paper's, but for Tables 6 and 7


@dataclass(frozen=True)
class Setup:
    """What was scored on, and what the models come from: a table, or one part of it, is about one."""

    dataset: str
    trained_on: str
    family: str = TEACHER  # the kind of teacher

    @property
    def title(self) -> str:
        title = self.dataset
        if self.trained_on != self.dataset:
            title += f", trained on {self.trained_on}"
        return title if self.family == TEACHER else f"{title}, teacher {self.family}"

    def of(self, records: Sequence[Record]) -> list[Record]:
        """The records of this setup; one that does not say where it comes from may be from anywhere.

        Where the teacher is another system, its own record is among them.
        """
        here = [r for r in records if self._is_here(r) and r.teacher in ("", self.family)]
        return [record for record in here if self.family != TEACHER or not record.system]

    def rivals(self, records: Sequence[Record]) -> list[Record]:
        """The records of other systems, which stand beside the paper's teacher and its students."""
        return [r for r in records if self._is_here(r) and r.system in RIVALS and self.family == TEACHER]

    def _is_here(self, record: Record) -> bool:
        return record.dataset == self.dataset and record.trained_on in ("", self.trained_on)


MOVI_E = Setup("MOVi-E", "MOVi-E")
YTVIS = Setup("YTVIS-2021", "YTVIS-2021")
DAVIS = Setup("DAVIS 2017", "DAVIS 2017")
OVIS = Setup("OVIS", "YTVIS-2021")
OTHER_TEACHERS = (
    Setup("DAVIS 2017", "DAVIS 2017", "VideoSAUR"),
    Setup("DAVIS 2017", "DAVIS 2017", "VideoSAURv2"),
)
COCO = Setup("COCO", "COCO", "DINOSAURv2")


def recorded_setups(records: Sequence[Record]) -> list[Setup]:
    """All setups that have a record of a model, and data sets that have nothing but baselines.

    A rival's own record makes no setup of its kind of teacher, as students do that learn from it.
    """
    models = [record for record in records if record.method != "baseline"]
    families: dict[tuple[str, str], set[str]] = {}
    for record in models:
        key = (record.dataset, record.trained_on or record.dataset)
        family = TEACHER if record.system in RIVALS else record.teacher
        families.setdefault(key, set()).update({family} - {""})
    known = {dataset for dataset, _ in families} | {OVIS.dataset, COCO.dataset}
    for record in records:
        if record.dataset not in known:
            families.setdefault((record.dataset, record.dataset), set())
    return [Setup(*key, family) for key in sorted(families) for family in sorted(families[key]) or [TEACHER]]


# --- the tables -----------------------------------------------------------------------------------


def score_tables(config: Config, records: Sequence[Record]) -> list[Table]:
    """Tables 1, 3, 4, 5, 6, 7 and 10 in this order; `records` come the latest first."""
    paper = paper_numbers()
    beta = config.distill.beta or PAPER_BETA
    others = [s for s in recorded_setups(records) if s not in (OVIS, *OTHER_TEACHERS, COCO)]

    def setups(of_paper: Sequence[Setup], worth: Callable[[Sequence[Record]], bool]) -> list[Setup]:
        """The paper's, and the others that were recorded and are worth a table; first what has runs."""
        rest = [setup for setup in others if setup not in of_paper and worth(setup.of(records))]
        return sorted([*of_paper, *rest], key=lambda setup: not (setup.of(records) or setup.rivals(records)))

    with_betas = setups((YTVIS,), lambda found: bool(_betas(found) - {beta}))
    return [
        *(_table_1(s, records, paper, beta) for s in setups((MOVI_E, YTVIS, DAVIS), lambda found: True)),
        _table_3(records, paper, beta),
        *(_table_4(s, records, paper, beta) for s in with_betas),
        *(_table_5(s, records, paper, beta) for s in setups((MOVI_E,), _has_method("slotmatch_hungarian"))),
        _table_6(records, paper, beta),
        _table_7(records, paper, beta),
        *(_table_10(s, records, paper, beta) for s in setups((YTVIS,), _has_method("slotmatch"))),
    ]


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


def _rows(lines: Sequence[dict[str, Any]], beta: float, system: str | None = None) -> list[RowSpec]:
    """Rows from those of `paper.yaml`; SlotMatch without a weight is the one with weight `beta`.

    Those of a method are of models of any system, or with `system=""` of slot models alone.
    """
    rows = []
    for line in lines:
        if "system" in line:
            rows.append(RowSpec(RIVALS[line["system"]], of_system(line["system"]), line.get("scores")))
            continue
        method = line.get("method")
        weight = line.get("beta", beta if method == "slotmatch" else None)
        test = accepts(method, weight, line.get("teacher"), system)
        rows.append(RowSpec(line["label"], test, line.get("scores")))
    return rows


def _table_1(setup: Setup, records: Sequence[Record], paper: dict[str, Any], beta: float) -> Table:
    """What the paper prints of the data set, every way to distil, and each rival that was run."""
    printed = setup in (MOVI_E, YTVIS, DAVIS)
    found, rivals = setup.of(records), setup.rivals(records)
    systems = {record.system for record in rivals}
    unprinted = systems - {line.get("system") for line in paper["table_1"]}
    more = [{"label": RIVALS[system], "system": system, "scores": {}} for system in sorted(unprinted)]
    lines = [
        {**line, "scores": line["scores"].get(setup.dataset) if printed else None}
        for line in (*more, *paper["table_1"])
        if "method" in line or line.get("system") in systems or (printed and setup.dataset in line["scores"])
    ]
    if not printed:
        labels = {**METHODS, "teacher": f"{setup.family} (teacher)"}
        lines = [{**line, "label": labels.get(line.get("method", ""), line["label"])} for line in lines]
    run_ids = {record.run_id for record in (*found, *rivals)}
    return method_table(
        "Table 1",
        "Video object segmentation",
        setup.title,
        [*_rows(lines, beta, "" if rivals else None), *baseline_rows(found)],
        [record for record in records if record.run_id in run_ids],
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
    return method_table(
        "Table 3",
        "Zero-shot generalisation to OVIS of models trained on YTVIS-2021",
        "",
        [*_rows(lines, beta), *baseline_rows(found)],
        found,
        beta=beta,
        notes=_beta_note(beta, found),
    )


def _table_4(setup: Setup, records: Sequence[Record], paper: dict[str, Any], beta: float) -> Table:
    printed, found = setup == YTVIS, setup.of(records)
    fixed = [line for line in paper["table_4"] if line["method"] != "slotmatch"]
    scores = {line["beta"]: line["scores"] for line in paper["table_4"] if "beta" in line} if printed else {}
    weights = sorted(_betas(found) | set(scores))
    wanted = [
        RowSpec(line["label"], accepts(line["method"]), line["scores"] if printed else None, (DASH,))
        for line in fixed
    ]
    wanted += [
        RowSpec("SlotMatch", accepts("slotmatch", weight), scores.get(weight), (f"{weight:g}",))
        for weight in weights
    ]
    return method_table(
        "Table 4",
        "The weight β of the slot distillation loss",
        setup.title,
        [*wanted, *baseline_rows(found, more=1)],
        found,
        lead=(METHOD, Column("β")),
        paper=printed,
        beta=beta,
    )


def _table_5(setup: Setup, records: Sequence[Record], paper: dict[str, Any], beta: float) -> Table:
    printed, found = setup == MOVI_E, setup.of(records)
    lines = [{**line, "scores": line["scores"] if printed else None} for line in paper["table_5"]]
    return method_table(
        "Table 5",
        "Slots matched by the Hungarian algorithm, or slot n to slot n",
        setup.title,
        [*_rows(lines, beta), *baseline_rows(found)],
        found,
        paper=printed,
        beta=beta,
        notes=_beta_note(beta, found),
    )


def _table_6(records: Sequence[Record], paper: dict[str, Any], beta: float) -> Table:
    run_ids = {record.run_id for setup in OTHER_TEACHERS for record in setup.of(records)}
    found = [record for record in records if record.run_id in run_ids]
    return method_table(
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
    return method_table(
        "Table 7",
        "Images: COCO with DINOSAURv2 as teacher",
        "",
        [*_rows(paper["table_7"], beta), *baseline_rows(found)],
        found,
        scores=("image_fg_ari", "image_mbo"),
        beta=beta,
        notes=_beta_note(beta, found),
    )


# --- Table 10 -------------------------------------------------------------------------------------


def _table_10(setup: Setup, records: Sequence[Record], paper: dict[str, Any], beta: float) -> Table:
    """SlotMatch with weight `beta`, under the protocol and with the settings of most of its records."""
    printed, beside = paper["table_10"], setup == YTVIS
    chooses = accepts("slotmatch", beta)
    candidates = [record for record in setup.of(records) if chooses(record)]
    choice = choose(candidates, most_common(candidates), beta)
    by_seed = {record.seed: record for record in choice.records} if choice else {}
    printed_seeds = printed["seeds"] if beside else {}
    more = [seed for seed in by_seed if seed not in printed_seeds]

    def row(title: str, seed: str, ours: Sequence[str], theirs: Sequence[str], kind: str) -> Row:
        pairs = zip(ours, theirs, strict=True)
        texts = [text for pair in pairs for text in (pair if beside else pair[:1])]
        return Row(tuple(map(Cell, (title, seed, *texts))), kind)

    rows = []
    for number, seed in enumerate([*printed_seeds, *more], start=1):
        found = [by_seed[seed]] if seed in by_seed else []
        theirs = [f"{value:.1f}" for value in printed_seeds.get(seed, ())] or [DASH] * len(SEED_SCORES)
        rows.append(
            row(f"Run {number}", DASH if seed is None else str(seed), _means(found), theirs, "method")
        )
    ours = choice.records if choice else ()
    rows.append(row("Mean", DASH, _means(ours), [f"{v:.1f}" for v in printed["mean"]], "summary"))
    rows.append(row("Std.", DASH, _stds(ours), [f"±{v:.2f}" for v in printed["std"]], "summary"))
    return Table(
        "Table 10",
        "SlotMatch from several seeds",
        setup.title,
        (Column("run", numeric=False), Column("seed"), *score_columns(SEED_SCORES, paper=beside)),
        tuple(rows),
        tuple(_seed_notes(choice, beta, paper=beside)),
        frozenset(record.run_id for record in candidates),
    )


def _means(records: Sequence[Record]) -> list[str]:
    columns = [scores_in_percent(records, score) for score in SEED_SCORES]
    return [one_decimal(statistics.fmean(numbers)) if numbers else DASH for numbers in columns]


def _stds(records: Sequence[Record]) -> list[str]:
    columns = [scores_in_percent(records, score) for score in SEED_SCORES]
    return [f"±{statistics.stdev(numbers):.2f}" if len(numbers) > 1 else DASH for numbers in columns]


def _seed_notes(choice: Choice | None, beta: float, *, paper: bool) -> list[str]:
    notes = []
    if choice:
        notes.append(protocol_note(choice.records[0]))
        notes += [note for note in run_notes([("SlotMatch", choice)]) if note != SAMPLE_STD]
    notes.append(f"SlotMatch with β = {beta:g}. Our Std. is the sample standard deviation (n − 1).")
    if paper:
        notes.append("The paper's ±0.29 is the population's (n); our formula gives ±0.36 for its three mBO.")
    return notes


# --- what is in none of them ----------------------------------------------------------------------


def left_out(records: Sequence[Record], tables: Sequence[Table]) -> list[str]:
    """One line for each kind of record that no table accounts for."""
    known = frozenset[str]().union(*(table.run_ids for table in tables))
    kinds: dict[str, list[Record]] = {}
    for record in records:
        if record.run_id not in known:
            method = METHODS.get(record.method, record.method)
            weight = f", β = {record.beta:g}" if record.beta else ""
            setup = Setup(record.dataset, record.trained_on or record.dataset, record.teacher or TEACHER)
            kinds.setdefault(f"{method}{weight} on {setup.title}", []).append(record)
    return [
        f"{kind}: {plural(len(found), 'evaluation')} ({listing([r.name for r in found])})"
        for kind, found in kinds.items()
    ]

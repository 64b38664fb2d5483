"""The parts of the tables: a data set, what the models were trained on, and the kind of their teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.records import Record

TEACHER = "SlotContrast"  # the paper's, but for Tables 6 and 7


@dataclass(frozen=True)
class Part:
    """What was scored on, and what the models come from: one part of a table."""

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
        """The part's records; one that does not say where it comes from may be from anywhere."""
        return [
            record
            for record in records
            if record.dataset == self.dataset
            and record.trained_on in ("", self.trained_on)
            and record.teacher in ("", self.family)
        ]


MOVI_E = Part("MOVi-E", "MOVi-E")
YTVIS = Part("YTVIS-2021", "YTVIS-2021")
DAVIS = Part("DAVIS 2017", "DAVIS 2017")
OVIS = Part("OVIS", "YTVIS-2021")
OTHER_TEACHERS = (
    Part("DAVIS 2017", "DAVIS 2017", "VideoSAUR"),
    Part("DAVIS 2017", "DAVIS 2017", "VideoSAURv2"),
)
COCO = Part("COCO", "COCO", "DINOSAURv2")


def recorded_parts(records: Sequence[Record]) -> list[Part]:
    """All parts that have a record of a model, and data sets that have nothing but baselines."""
    models = [record for record in records if record.method != "baseline"]
    families: dict[tuple[str, str], set[str]] = {}
    for record in models:
        key = (record.dataset, record.trained_on or record.dataset)
        families.setdefault(key, set()).update({record.teacher} - {""})
    known = {dataset for dataset, _ in families} | {OVIS.dataset, COCO.dataset}
    for record in records:
        if record.dataset not in known:
            families.setdefault((record.dataset, record.dataset), set())
    return [Part(*key, family) for key in sorted(families) for family in sorted(families[key]) or [TEACHER]]

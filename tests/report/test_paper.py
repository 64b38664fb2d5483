"""The transcription, against lines of the paper's text."""

import pytest

from pipeline.evaluate.records import METHODS
from pipeline.report.tables import paper_numbers

DATASETS = ("MOVi-E", "YTVIS-2021", "DAVIS 2017")
TABLE_1 = """
SAVi 39.2 - 42.8 16.0 - - - - - - - -
STEVE 54.1 - 50.6 26.6 - - 15.0 19.1 - - - -
VideoSAUR 78.4 - 73.9 35.6 - - 28.9 26.3 12.6 23.9 8.3 18.4
VideoSAURv2 - - 77.1 34.4 - - 31.2 29.7 11.8 23.0 7.6 19.2
SOLV 80.8 - - - 29.1 - - - 32.2 - - -
SlotContrast (teacher) 83.9 32.4 81.7 28.6 45.5 39.7 36.8 32.4 89.1 12.1 73.3 11.8
DINOSAUR 65.1 29.1 - - - - - - - - - -
DIOD 82.2 - - - - - - - - - - -
Student (no KD) 80.1 28.9 76.6 30.1 44.5 38.8 37.2 32.1 93.7 11.9 76.6 11.6
Feature KD 81.8 31.6 80.1 28.1 45.2 38.2 35.9 31.4 94.6 12.8 91.6 12.7
Reconstruction KD 81.4 31.5 81.1 29.1 44.9 38.8 35.6 31.8 92.0 20.5 88.4 20.3
SlotMatch (MSE) 82.1 30.2 78.6 26.4 45.1 39.7 36.9 32.6 94.4 20.0 89.6 20.0
SlotMatch + Reconstruction KD 74.4 29.7 66.2 24.1 45.6 38.3 36.1 31.1 96.4 12.7 91.2 12.4
SlotMatch (ours) 84.1 33.6 81.8 30.5 45.8 39.8 37.3 32.8 95.6 30.6 92.8 31.6
""".strip()
OTHERS = {
    "table_3": "54.6 24.9 34.6 21.5 55.8 25.5 34.8 21.5",
    "table_4": "45.5 39.7 36.8 32.4 44.5 38.8 37.2 32.1 44.5 39.1 34.9 32.5 45.8 39.8 37.3 32.8 "
    "44.4 39.1 36.3 32.5 43.8 38.9 35.5 32.1 43.9 38.3 35.4 32.0",
    "table_5": "83.9 32.4 81.7 28.6 80.1 28.9 76.6 30.1 83.5 31.8 81.5 28.6 84.1 33.6 81.8 30.5",
    "table_6": "23.9 18.4 17.4 14.4 30.3 23.2 23.0 19.2 22.9 18.2 31.2 28.9",
    "table_7": "44.7 29.3 41.5 28.6 42.3 28.8",
}


def printed(number):
    return "-" if number is None else f"{number:.1f}"


def test_table_1_reads_as_the_paper_prints_it():
    lines = []
    for row in paper_numbers()["table_1"]:
        assert set(row["scores"]) <= set(DATASETS)
        numbers = [n for name in DATASETS for n in row["scores"].get(name, [None] * 4)]
        lines.append(" ".join([row["label"], *map(printed, numbers)]))
    assert lines == TABLE_1.splitlines()


@pytest.mark.parametrize("name", OTHERS)
def test_the_other_tables_read_as_the_paper_prints_them(name):
    rows = paper_numbers()[name]
    assert " ".join(printed(n) for row in rows for n in row["scores"]) == OTHERS[name]
    assert {row["method"] for row in rows} <= set(METHODS)


def test_tables_2_and_10():
    paper = paper_numbers()
    assert list(paper["table_2"]["teacher"].values()) == [91.0, 8825.7, 347.4, 700.5, 916.5]
    assert list(paper["table_2"]["student"].values()) == [25.2, 3266.5, 186.0, 261.4, 331.0]
    assert list(paper["table_2"]["reduction"].values()) == [3.61, 2.70, 1.87, 2.68, 2.77]
    assert paper["table_10"]["seeds"] == {42: [37.2, 33.1], 101: [37.4, 32.4], 2048: [37.3, 32.9]}
    assert (paper["table_10"]["mean"], paper["table_10"]["std"]) == ([37.3, 32.8], [0.06, 0.29])

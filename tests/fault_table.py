"""The table at the end of a test run: each fault that was injected, in which stage, what was checked, how it ended.

A test says what its rows hold: `@pytest.mark.fault(fault, stage, checked)`, once or several times.
"""

import pytest

TITLES = ("fault", "stage", "checked", "result")
_ROWS = {}  # (node id, number) -> row


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    # On the report, as tests may run in other processes than the one that prints the table.
    outcome.get_result().faults = [_cells(*m.args, **m.kwargs) for m in item.iter_markers("fault")]


def pytest_runtest_logreport(report):
    if report.skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        result = reason.replace("Skipped: ", "skipped: ")
    elif report.failed:
        result = "FAILED"
    elif report.when == "call":
        result = "passed"
    else:
        return
    for number, cells in enumerate(report.faults):
        key = (report.nodeid, number)
        if _ROWS.get(key, ("passed",))[-1] == "passed":  # an error in the clean-up counts too
            _ROWS[key] = (*cells, result)


def _cells(fault, stage, checked):
    return fault, stage, checked


def pytest_terminal_summary(terminalreporter):
    if not _ROWS:
        return
    ends = {}  # of the tests of a row, which are several where there are parameters
    for *row, result in _ROWS.values():
        ends.setdefault(tuple(row), []).append(result)
    rows = [(*row, _together(results)) for row, results in sorted(ends.items())]
    widths = [max(len(title), *(len(row[i]) for row in rows)) for i, title in enumerate(TITLES)]
    terminalreporter.section("faults")
    for row in (TITLES, tuple("-" * width for width in widths), *rows):
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        terminalreporter.write_line("  ".join(cells).rstrip())


def _together(results):
    bad = [result for result in results if result != "passed"]
    if not bad:
        return "passed" if len(results) == 1 else f"passed ({len(results)} tests)"
    return "FAILED" if "FAILED" in bad else bad[0]

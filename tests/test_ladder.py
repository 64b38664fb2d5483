"""The rooms of pipeline/ as CONTRIBUTING lists them: each imports from those above it only, and nothing is too long."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
LADDER = re.findall(r"^\| `(\w+)/?` \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
OURS = {"pipeline", "jobs", "cluster", "benchmarks", "demo", "tests"}
MODULES = {path.stem for path in (ROOT / "pipeline").glob("*.py")} - {"__init__"}
FILES = [file for folder in ("pipeline", "jobs", "cluster") for file in sorted((ROOT / folder).rglob("*.py"))]


def imports(file):
    """(line, the parts of the module's name) of every import of a file, also of those in functions."""
    for node in ast.walk(ast.parse(file.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}:{node.lineno}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        yield from ((node.lineno, name.split(".")) for name in names)


def test_imports_run_down_the_ladder():
    """And so there is no circle of rooms."""
    wrong = []
    for file in sorted((ROOT / "pipeline").glob("*/**/*.py")) + [ROOT / f"pipeline/{m}.py" for m in MODULES]:
        place = LADDER.index(file.relative_to(ROOT / "pipeline").with_suffix("").parts[0])
        pure = place <= LADDER.index("metrics")
        for line, (top, *inner) in imports(file):
            upwards = top in OURS and inner[0] not in LADDER[: place + 1]
            if upwards or (pure and top in ("ray", "mlflow")):
                wrong.append(f"{file.relative_to(ROOT)}:{line}: {'.'.join([top, *inner])}")
    assert not wrong


def test_rooms_are_few_and_in_the_ladder():
    folders = {path.name for path in (ROOT / "pipeline").iterdir() if any(path.glob("*.py"))}
    assert len(folders) <= 13
    assert len(MODULES) < 6  # with __init__
    assert sorted(LADDER) == sorted({*folders, *MODULES})


def test_functions_and_files_are_short():
    long = []
    for file in FILES:
        text = file.read_text()
        long += [str(file)] if len(text.splitlines()) > 400 else []
        for node in ast.walk(ast.parse(text)):
            if (
                isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
                and node.end_lineno - node.lineno >= 60
            ):
                long.append(f"{file}:{node.lineno} {node.name}")
    assert not long

"""The documentation against the code: the command lines, links, paths and settings that it names."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from jobs._main import parse
from pipeline.config import Config, run_details

ROOT = Path(__file__).parents[1]
FRONT = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
PAGES = [*FRONT, *sorted({*ROOT.glob("docs/*.md"), *ROOT.glob("[cd]*/README.md")})]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))

# What stands for something of the user's. Other words in capitals (DIR, VIDEO) are as good a path as any.
NODE = "/home/ubuntu/slotmatch/"  # the checkout on a node of cluster/aws.yaml
FILES = {"CONFIG": "configs/demo.yaml", "SWEEP.yaml": "configs/sweeps/evidence.yaml"}
RUN = "configs/videos.yaml dataset.path=VIDEOS storage.root=OUT"  # of a page that does not say what it is
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def prose(page):
    return FENCE.sub("", page.read_text())


def spans(page):
    """What stands in `backticks` outside of blocks; a span may go on in the next line."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(page))]


def split(line):
    """A command's words without its comment; None where a quotation is open."""
    try:
        return shlex.split(line, comments=True)
    except ValueError:
        return None


def block_lines(page):
    """The commands of the page's ```sh blocks as a shell reads them: continued lines and quotations joined."""
    for language, block in FENCE.findall(page.read_text()):
        line = ""
        for part in block.replace("\\\n", " ").splitlines() if language == "sh" else ():
            line = f"{line}\n{part}".strip()
            if split(line) is not None:
                yield line
                line = ""
        assert not line, f"no end of: {line}"


def commands(page):
    """The words of every command on a page, its shell variables and placeholders filled in."""
    variables = {"RUN": RUN}
    for line in (*block_lines(page), *spans(page)):
        words = split(re.sub(r"\$([A-Z]+)\b", lambda match: variables.get(match[1], match[0]), line)) or [""]
        if len(words) == 1 and (assignment := re.fullmatch(r"([A-Z]+)=(.+)", words[0], re.DOTALL)):
            variables[assignment[1]] = assignment[2]
        yield [FILES.get(word, word) for word in words]


def stages(words):
    """(stage, arguments) of what a command runs, here or on a cluster; none of a placeholder for any stage."""
    if words[0] == "jobs/submit.sh":
        found = [(stage, words[2:]) for stage in ",".join(words[1:2]).split(",")]
    elif words[0] == "slotmatch":
        found = [("".join(words[1:2]), words[2:])]
    else:
        jobs = [n for n, word in enumerate(words) if words[n - 1] == "-m" and word.startswith("jobs.")]
        found = [(words[n].removeprefix("jobs."), words[n + 1 :]) for n in jobs]
    return [(stage, arguments) for stage, arguments in found if stage.islower() and stage[0] != "-"]


@every_page
def test_commands_are_understood(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")  # as a cluster's environment has one
    wrong = []
    for words in commands(page):
        if words[0] == "make" and words[1:] and f"\n{words[1]}:" not in (ROOT / "Makefile").read_text():
            wrong.append(f"{shlex.join(words)}: no target of the Makefile")
        for stage, arguments in stages(words):
            arguments = [word.removeprefix(NODE) for word in arguments if word != "…"]
            if importlib.util.find_spec(f"jobs.{stage}") is None:
                wrong.append(f"{shlex.join(words)}: no such stage")
            elif arguments:
                try:
                    parse(stage, arguments)
                except (ValueError, SystemExit) as error:
                    if getattr(error, "code", 2) not in (0, None):  # which --help ends with
                        wrong.append(f"{shlex.join(words)}: {error}")
    assert not wrong, "\n".join(wrong)


def anchors(page):
    """What links may name of a page: its headings as GitHub writes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


@every_page
def test_links_and_paths_exist(page):
    missing = []
    for target in re.findall(r"\]\((?!https?://)([^)]+)\)", prose(page)):
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            missing.append(target)
    path = r"(?<![\w./-])(?:benchmarks|cluster|configs|demo|docs|jobs|pipeline|tests)/[\w*][\w*./-]*"
    named = {name.rstrip("./") for name in re.findall(path, page.read_text())}
    assert not [*missing, *(name for name in named if not any(ROOT.glob(name)))]


@every_page
def test_settings_exist(page):
    setting = rf"(?<![\w./-])(?:{'|'.join(Config.model_fields)})(?:\.(?!example\b)[a-z]\w*)+(?![\w/(])"
    missing = []
    for key in re.findall(setting, "\n".join(spans(page))):
        value = Config().model_dump()
        for name in key.split("."):
            value = value.get(name, missing) if isinstance(value, dict) else missing
        missing += [key] if value is missing else []
    assert not missing


def test_the_run_details_are_those_that_help_marks():
    (paragraph,) = [p for p in prose(ROOT / "docs/configs.md").split("\n\n") if p.startswith("Run details")]
    sections = {name: run_details(field.annotation) for name, field in Config.model_fields.items()}
    marked = {f"{name}.{key}" for name, keys in sections.items() for key in keys}
    assert set(re.findall(r"`(\w+\.\w+)`", paragraph)) == marked | {"teacher.train"}


def test_the_readme_is_short():
    lines = PAGES[0].read_text().splitlines()
    assert len(lines) <= 170
    assert max(map(len, lines)) <= 120

"""Whatever is imported is declared in pyproject.toml, where those who install it need it."""

import ast
import re
import sys
from importlib.metadata import packages_distributions

import pytest
from places import ROOT

OURS = {"pipeline", "jobs", "cluster", "benchmarks", "demo"}


def declared(*groups):
    """Names of distributions, as they are compared; no tomllib in Python 3.10, and lists are all that is asked."""
    text = (ROOT / "pyproject.toml").read_text()
    lists = [re.search(rf"(?ms)^{group} = \[(.*?)\]\s*(?:#.*)?$", text)[1] for group in groups]
    return {
        re.sub("[-_.]+", "-", name).lower() for entry in lists for name in re.findall(r'"([\w.-]+)', entry)
    }


COMES_WITH = {"triton": "torch", "torchvision": "timm"}  # triton: with the torch that is made for GPUs
DEV = ["dependencies", "dev"]
FOLDERS = {
    "pipeline": ["dependencies", "s3", "motion"],
    "jobs": ["dependencies"],
    "cluster": DEV,
    "benchmarks": DEV,
}


@pytest.mark.parametrize(("folder", "groups"), [*FOLDERS.items(), ("demo", ["dependencies"])])
def test_imports_are_declared(folder, groups):
    allowed, providers = declared(*groups), packages_distributions()
    for file in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [str(node.module)]
            for name in {name.split(".")[0] for name in names} - OURS - set(sys.stdlib_module_names):
                name = COMES_WITH.get(name, name)
                found = {re.sub("[-_.]+", "-", d).lower() for d in providers.get(name, [name])}
                assert found & allowed, f"{file.relative_to(ROOT)} imports {name}, of {found}"

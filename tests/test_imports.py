"""Nothing imports upward (WORKSPACE.md, the map)."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "gptjax"
MAINS = ("pretrain", "sft", "reward", "ppo", "sample", "evaluate", "describe", "convert", "aot")
ABOVE = dict.fromkeys(("objectives", "model", "data", "parallel"), ("training", "generation", "rlhf", *MAINS))
ABOVE |= dict.fromkeys(("training", "generation"), ("rlhf", *MAINS)) | {"rlhf": MAINS}


def imported(path):
    """Names of gptjax's modules and packages that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "gptjax":
            _, *inside = node.module.split(".")
            yield from inside[:1] or [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("gptjax."))


@pytest.mark.parametrize("package", ABOVE)
def test_nothing_imports_upward(package):
    files = sorted((PACKAGE / package).rglob("*.py"))
    upward = [(path.name, name) for path in files for name in imported(path) if name in ABOVE[package]]
    assert files and not upward

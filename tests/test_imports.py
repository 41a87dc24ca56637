"""Nothing imports upward: the layers of WORKSPACE.md, from the bottom up."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "gptjax"
LAYERS = (
    ("errors", "hardware", "json_files", "usage", "web_page", "__init__"),
    ("ranges", "paths", "console"),
    ("parallel", "distributed", "queue"),
    ("config",),
    ("run_config", "lock", "command_line"),
    ("model",),
    ("objectives",),
    ("data",),
    ("training",),
    ("generation", "cost", "interop", "report"),
    ("trained", "curation"),
    ("evals",),
    ("tasks",),
    ("rlhf",),
    ("run", "seeds"),
    ("pretrain", "finetune", "sft", "reward", "dpo", "ppo"),
    ("sample", "evaluate", "lm_eval", "contamination", "describe", "convert", "sweep", "curate"),
    ("aot", "scaling"),
    ("__main__",),
)
LAYER = {name: i for i, names in enumerate(LAYERS) for name in names}


def part(path: Path) -> str:
    """Of gptjax: 'model' for model/gpt.py, 'ppo' for ppo.py."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path):
    """Parts of gptjax that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "gptjax":
            _, *inside = node.module.split(".")
            yield from inside[:1] or [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("gptjax."))


def upward(package: Path, name: str) -> list[tuple[str, str]]:
    own = lambda path: path.relative_to(package).parts[0].removesuffix(".py") == name
    files = [path for path in sorted(package.rglob("*.py")) if own(path)]
    return [(path.name, other) for path in files for other in imported(path)
            if other in LAYER and other != name and LAYER[other] >= LAYER[name]]  # fmt: skip


def test_every_part_has_a_layer():
    assert {part(path) for path in PACKAGE.rglob("*.py")} == LAYER.keys()


@pytest.mark.parametrize("name", LAYER)
def test_nothing_imports_upward(name):
    assert not upward(PACKAGE, name)


def test_an_upward_import_is_seen(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "gpt.py").write_text("def f():\n    from gptjax.training import loop\n")
    assert upward(tmp_path, "model") == [("gpt.py", "training")]

"""What --help shows, laid out; the commands and the config files there are, read from their source without running it.

A command is a module of the package that runs as `python -m gptjax.x`: its docstring says what it does, in the first
line, and how it is called. A config file names the stages it is for and the arguments of its get_config in a literal:

    PRESETS = {"sft": ["1.3b", "6b"]}
"""

import ast
import inspect
import os
import re
import shutil
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).resolve().parent
CONFIGS = PACKAGE.parent / "configs"
# Each begins with what one before it made; others follow by name.
_ORDER = ("pretrain", "finetune", "sft", "reward", "dpo", "ppo")
_GUARD = ast.unparse(ast.parse('__name__ == "__main__"'))


class Command(NamedTuple):
    """A module to run. name: 'gptjax.aot'; about: the first line of its docstring; stage: whether it trains."""

    name: str
    about: str
    stage: bool


class Preset(NamedTuple):
    """A config file of a stage. path: as --config takes it from here; about: the first line of its docstring;
    arguments: of its get_config; default: the one that it takes without."""

    path: str
    about: str
    arguments: tuple[str, ...]
    default: str | None


def commands() -> list[Command]:
    """Every module that is a command, the training stages first."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        if path.parent == PACKAGE and path.name == "__main__.py" or "__main__" not in source + path.name:
            continue
        tree = ast.parse(source)
        guards = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == _GUARD]
        if guards or path.name == "__main__.py":
            parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
            names = {n.attr for guard in guards for n in ast.walk(guard) if isinstance(n, ast.Attribute)}
            name = ".".join(part for part in parts if part != "__main__")
            found.append(Command(name, first_line(ast.get_docstring(tree)), "run_stage" in names))
    return sorted(found, key=lambda c: (not c.stage, _place(c.name), c.name))


def _place(name: str) -> int:
    last = name.rpartition(".")[2]
    return _ORDER.index(last) if last in _ORDER else len(_ORDER)


def presets(stage: str, folder: Path = CONFIGS) -> list[Preset]:
    """The config files in the folder that are for a stage ('sft'). One that cannot be read is left out."""
    found = []
    for path in sorted(folder.rglob("*.py")):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
            declared = _literal(tree, "PRESETS") or {}
            if stage in declared:
                shown = os.path.relpath(path)
                shown = str(path) if shown.startswith("..") else shown
                arguments = tuple(map(str, declared[stage]))
                found.append(Preset(shown, first_line(ast.get_docstring(tree)), arguments, _default_argument(tree)))
        except (OSError, SyntaxError, TypeError, ValueError):
            continue
    return found


def _literal(tree: ast.Module, name: str):
    for node in tree.body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == [name]:
            return ast.literal_eval(node.value)
    return None


def _default_argument(tree: ast.Module) -> str | None:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == "get_config" and node.args.defaults:
            first = node.args.defaults[0]
            return str(first.value) if isinstance(first, ast.Constant) else None
    return None


# --- layout -----------------------------------------------------------------------------------------------


def width() -> int:
    """Columns of the terminal, 80 where there is none; never more than are easy to read."""
    return max(40, min(shutil.get_terminal_size().columns, 120))


def first_line(docstring: str | None) -> str:
    return (docstring or "").strip().partition("\n")[0]


def paragraphs(docstring: str | None, columns: int) -> str:
    """A docstring at the terminal's width. Indented lines are commands; long ones are continued after a backslash."""
    shown = []
    for block in inspect.cleandoc(docstring or "").split("\n\n"):
        lines = [_command(line, columns) for line in block.splitlines()]
        shown.append("\n".join(lines) if block.startswith(" ") else wrapped(block, columns))
    return "\n\n".join(shown)


def _command(line: str, columns: int) -> str:
    indent = " " * (len(line) - len(line.lstrip()))
    line = indent + re.sub(" {8,}", " ", line.strip())  # where a backslash in the docstring joined it to the next one
    if len(line) <= columns:
        return line
    style = {"break_long_words": False, "break_on_hyphens": False, "subsequent_indent": f"{indent}    "}
    return " \\\n".join(textwrap.wrap(line, columns - 2, **style))


def wrapped(text: str, columns: int) -> str:
    return textwrap.fill(" ".join(text.split()), columns, break_long_words=False, break_on_hyphens=False)


def table(rows: Iterable[tuple[str, str]], columns: int) -> str:
    """Names and what they are in two columns, as argparse has them: a long name has a line of its own."""
    rows = list(rows)
    start = min(max((len(name) for name, _ in rows), default=0) + 4, max(24, columns // 3))
    lines = []
    for name, about in rows:
        text = wrapped(about, columns - start).splitlines()
        head = f"  {name}"
        if text and len(head) <= start - 2:
            head = f"{head:<{start}}{text.pop(0)}"
        lines += [head, *(" " * start + line for line in text)]
    return "\n".join(lines)

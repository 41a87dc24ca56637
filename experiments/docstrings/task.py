"""The task: the summary line of a docstring, given the signature.

The examples are the documented functions, methods and classes of Python's standard library, so they are on
every machine that runs this and differ a little between Python versions. They are split by file: the evaluation
files are those that pre-training on the same corpus holds out, so no stage has seen them.

The quiz asks the converse: which of four summary lines of a file belongs to this signature? The labeled task: is a
summary line a class's or a function's?
"""

from __future__ import annotations

import ast
import copy
import hashlib
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gptjax.data import sources, splits
from gptjax.json_files import write_json_lines

VALIDATION = 0.05  # of the files, as configs/demo.py holds them out
SHARES = {"demonstrations": 55, "comparisons": 25, "prompts": 15}  # of the examples in the other files
LONGEST_PROMPT = 160
SUMMARY_LENGTHS = range(10, 121)
CHOICES, QUESTIONS = 4, 256  # of the quiz, at most

_SENTENCE = re.compile(r".*?[.!?](?=\s+[^a-z\s]|\s*$)")  # 'e.g. this' goes on
_NOT_PROSE = re.compile(r"[\w.]+\(|[^\w\"'`(]|\S+ =|.*(->|>>>|::)")  # 'f(x) -> y', '>>> f(1)', 'atom = *cfws', '---'


class Example(NamedTuple):
    """name: file name:qualified name; prompt: the signature, on one line; summary: of its docstring."""

    name: str
    file: str
    prompt: str
    summary: str


def examples() -> list[Example]:
    """Every usable pair of signature and summary in the standard library, each once, in order of files.

    The few pairs that several files share are left out, so that a split by file keeps its sides apart.
    """
    found = defaultdict(list)
    for document in sources.documents("stdlib"):
        if not document.name.endswith(".py"):
            continue
        try:
            tree = ast.parse(document.text)
        except (SyntaxError, ValueError):  # templates, and files in another encoding
            continue
        for qualified, owner, node in _definitions(tree):
            prompt, summary = signature(node, owner), summary_line(ast.get_docstring(node) or "")
            if prompt and summary:
                example = Example(f"{document.name}:{qualified}", document.name, prompt, summary)
                found[prompt, summary].append(example)
    return [same[0] for same in found.values() if len({example.file for example in same}) == 1]


def _definitions(node: ast.AST, outer: str = "", owner: str = "") -> Iterator[tuple[str, str, ast.AST]]:
    """Qualified name, name of the class it is a method of or '', and node of each definition, in order."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            is_class = isinstance(child, ast.ClassDef)
            yield outer + child.name, "" if is_class else owner, child
            yield from _definitions(child, f"{outer}{child.name}.", child.name if is_class else "")
        elif isinstance(child, ast.stmt | ast.excepthandler):  # a definition may be under an if or a try
            yield from _definitions(child, outer, owner)


def signature(node: ast.AST, owner: str = "") -> str:
    """`def f(a, b=1) -> T:`, `class Foo: def f(self):` for a method of owner, `class Foo(Base):`; '' if too long."""
    bare = copy.copy(node)
    bare.body, bare.decorator_list = [], []
    line = (f"class {owner}: " if owner else "") + ast.unparse(bare).strip()
    return "" if len(line) > LONGEST_PROMPT or not line.isprintable() or not line.isascii() else line


def summary_line(docstring: str) -> str:
    """The first sentence of the first paragraph on one line; '' where that is not one short line of prose."""
    paragraph = " ".join(docstring.strip().partition("\n\n")[0].split())
    sentence = _SENTENCE.match(paragraph)
    line = sentence[0] if sentence else paragraph
    return line if len(line) in SUMMARY_LENGTHS and " " in line and not _NOT_PROSE.match(line) else ""


def split(examples: list[Example], seed: int) -> dict[str, list[Example]]:
    """The examples of demonstrations, comparisons, prompts and evaluation; no file is in two of them.

    evaluation has the files that pre-training with `data.source = stdlib`, `data.validation = 0.05` and this
    seed holds out, less the few examples whose signature also is in another file. The other files are put in
    order of a hash of seed and name and cut by SHARES of the examples.
    """
    held_out = splits.held_out("stdlib", VALIDATION, seed=seed)
    sizes = Counter(e.file for e in examples if e.file not in held_out)
    elsewhere = {e.prompt for e in examples if e.file not in held_out}
    total, before, side = sum(sizes.values()), 0, {}
    for file in sorted(sizes, key=lambda f: hashlib.sha256(f"docstrings:{seed}:{f}".encode()).digest()):
        position = (before + sizes[file] / 2) / total * sum(SHARES.values())
        side[file] = next(name for name, end in zip(SHARES, accumulate(SHARES.values()), strict=True) if position < end)
        before += sizes[file]
    parts = {name: [e for e in examples if side.get(e.file) == name] for name in SHARES}
    return parts | {"evaluation": [e for e in examples if e.file in held_out and e.prompt not in elsewhere]}


def questions(examples: list[Example], seed: int) -> list[dict]:
    """Rows {"signature", "choices", "answer"} in random order: a summary and CHOICES - 1 others of the same file.

    answer: the place of the right one. A file with fewer different summaries asks none. Signatures that a file has
    twice are left out, since both their summaries would be right.
    """
    rng = np.random.default_rng(seed)
    of_file, times = defaultdict(list), Counter((e.file, e.prompt) for e in examples)
    for e in examples:
        if e.summary not in of_file[e.file]:
            of_file[e.file].append(e.summary)
    rows = []
    for e in examples:
        others = [summary for summary in of_file[e.file] if summary != e.summary]
        if times[e.file, e.prompt] > 1 or len(others) < CHOICES - 1:
            continue
        choices = [e.summary, *rng.choice(others, CHOICES - 1, replace=False).tolist()]
        order = rng.permutation(CHOICES).tolist()
        rows.append({"signature": e.prompt, "choices": [choices[i] for i in order], "answer": order.index(0)})
    return [rows[i] for i in rng.permutation(len(rows))]


def kinds(examples: list[Example], seed: int) -> list[dict]:
    """Rows {"text", "label"} in random order: the summaries of classes ("class"), and as many of functions and methods,
    drawn at random ("function"). A summary that both have is left out, every other is there once."""
    rng = np.random.default_rng(seed)
    classes, functions = ({e.summary: None for e in examples if is_class(e) == kind} for kind in (True, False))
    own = [[text for text in one if text not in other] for one, other in ((classes, functions), (functions, classes))]
    most = min(map(len, own))
    rows = [
        {"text": texts[i], "label": label}
        for label, texts in zip(("class", "function"), own, strict=True)
        for i in rng.permutation(len(texts))[:most]
    ]
    return [rows[i] for i in rng.permutation(len(rows))]


def is_class(example: Example) -> bool:
    """Whether the signature is a class's: that of a method goes on after the name of its class."""
    return example.prompt.startswith("class ") and example.prompt.endswith(":") and ": " not in example.prompt


def write(directory: str | os.PathLike, seed: int) -> None:
    """Writes the parts as JSON lines, for each stage its file.

    demonstrations.jsonl, comparison_prompts.jsonl (where the real summary is one of the candidates) and
    evaluation.jsonl have rows {"prompt", "response"}; prompts.jsonl has rows {"prompt"}, each signature once;
    quiz.jsonl and quiz_train.jsonl have `questions` of the evaluation files (QUESTIONS) and of the demonstrations';
    kinds.jsonl and kinds_train.jsonl have the `kinds` of both.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    parts = split(examples(), seed)
    files = {"demonstrations": "demonstrations", "comparisons": "comparison_prompts", "evaluation": "evaluation"}
    for part, file in files.items():
        rows = ({"prompt": e.prompt, "response": e.summary} for e in parts[part])
        write_json_lines(directory / f"{file}.jsonl", rows)
    unique = dict.fromkeys(e.prompt for e in parts["prompts"])
    write_json_lines(directory / "prompts.jsonl", ({"prompt": prompt} for prompt in unique))
    write_json_lines(directory / "quiz.jsonl", questions(parts["evaluation"], seed)[:QUESTIONS])
    write_json_lines(directory / "quiz_train.jsonl", questions(parts["demonstrations"], seed))
    write_json_lines(directory / "kinds.jsonl", kinds(parts["evaluation"], seed))
    write_json_lines(directory / "kinds_train.jsonl", kinds(parts["demonstrations"], seed))

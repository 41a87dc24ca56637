"""The Colab notebook: stored without outputs, its pins are this repository's, its commands are commands."""

import ast
import copy
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from absl import app
from runs import main_of

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "experiments" / "colab" / "quickstart.ipynb"
# The demo at its smallest, as in .ci/run. GPTJAX_FLAGS, where set, takes its place.
SMALLEST = (
    "--config.model.n_layer=2 --config.model.n_head=2 --config.model.d_model=64 --config.data.tokenizer=bpe:1024 "
    "--config.steps=20 --config.eval.every=20 --config.checkpoint.every=20 --config.eval.batches=2 "
    "--scale=0.02 --limit=8"
)
TWO_SMALL_LAYERS = ["--config.model.n_layer=2", "--config.model.n_head=2", "--config.model.d_model=128"]  # for its aot


@pytest.fixture(scope="module")
def notebook():
    nbformat = pytest.importorskip("nbformat", reason="needs requirements-test.txt")
    return nbformat.read(NOTEBOOK, as_version=4)


def code(notebook) -> list[str]:
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def test_it_is_valid_and_stored_without_outputs(notebook):
    nbformat = pytest.importorskip("nbformat", reason="needs requirements-test.txt")
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None
            ast.parse(cell.source)  # no shell magic: a command that fails must stop the notebook


def test_its_process_never_loads_jax(notebook):
    """A TPU serves one process at a time: the kernel must leave it to the commands."""
    for cell in code(notebook):
        for node in ast.walk(ast.parse(cell)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] in ("jax", "gptjax", "experiments") for name in names)


def test_its_jax_is_the_one_the_tests_run_with(notebook):
    pin = next(node.value.value for node in ast.parse(code(notebook)[0]).body if node.targets[0].id == "JAX")
    tested = (ROOT / "requirements-test.txt").read_text()
    assert f"jax[tpu]=={pin} pins it" in tested
    low = re.search(r"^jax>=([0-9.]+),", (ROOT / "requirements.txt").read_text(), re.MULTILINE)[1]
    assert [int(n) for n in pin.split(".")] >= [int(n) for n in low.split(".")]


def test_a_command_that_fails_stops_it_and_what_it_printed_is_seen(notebook, capsys):
    definition = next(n for n in ast.parse(code(notebook)[1]).body if isinstance(n, ast.FunctionDef))
    names = {"os": os, "shlex": shlex, "subprocess": subprocess}
    exec(compile(ast.Module([definition], []), "run", "exec"), names)
    names["run"](sys.executable, "-c", "print('done')")
    with pytest.raises(RuntimeError, match="exit code 3"):
        names["run"](sys.executable, "-c", "import sys; print('amiss', file=sys.stderr); sys.exit(3)")
    printed = capsys.readouterr().out
    assert "done\n" in printed and "amiss\n" in printed


def test_its_commands_parse_and_its_demo_is_the_makefiles(notebook, tmp_path, monkeypatch):
    """Every cell, with commands that are only parsed, and pages in place of the demo's."""
    pytest.importorskip("IPython", reason="needs requirements-test.txt")
    workdir, said, names = tmp_path / "run", [], {}
    for stage in (".", "sft", "reward", "ppo", "ppo_ptx", "grpo", "dpo"):
        (workdir / stage).mkdir(exist_ok=True, parents=True)
        (workdir / stage / "report.html").write_text("<h1>x</h1><h2>Curves</h2><img src=''><h2>Time</h2>")
    monkeypatch.setenv("GPTJAX_WORKDIR", str(workdir))
    monkeypatch.setenv("GPTJAX_FLAGS", SMALLEST)
    monkeypatch.chdir(NOTEBOOK.parent)
    for i, cell in enumerate(code(notebook)):
        exec(compile(cell, f"cell {i}", "exec"), names)
        names["run"] = lambda *words: said.append(words)
    monkeypatch.setattr(app, "run", lambda main, flags_parser: flags_parser(sys.argv))
    parsed = {}
    for words in said:
        module, *arguments = words[words.index("-m") + 1 :] if "-m" in words else ("",)
        if module.startswith(("gptjax.", "experiments.")):
            ended, _, err = main_of(module, *arguments)
            assert ended == 0, err
            parsed.setdefault(module, arguments)
    assert parsed.keys() >= {"experiments.docstrings", "gptjax.sample", "gptjax.describe"}
    demo = " ".join(("-m experiments.docstrings", *parsed["experiments.docstrings"][:1]))
    assert demo in (ROOT / "Makefile").read_text()
    assert set(shlex.split(SMALLEST)) <= set(parsed["experiments.docstrings"])


@pytest.mark.long  # the demo, which .ci/run calls by itself
def test_it_runs_from_top_to_bottom(notebook, tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="needs requirements-test.txt")
    workdir = tmp_path / "run"
    monkeypatch.setenv("GPTJAX_WORKDIR", str(workdir))
    monkeypatch.setenv("GPTJAX_FLAGS", os.environ.get("GPTJAX_FLAGS", SMALLEST))
    monkeypatch.delenv("NPROC", raising=False)  # a pool of threads for conftest.py's eight devices
    smaller = copy.deepcopy(notebook)
    (aot,) = (cell for cell in smaller.cells if cell.cell_type == "code" and "gptjax.aot" in cell.source)
    aot.source = aot.source.replace('"--topology=v5e:2x4"', f'"--topology=v5e:2x4", *{TWO_SMALL_LAYERS}')
    assert str(TWO_SMALL_LAYERS) in aot.source
    done = nbclient.NotebookClient(
        smaller, timeout=1800, kernel_name="python3", resources={"metadata": {"path": str(NOTEBOOK.parent)}}
    ).execute()

    printed = "".join(o.text for cell in done.cells for o in cell.get("outputs", []) if o.output_type == "stream")
    shown = "".join(
        o.data.get("text/html", "") for cell in done.cells for o in cell.get("outputs", []) if "data" in o
    )  # fmt: skip
    assert shlex.split(os.environ["GPTJAX_FLAGS"])[0] in printed  # the sizes that were asked for
    for stage in (".", "sft", "reward", "ppo", "ppo_ptx", "grpo", "dpo"):
        assert (workdir / stage / "report.html").stat().st_size > 10_000
        assert list((workdir / stage / "checkpoints").iterdir())
    assert shown.count("<img ") == 11  # the main figure, fine-tuning, the quiz (two), the curves of seven stages
    for column in ("gold", "proxy", "KL from SFT, nats", "the real one", "PPO-ptx", "GRPO", "DPO"):
        assert f"<th>{column}</th>" in shown
    assert shown.count("<tr><td><code>") == 8  # samples on signatures that no stage has seen
    assert printed.count("$ ") and "def read_lines(path, encoding='utf-8'):" in printed
    assert "1,557,611,200" in printed  # describe's count of GPT-2 1.5B

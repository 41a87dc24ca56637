"""The command that runs lm-evaluation-harness; what needs the harness itself is tested in peers/test_lm_eval.py."""

import sys

import pytest
from runs import main_of

from gptjax.lm_eval.__main__ import harness_arguments


def test_without_the_package_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for name in [name for name in sys.modules if name.startswith("gptjax.lm_eval")]:
        monkeypatch.delitem(sys.modules, name)
    code, out, err = main_of("gptjax.lm_eval", "--model_args=workdir=x", "--tasks=piqa")
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert err.startswith("error: ") and "pip install 'gptjax[eval]'" in err
    code, out, err = main_of("gptjax.lm_eval", "--help")
    assert code == 2 and "--model_args: workdir; step" in out and "pip install" in err


@pytest.mark.parametrize(
    "given, expected",
    [
        (["--tasks=piqa"], "run --model gptjax --batch_size auto --tasks=piqa"),
        (["run", "--tasks", "piqa", "-b", "4"], "run --model gptjax --tasks piqa -b 4"),
        (["--model=hf", "--batch_size=4"], "run --model=hf --batch_size=4"),
        (["--help"], "run --model gptjax --batch_size auto --help"),
        (["ls", "tasks"], "ls tasks"),
    ],
)
def test_the_model_is_filled_in(given, expected):
    assert harness_arguments(given) == expected.split()

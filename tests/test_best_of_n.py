"""Best-of-n: the estimate, the command, its refusals."""

import dataclasses
import inspect
import itertools
import json
import re
import types

import numpy as np
import pytest
from alignment_runs import write
from ppo_runs import shortened
from runs import main_of

from gptjax.errors import InputError
from gptjax.rlhf import best_of_n as best_of_n_tool
from gptjax.rlhf import reward_model
from gptjax.rlhf.best_of_n import best_of_n, expected_best
from gptjax.rlhf.reward_model import load_reward_model

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_expected_best_is_the_mean_over_all_subsets(n):
    rng = np.random.default_rng(n)
    scores, gold = rng.normal(size=(4, 5)), rng.normal(size=(4, 5))
    best, other = [], []
    for row, of_gold in zip(scores, gold, strict=True):
        subsets = [list(s) for s in itertools.combinations(range(5), n)]
        chosen = [s[int(np.argmax(row[s]))] for s in subsets]
        best.append(np.mean(row[chosen]))
        other.append(np.mean(of_gold[chosen]))
    assert expected_best(scores, gold, n) == (pytest.approx(np.mean(best)), pytest.approx(np.mean(other)))


def test_best_of_n_keeps_the_best_of_the_first_n():
    scores = np.array([[0.0, 2.0, 9.0], [3.0, 1.0, 9.0]])
    kept, kl = best_of_n(scores, 2)
    assert kept.tolist() == [1, 0] and kl == pytest.approx(np.log(2) - 0.5)
    assert best_of_n(scores, 3)[0].tolist() == [2, 2] and best_of_n(scores, 1)[1] == 0.0
    for n in (0, 4):
        with pytest.raises(InputError, match=f"best-of-{n} needs {n} samples of each prompt and there are 3"):
            best_of_n(scores, n)
        with pytest.raises(InputError, match="from 3"):
            expected_best(scores, scores, n)


@pytest.fixture
def choose(tuned, reward_dir, monkeypatch):
    """best_of_n's main, in this process, with these values of its flags and its defaults for the others."""

    def chosen(prompts, **values):
        flags = {"policy": tuned, "reward": reward_dir, "prompts": str(prompts), "n": 2, "limit": 64,
                 "max_new_tokens": 8, "drop_long": False, "bad_rows": "stop", "fields.prompt": "prompt",
                 "seed": 0}  # fmt: skip
        monkeypatch.setattr(best_of_n_tool, "FLAGS", types.SimpleNamespace(**flags | values), raising=False)
        best_of_n_tool.main(None)

    return chosen


def test_errors_of_best_of_n_name_its_own_flags(choose, tmp_path):
    rows = [{"prompt": "ba ko"}, {"prompt": "ba ko " * 30}, {"question": "ba"}, {"prompt": ""}]
    source = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(InputError, match="(?s)^There are 3 bad rows.*jsonl:2.*jsonl:3.*jsonl:4") as caught:
        choose(source)
    named = set(re.findall(r"--([\w.]+)", str(caught.value)))
    assert named == {"drop_long", "bad_rows", "fields.prompt"}
    assert named <= set(re.findall(r'flags.DEFINE_\w+\("([\w.]+)"', inspect.getsource(best_of_n_tool)))


def test_best_of_n_and_a_reward_model_it_does_not_fit(choose, alignment, tmp_path, monkeypatch):
    """Told before anything is sampled."""
    monkeypatch.setattr(reward_model, "load_reward_model", shortened(load_reward_model, 24))
    with pytest.raises(InputError, match="--max_new_tokens=24 leaves no room .* the reward model's context of 24"):
        choose(alignment["prompts"], max_new_tokens=24)
    source = write(tmp_path / "rows.jsonl", [{"prompt": "ba ko " * 8}])
    with pytest.raises(InputError, match="The prompt has 19 tokens, more than the 16"):
        choose(source)
    other = lambda *a, **k: dataclasses.replace(load_reward_model(*a, **k), template="plain")
    monkeypatch.setattr(reward_model, "load_reward_model", other)
    with pytest.raises(InputError, match="saw 'plain' prompts and the policy 'chat' ones"):
        choose(alignment["prompts"])


def test_best_of_n_on_the_command_line(tuned, reward_dir, alignment, tmp_path):
    """It leaves out what it is told to."""
    rows = [{"q": json.loads(line)["prompt"]} for line in alignment["prompts"].read_text().splitlines()]
    source = write(tmp_path / "rows.jsonl", [{"q": "ba ko " * 30}, {"question": "ba"}, *rows])
    code, out, err = main_of(
        "gptjax.rlhf.best_of_n", f"--policy={tuned}", f"--reward={reward_dir}", f"--prompts={source}", "--n=4",
        "--limit=3", "--max_new_tokens=8", "--fields.prompt=q", "--drop_long", "--bad_rows=drop",
    )  # fmt: skip
    assert code == 0, err
    assert "rows left out: 1 too long, 1 bad" in err
    *rows, last = map(json.loads, out.splitlines())
    assert len(rows) == 3 and all(r.keys() == {"prompt", "response", "score"} for r in rows)
    assert last["n"] == 4 and last["kl"] == pytest.approx(np.log(4) - 3 / 4)
    assert last["score"] == pytest.approx(np.mean([r["score"] for r in rows]), abs=1e-5)
    assert last["score"] > last["score_of_one"]

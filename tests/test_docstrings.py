"""The docstring task: its examples and splits, the labeler's rules, and the noise of its ranks."""

import ast
import json
import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from numerics import assert_close, model_terms
from test_gpt import random_params

from configs import demo
from experiments.docstrings import __main__ as stages
from experiments.docstrings import finetuned, labeler, plot, quiz, story, task
from experiments.docstrings.labeler import gold_score, pair_accuracy_ceiling, plackett_luce_ranks
from gptjax.config import build
from gptjax.data import bpe, sources, splits
from gptjax.dpo import DPOConfig
from gptjax.errors import InputError
from gptjax.finetune import FinetuneConfig
from gptjax.model import plain
from gptjax.model.spec import GPTConfig
from gptjax.parallel.mesh import MeshConfig, make_mesh
from gptjax.ppo import PPOConfig
from gptjax.tasks.items import load_items
from gptjax.tasks.kinds import Scorer
from gptjax.tasks.likelihood import Score
from gptjax.tasks.task import load_task
from gptjax.trained import Model

pytestmark = pytest.mark.optimized

SIGNATURE = "class TarFile: def extract_member(self, path, mode='r') -> bytes:"
GOOD = "Extract a member of the archive to a path."
SEED = 3


NAMED = ("textwrap.py", "queue.py", "asyncio/tasks.py")


@pytest.fixture(scope="module")
def examples():
    """Of a quarter of the standard library's files and of those that tests name."""
    documents = list(sources.documents("stdlib"))
    some = [d for i, d in enumerate(documents) if i % 4 == 0 or d.name in NAMED]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(task.sources, "documents", lambda source: some)
        return task.examples()


@pytest.fixture(scope="module")
def parts(examples):
    return task.split(examples, SEED)


@pytest.mark.parametrize(
    "rule, worse",
    [
        ("imperative", "Extracts a member of the archive to a path."),
        ("imperative", "Extracting a member of the archive to a path."),
        ("imperative", "Extracted a member of the archive to a path."),
        ("imperative", "Member of the archive at a path."),
        ("capital", "extract a member of the archive to a path."),
        ("full_stop", "Extract a member of the archive to a path"),
        ("full_stop", "Extract a member of the archive to a path.."),
        ("one_line", "Extract a member\nof the archive to a path."),
        ("length", "Extract it."),
        (
            "length",
            "Extract one member from the whole of an archive, compressed or plain, into the folder some path names.",
        ),
        ("no_repetition", "Extract member archive member archive to a path."),
        ("about_signature", "Return what there is in the archive."),
        ("prose", "Extract a member of the archive {( to a path."),
        ("prose", "Extract a member of the archive \u2192 to a path."),
        ("prose", "Extract a member ~~ of the %$ archive to a path."),
    ],
)
def test_breaking_a_rule_costs_and_breaks_no_other(rule, worse):
    good, bad = labeler.explain(SIGNATURE, GOOD), labeler.explain(SIGNATURE, worse)
    assert set(good.values()) == {1.0}
    assert {name for name in good if bad[name] < 1} == {rule}
    assert gold_score(SIGNATURE, worse) < gold_score(SIGNATURE, GOOD)


def test_scores_lie_in_their_range(examples):
    assert gold_score(SIGNATURE, GOOD) == 2
    assert gold_score(SIGNATURE, "") == gold_score(SIGNATURE, " \n") == -2
    assert gold_score(SIGNATURE, f"  {GOOD}\n") == 2
    texts = ["x", "....", "returns returns returns", "\u2192\n\u2192", "Return " * 50, "(" * 200]
    scores = [gold_score(e.prompt, text) for e in examples[::125] for text in texts]
    assert -2 <= min(scores) and max(scores) < 1.5


@pytest.mark.parametrize(
    "signature, summary, rule, value",
    [
        ("class Reader(Base):", "A reader of lines.", "imperative", 1),
        ("class Reader(Base):", "Process lines.", "imperative", 1),
        ("class Reader(Base):", "Reads lines.", "imperative", 0),
        ("class Reader(Base):", "This class reads lines.", "imperative", 0),
        ("def process(x):", "Process the lines.", "imperative", 1),
        ("def process(x):", "Recursively remove the lines.", "imperative", 1),
        ("def process(x):", "Recursive removal of the lines.", "imperative", 0),
        ("async def copy_file_tree_now(*args):", "Make a copy.", "about_signature", 0.5),
        ("async def copy_file_tree_now(*args):", "Make copies of the files.", "about_signature", 1),
        ("def HTTPServer():", "Return a server.", "about_signature", 1),
        ("class Queue: def __init__(self, maxsize=0):", "Create a queue.", "about_signature", 1),
        ("class Queue: def __init__(self, maxsize=0):", "Initialize it.", "about_signature", 1),
        ("class Queue: def put(self, a, item):", "Insert an item.", "about_signature", 1),
        ("class Queue: def put(self, a, item):", "Insert a thing.", "about_signature", 0),
    ],
)
def test_rules_know_classes_adverbs_and_names(signature, summary, rule, value):
    assert labeler.explain(signature, summary)[rule] == value


def test_the_labeler_prefers_real_summaries_to_corrupted_ones(examples):
    rng = np.random.default_rng(0)
    some = examples[::2]
    others = [some[i].summary for i in rng.permutation(len(some))]
    corrupted = {
        0.75: others,
        0.9: [" ".join(rng.permutation(e.summary.split())) for e in some],
        0.95: ["".join(rng.permutation(list(e.summary))) for e in some],
    }
    for share, summaries in corrupted.items():
        gaps = [gold_score(e.prompt, e.summary) - gold_score(e.prompt, s) for e, s in zip(some, summaries, strict=True)]
        assert (np.sign(gaps).mean() + 1) / 2 > share


def test_refusals():
    with pytest.raises(InputError, match="not a signature"):
        gold_score("x = 1", GOOD)
    with pytest.raises(InputError, match="noise of the ranks is 0"):
        plackett_luce_ranks([1.0, 2.0], np.random.default_rng(0), 0)


def test_ranks_have_the_marginals_of_plackett_luce():
    scores, noise, draws = [1.5, 0.9, 1.2, -0.3], 0.5, 4000
    rng = np.random.default_rng(0)
    ranks = np.array([plackett_luce_ranks(scores, rng, noise) for _ in range(draws)])
    assert (np.sort(ranks) == np.arange(4)).all()
    for i in range(4):
        for j in range(i):
            p = 1 / (1 + np.exp((scores[j] - scores[i]) / noise))
            assert abs((ranks[:, i] < ranks[:, j]).mean() - p) < 4 * np.sqrt(p * (1 - p) / draws)
    first = np.exp(np.array(scores) / noise)
    expected = first / first.sum()  # how often each comes first
    assert np.all(np.abs((ranks == 0).mean(0) - expected) < 4 * np.sqrt(expected * (1 - expected) / draws))


def test_the_ceiling_is_how_often_noisy_ranks_agree_with_the_score():
    lists, noise, draws = [[1.0, 0.0, 0.4], [2.0, 1.9]], 0.4, 4000
    rng = np.random.default_rng(1)
    agree = []
    for scores in lists:
        ranks = np.array([plackett_luce_ranks(scores, rng, noise) for _ in range(draws)])
        agree += [
            ((ranks[:, i] < ranks[:, j]) == (scores[i] > scores[j])).mean()
            for i in range(len(scores))
            for j in range(i)
        ]
    ceiling = pair_accuracy_ceiling(lists, noise)
    assert abs(np.mean(agree) - ceiling) < 4 * np.sqrt(0.25 / (4 * draws))
    assert pair_accuracy_ceiling([[1.0, 1.0]], noise) == 0.5
    assert pair_accuracy_ceiling(lists, 1e-3) == pytest.approx(1)


@pytest.mark.slow
def test_there_are_thousands_of_examples():
    assert len(task.examples()) >= 5000


def test_examples_are_one_line_each_and_differ(examples):
    assert len(examples) >= 1000
    assert len({(e.prompt, e.summary) for e in examples}) == len(examples)
    for e in examples:
        assert e.prompt.endswith(":") and e.prompt.startswith(("def ", "async def ", "class ")) and len(e.prompt) <= 160
        assert 10 <= len(e.summary) <= 120 and "\n" not in e.prompt + e.summary and e.name.startswith(e.file + ":")
        gold_score(e.prompt, e.summary)  # every signature can be scored
    some = {e.name: e for e in examples}
    assert some["textwrap.py:dedent"].prompt == "def dedent(text):"
    assert some["textwrap.py:wrap"].summary == "Wrap a single paragraph of text, returning a list of wrapped lines."
    assert some["queue.py:Queue.put"].prompt == "class Queue: def put(self, item, block=True, timeout=None):"
    assert some["queue.py:PriorityQueue"].prompt == "class PriorityQueue(Queue):"
    assert some["asyncio/tasks.py:wait_for"].prompt == "async def wait_for(fut, timeout):"


def test_signatures_and_summaries():
    (node,) = ast.parse("@cache\nasync def f(a, /, b: int=1, *c, d='x', **e) -> str:\n    'Do it.'").body
    assert task.signature(node) == "async def f(a, /, b: int=1, *c, d='x', **e) -> str:"
    assert task.signature(node, "C") == "class C: async def f(a, /, b: int=1, *c, d='x', **e) -> str:"
    assert task.signature(ast.parse(f"def f({'a' * 160}): pass").body[0]) == ""
    for docstring, summary in {
        "Return the\n   first  line.\n\nMore.": "Return the first line.",
        "Return the e.g. first line.  Then more of\nit.": "Return the e.g. first line.",
        "Return os.path of a file": "Return os.path of a file",
        "f(x) -> the square": "",
        ">>> f(1) + 1": "",
        "atom = comment / text": "",
        "Too short": "",
        "": "",
        "long " * 30: "",
    }.items():
        assert task.summary_line(docstring) == summary


def test_no_file_is_in_two_parts_and_evaluation_is_what_pretraining_holds_out(examples, parts):
    files = {name: {e.file for e in part} for name, part in parts.items()}
    assert list(files) == ["demonstrations", "comparisons", "prompts", "evaluation"]
    assert sum(map(len, files.values())) == len(set().union(*files.values()))
    data = demo.get_config().data
    pretraining = splits.splitter(data.source, float(data.validation), data.text_field, SEED)
    unseen = {text for split, text in pretraining() if split == "validation"}
    held_out = splits.held_out("stdlib", task.VALIDATION, seed=SEED)
    assert {d.text for d in sources.documents("stdlib") if d.name in held_out} == unseen
    assert files["evaluation"] <= held_out and not held_out & set().union(*(files[n] for n in task.SHARES))

    prompts = {e.prompt for name in task.SHARES for e in parts[name]}
    assert not prompts & {e.prompt for e in parts["evaluation"]}
    left_out = sum(e.file in held_out for e in examples) - len(parts["evaluation"])
    assert 0 <= left_out < 50
    total = sum(len(parts[name]) for name in task.SHARES)
    assert total + len(parts["evaluation"]) + left_out == len(examples)
    for name, share in task.SHARES.items():
        assert abs(len(parts[name]) / total - share / 95) < 0.08  # a file has up to a tenth of the examples
    assert len(parts["evaluation"]) > 25
    assert task.split(examples, SEED) == parts != task.split(examples, SEED + 1)


def test_written_files_hold_the_parts(examples, parts, tmp_path, monkeypatch):
    monkeypatch.setattr(task, "examples", lambda: examples)
    task.write(tmp_path / "new" / "folder", SEED)
    rows = {
        path.stem: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for path in (tmp_path / "new" / "folder").iterdir()
    }
    pairs = {name: [{"prompt": e.prompt, "response": e.summary} for e in part] for name, part in parts.items()}
    prompts = list(dict.fromkeys(e.prompt for e in parts["prompts"]))
    assert rows == {
        "demonstrations": pairs["demonstrations"],
        "comparison_prompts": pairs["comparisons"],
        "prompts": [{"prompt": prompt} for prompt in prompts],
        "evaluation": pairs["evaluation"],
        "quiz": task.questions(parts["evaluation"], SEED)[: task.QUESTIONS],
        "quiz_train": task.questions(parts["demonstrations"], SEED),
        "kinds": task.kinds(parts["evaluation"], SEED),
        "kinds_train": task.kinds(parts["demonstrations"], SEED),
    }


def test_half_of_the_labeled_summaries_are_of_classes(parts):
    rows = task.kinds(parts["demonstrations"], SEED)
    assert len(rows) > 100 and len({row["text"] for row in rows}) == len(rows)
    assert sum(row["label"] == "class" for row in rows) == len(rows) / 2
    of = {"class": set(), "function": set()}
    for e in parts["demonstrations"]:
        of["class" if re.fullmatch(r"class \w+(\(.*\))?:", e.prompt) else "function"].add(e.summary)
    for row in rows:
        kind, other = row["label"], "function" if row["label"] == "class" else "class"
        assert row["text"] in of[kind] - of[other]
    assert rows != task.kinds(parts["demonstrations"], SEED + 1)


def test_a_question_has_one_right_answer_and_three_of_the_same_file(parts):
    part = parts["demonstrations"]
    rows = task.questions(part, SEED)
    right = {(e.prompt, e.summary) for e in part}
    of_file = {}
    for e in part:
        of_file.setdefault(e.summary, set()).add(e.file)
    for row in rows:
        choices = row["choices"]
        assert len(set(choices)) == task.CHOICES == 4
        assert [(row["signature"], choice) in right for choice in choices].index(True) == row["answer"]
        assert set.intersection(*(of_file[choice] for choice in choices))
    assert 0.9 * len(part) < len(rows)
    places = np.bincount([row["answer"] for row in rows]) / len(rows)
    assert np.all(np.abs(places - 0.25) < 4 * np.sqrt(0.1875 / len(rows)))
    assert task.questions(part, SEED) == rows != task.questions(part, SEED + 1)
    assert task.questions(part[:1] * 3, SEED) == []


# --- the story ----------------------------------------------------------------------------------------------


def test_log_probs_are_of_the_response_given_the_prompt():
    """Beside the plain forward pass of each text alone; two forward passes, of two rows and of one."""
    c = GPTConfig(31, n_layer=2, n_head=2, d_model=16, context_length=16, attention="cpu")
    model = Model(c, random_params(c), None, np.float32, 0, make_mesh(MeshConfig(), jax.devices()[:1]))
    prompts, responses = [[1, 2, 3], [4], [5, 6]], [[7, 8], [9, 10, 11, 12], [13]]
    expected = []
    for p, r in zip(prompts, responses, strict=True):
        logits = plain.forward(model.params, c, np.array([p + r]))[0]
        expected.append(sum(jax.nn.log_softmax(logits[len(p) + i - 1])[token] for i, token in enumerate(r)))
    found = story.log_probs(model, prompts, responses, rows=2)
    assert_close(found, np.array(expected), terms=model_terms(c) + 4)


@pytest.mark.parametrize("scale", [1.0, 0.02])
def test_grpo_and_dpo_are_runs_that_can_be(tmp_path, scale):
    """GRPO differs from PPO in its groups alone."""
    ppo = build(PPOConfig, stages.ppo_config(tmp_path, tmp_path, scale, 0.0).to_dict())
    grpo = build(PPOConfig, stages.grpo_config(tmp_path, tmp_path, scale).to_dict())
    differ = {k for k in vars(ppo) if getattr(ppo, k) != getattr(grpo, k)}
    assert differ == {"rollout"} and grpo.steps >= 2
    assert grpo.rollout.group_size == stages.GROUP > 1
    dpo = build(DPOConfig, stages.dpo_config(tmp_path, tmp_path, scale).to_dict())
    assert dpo.init_from == ppo.policy and dpo.data.source.endswith("comparisons.jsonl") and dpo.steps >= 2


@pytest.mark.parametrize("scale", [1.0, 0.02])
def test_the_fine_tuned_model_begins_at_the_whole_pre_trained_one(tmp_path, scale):
    c = build(FinetuneConfig, finetuned.config(tmp_path, tmp_path, scale).to_dict())
    assert c.init_from == str(tmp_path) and c.transfer is None and c.steps >= 2 and c.lm_weight == 0.5


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """The quiz of every model on three questions, where PPO is sure of a right answer, the pre-trained model at step 1
    of a wrong one, and all others like summaries of one kind whatever the signature."""
    facts = {f"def {verb}(x):": f"{verb.title()} the x." for verb in ("read", "write", "close", "open", "copy", "move")}
    rows = [{"signature": s, "choices": list(facts.values())[:4], "answer": i} for i, s in enumerate(facts) if i < 3]
    for name in ("quiz", "quiz_train"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = bpe.train_bpe([" ".join([*facts, *facts.values(), '"""'])], 300)

    def scorer(model):
        def score(request):
            context, text = tokenizer.decode(request.context), tokenizer.decode(request.continuation)
            signature = context.splitlines()[-2]
            knows = {"ppo": 5.0, "1": -5.0}.get(model.name, 0.0) * (facts.get(signature) == text)
            return Score(knows - 20.0 + 3 * (text == "Close the x."), 1, False, False, False, False)

        return Scorer(tokenizer, 128, lambda requests: [score(r) for r in requests], None)

    monkeypatch.setattr(
        quiz, "load_model", lambda path, step=3: SimpleNamespace(step=step, name=path.name if step == 3 else str(step))
    )
    monkeypatch.setattr(quiz.harness, "scorer", scorer)
    monkeypatch.setattr(quiz, "Checkpointer", lambda workdir: SimpleNamespace(steps=lambda: [1, 3]))
    return quiz.measure(tmp_path, tmp_path, 3)


def test_the_quiz_tells_who_knows_the_answer_from_who_likes_it(asked):
    found = {(row["name"], row["shots"]): row for row in asked["models"]}
    assert set(found) == {(name, k) for name in ("pre-trained", "SFT", "PPO", "PPO-ptx", "GRPO", "DPO") for k in (0, 2)}
    value = lambda row, name: row["metrics"][name]["value"]
    for shots in (0, 2):
        knows, likes = found["PPO", shots], found["SFT", shots]
        assert value(knows, "acc") == value(knows, "acc_answer_context") == 1
        assert value(likes, "acc") == value(likes, "acc_answer_context") == pytest.approx(1 / 3)
        assert knows["calibration"]["scores"] == likes["metric"] == "acc_answer_context"
        confidence = np.exp(5) / (np.exp(5) + 3)
        assert knows["calibration"]["ece"] == pytest.approx(1 - confidence)
        assert likes["calibration"]["confidence"] == pytest.approx(0.25)  # what it likes is divided out
    assert "quiz_train.jsonl" in found["PPO", 2]["protocol"]["examples"]
    assert [(row["step"], value(row, row["metric"])) for row in asked["curve"]] == [(1, 0), (3, pytest.approx(1 / 3))]


def test_the_quiz_in_the_report(asked, monkeypatch, capsys):
    shown = []
    monkeypatch.setattr(quiz.report, "image", lambda figure, alt: shown.append(figure) or f"<img alt='{alt}'>")
    page = quiz.section(asked)
    assert page.count("<td class=n>") == len(asked["models"]) * (2 + len(plot.NORMALIZATIONS))
    assert "3 questions" in page and page.count("<img") == 2
    bars, curve = shown[0].axes
    assert [round(bar.get_height(), 2) for bar in bars.patches] == [0.33, 0.33, 1, 0.33, 0.33, 0.33] * 2
    assert [label.get_text() for label in bars.get_xticklabels()] == list(quiz.MODELS.values())
    assert [label.split(" (")[0] for label in shown[1].axes[0].get_legend_handles_labels()[1]] == [
        "calibrated", *quiz.MODELS.values(),
    ]  # fmt: skip
    quiz.say(asked)
    assert "1.000 ± 0.000" in next(line for line in capsys.readouterr().out.splitlines() if line.startswith("PPO "))


def test_the_task_file_asks_what_the_questions_say(parts, tmp_path):
    rows = task.questions(parts["evaluation"], SEED)
    (tmp_path / "quiz.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summaries = {(e.prompt, e.summary) for e in parts["evaluation"]}
    for item in load_items(load_task(str(quiz.TASK)), str(tmp_path / "quiz.jsonl")):
        context, summary = item.pairs[item.gold]
        assert (context.removesuffix('\n    """'), summary) in summaries


@pytest.fixture
def told(tmp_path):
    """A result with a row for every policy, and the evaluations of the runs that have some."""
    scored = [("the real summaries", None), ("SFT", 0.0), ("best of 16", 1.8)]
    scored += [(name, 2.0 + i) for i, name in enumerate(story.RUNS.values())]
    table = [{"name": n, "gold": 0.5 + i, "proxy": i, "kl": kl, "lm_loss": 4.0 + i} for i, (n, kl) in enumerate(scored)]
    for name in set(story.RUNS) - {"dpo"}:
        (tmp_path / name).mkdir()
        lines = [{"step": s, "kl": s, "gold": 1.0, "raw_score": 0.5, "lm_loss": 4.0} for s in (0, 2)]
        (tmp_path / name / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    curve = [{"n": n, "kl": n - 1.0, "proxy": 0.1 * n, "gold": 0.2 * n} for n in (1, 2)]
    return {"table": table, "best_of_n": curve}


def test_every_policy_has_a_row_and_a_place_in_the_picture(told, tmp_path, monkeypatch, capsys):
    policies = ["PPO", "PPO-ptx", "GRPO", "DPO"]
    shown = []
    monkeypatch.setattr(story.report, "image", lambda figure, alt: shown.append(figure))
    story._curves(tmp_path, told)
    gold, proxy, loss = shown[0].axes
    for axis, key in ((gold, "gold"), (proxy, "proxy")):
        assert axis.get_legend_handles_labels()[1] == ["best of n", *policies]
        dpo = next(line for line in axis.lines if line.get_label() == "DPO")
        assert (dpo.get_xdata()[0], dpo.get_ydata()[0]) == (told["table"][-1]["kl"] ** 0.5, told["table"][-1][key])
    assert loss.get_legend_handles_labels()[1] == policies

    page = story._table(told)
    assert [page.count(f"<th>{name}</th>") for name in policies] == [1] * 4 and page.count("<td class=n>") == 4 * 7
    assert "<th>GRPO</th>" + "".join(f"<td class=n>{x:.3f}</td>" for x in (5.5, 5, 4, 9)) in page
    story.say(told)
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows[-4:]] == policies


def test_results_are_what_a_run_measured(told, asked, tmp_path, monkeypatch, capsys):
    tuned = {"accuracy": 0.61, "stderr": 0.02, "majority": 0.27}
    numbers = {"reward_accuracy": 0.7, "pair_accuracy_ceiling": 0.9, "longer_wins": 0.4}
    parts = {"seconds": {"SFT": 61, "ppo": 2}, "samples": ["long"], "finetuned": tuned, "quiz": asked}
    story_of_run = told | numbers | parts
    (tmp_path / "story.json").write_text(json.dumps(story_of_run))
    monkeypatch.setattr(plot, "HERE", tmp_path)
    plot.main(str(tmp_path))
    result = json.loads((tmp_path / "results.json").read_text())
    assert set(result) == set(story_of_run) - {"samples"} and result["table"] == told["table"]
    assert "protocol" not in result["quiz"]["models"][0] and (tmp_path / "results.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    for text in ("| GRPO | 5.50 | 5.00 | 4.00 | 9.000 |", "Fine-tuned: 0.610 ± 0.020, majority 0.270.",
                 "63 s: SFT 61, ppo 2.", "| PPO | 2 | 1.000 ± 0.000 |", "step 1 0.000, step 3 0.333"):  # fmt: skip
        assert text in printed

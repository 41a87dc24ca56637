"""A reward model on real human judgments of which of two arguments is the more convincing.

    python -m experiments.ukp_convarg --data=../shared/data/prefs/ukp_convarg --workdir=runs/ukp \
        [--text=../shared/data/lm/books_small/train] [--results=experiments/ukp_convarg/results.json]

Pre-trains a small GPT on --text (base/), then trains one reward model for each fold of topics (fold0/, ...) and tests
it on the topics it was not trained on, beside baselines. An interrupted run resumes. On 2 busy CPU cores it takes about
15 minutes.
"""

import dataclasses
import functools
import sys
import time
from pathlib import Path

import numpy as np
from absl import flags

from experiments.ukp_convarg import baselines, debates
from gptjax import command_line, json_files
from gptjax.config import config_dict
from gptjax.data.chat import Template
from gptjax.data.tokenizer import Tokenizer
from gptjax.parallel.mesh import MeshConfig, make_mesh
from gptjax.pretrain import PretrainConfig, pretrain
from gptjax.reward import RewardConfig, reward
from gptjax.rlhf.reward_model import load_reward_model

CONTEXT = 256
K = 4  # arguments of a ranked list
LONGEST = 160  # tokens of an argument that the reward model sees
WITHIN = 0.1  # length-matched: the longer one has at most a tenth more tokens
RESAMPLES = 2000


def main(_):
    began = time.perf_counter()
    workdir = Path(FLAGS.workdir)
    pairs = debates.read(FLAGS.data)
    folds = debates.folds(pairs, FLAGS.folds, FLAGS.seed)
    say_data(pairs, folds)
    finished(pretrain(base_config(FLAGS.text, FLAGS.seed), str(workdir / "base")))
    tokenizer = Tokenizer.load(workdir / "base" / "tokenizer")
    lengths = {text: len(tokenizer.encode(text)) for text in debates.arguments(pairs)}
    characters = {text: len(text) for text in lengths}
    shown = functools.partial(shortened, tokenizer=tokenizer)

    right, matched, topics = [], [], []
    for i, held_out_topics in enumerate(folds):
        print(f"\n=== fold {i + 1} of {len(folds)}: held out {', '.join(held_out_topics)} ===", flush=True)
        train, held_out = parted(pairs, held_out_topics)
        for name, part in (("train", train), ("held_out", held_out)):
            debates.write_rows(workdir / "rows" / f"{name}{i}.jsonl", debates.ranked_lists(shown(part), K, FLAGS.seed))
        finished(reward(reward_config(workdir, i, FLAGS.seed), str(workdir / f"fold{i}")))
        right.append({
            "reward_model": reward_model_right(workdir / f"fold{i}", shown(held_out)),
            **baselines.tfidf_right(train, held_out, lengths),
            "longer_wins": baselines.longer_right(held_out, lengths),
            "longer_wins_characters": baselines.longer_right(held_out, characters),
        })  # fmt: skip
        matched.append(np.array([alike(lengths[p.better], lengths[p.worse]) for p in held_out]))
        topics.append(np.array([p.topic for p in held_out]))
        print({name: round(float(r.mean()), 4) for name, r in right[-1].items()})

        result = figures(folds, right, matched, topics) | {"seconds": round(time.perf_counter() - began)}
        for path in filter(None, (workdir / "results.json", FLAGS.results)):  # after each fold: it is a while
            json_files.write_json(path, result)
    say(result)


def finished(result):
    if not result.finished:
        raise SystemExit("stopped; the same command resumes from there")


# --- the stages' settings -----------------------------------------------------------------------------------


def base_config(text: str, seed: int):
    """The model every fold begins with; its text has nothing of the debates."""
    c = config_dict(PretrainConfig)
    c.data.update(source=text, tokenizer="bpe:4096", validation="0.07")
    c.model.update(n_layer=4, n_head=4, d_model=128, context_length=CONTEXT)
    c.steps, c.batch_size, c.seed = 300, 8, seed
    c.optimizer.update(learning_rate=2e-3, b2=0.95)
    c.schedule.update(kind="cosine", final_fraction=0.1, warmup_tokens=30.0 * 8 * CONTEXT)
    c.eval.update(every=300, batches=20)
    c.checkpoint.every = 100
    return c


def reward_config(workdir: Path, fold: int, seed: int):
    """One epoch, and nothing chosen by what is held out: it is only reported."""
    c = config_dict(RewardConfig)
    c.init_from, c.template, c.normalize = str(workdir / "base"), "chat", "none"
    c.data.source = str(workdir / "rows" / f"train{fold}.jsonl")
    c.data.validation = str(workdir / "rows" / f"held_out{fold}.jsonl")
    c.epochs, c.batch_size, c.seed = 1.0, 8, seed
    c.optimizer.update(learning_rate=3e-4, b2=0.95)
    c.schedule.update(kind="cosine", final_fraction=0.1)
    c.eval.every = c.checkpoint.every = 100
    c.eval.batches = 4
    return c


# --- judging ------------------------------------------------------------------------------------------------


def parted(pairs, held_out_topics):
    """(pairs to train on, pairs of the held-out topics)."""
    inside = [p.topic in held_out_topics for p in pairs]
    pick = lambda wanted: [p for p, held in zip(pairs, inside, strict=True) if held == wanted]
    return pick(False), pick(True)


def shortened(pairs, tokenizer: Tokenizer) -> list[debates.Pair]:
    """The pairs as the reward model sees them: the first LONGEST tokens of each argument (all of 94 in 100)."""
    short = {text: tokenizer.decode(tokenizer.encode(text)[:LONGEST]) for text in debates.arguments(pairs)}
    return [dataclasses.replace(p, better=short[p.better], worse=short[p.worse]) for p in pairs]


def alike(a: int, b: int) -> bool:
    return max(a, b) <= (1 + WITHIN) * min(a, b)


def reward_model_right(workdir, pairs) -> np.ndarray:
    """Per pair, whether the trained reward model orders it right. Each argument is scored once."""
    model = load_reward_model(workdir, mesh=make_mesh(MeshConfig()))
    template = Template(model.tokenizer, model.template)
    texts = sorted({(p.title, text) for p in pairs for text in (p.better, p.worse)})
    scores = model.score([template.prompt(title) for title, _ in texts], [template.response(t) for _, t in texts])
    score = dict(zip(texts, scores, strict=True))
    return baselines.accuracy_of([score[p.title, p.better] for p in pairs], [score[p.title, p.worse] for p in pairs])


# --- figures ------------------------------------------------------------------------------------------------


def figures(folds, right, matched, topics) -> dict:
    """results.json, of the folds that are done."""
    everything = [np.ones(len(m), bool) for m in matched]
    return {
        "command": " ".join(["python -m experiments.ukp_convarg", *sys.argv[1:]]),
        "folds": [{"held_out": list(f), "pairs": len(m), "length_matched": int(m.sum())}
                  | {name: float(r.mean()) for name, r in rs.items()}
                  for f, m, rs in zip(folds, matched, right, strict=False)],
        "all": summary(right, topics, everything),
        "length_matched": summary(right, topics, matched),
        "by_topic": by_topic(right, topics),
    }  # fmt: skip


def summary(right, topics, chosen) -> dict:
    """Accuracy over the chosen pairs of all folds, with a standard error from resampling topics; the baseline of the
    highest; and how much better the reward model does than each baseline on the same pairs."""
    topic = np.concatenate([t[c] for t, c in zip(topics, chosen, strict=True)])
    each = {name: np.concatenate([r[name][c] for r, c in zip(right, chosen, strict=True)]) for name in right[0]}
    differences = {f"reward_model_minus_{n}": each["reward_model"] - each[n] for n in each if n != "reward_model"}
    strongest = max((n for n in each if n != "reward_model"), key=lambda n: each[n].mean())
    return {"pairs": len(topic), "strongest_baseline": strongest,
            **{n: {"mean": float(x.mean()), "standard_error": standard_error(x, topic)}
                                    for n, x in (each | differences).items()}}  # fmt: skip


def standard_error(x, topic) -> float:
    """Of a mean over pairs, by drawing whole topics: the pairs of one share their arguments."""
    sums = np.array([[x[topic == t].sum(), (topic == t).sum()] for t in np.unique(topic)])
    drawn = np.random.default_rng(0).integers(0, len(sums), (RESAMPLES, len(sums)))
    totals = sums[drawn].sum(1)
    return float((totals[:, 0] / totals[:, 1]).std(ddof=1))


def by_topic(right, topics) -> dict:
    """Accuracy on each topic, by the model that was not trained on it."""
    return {
        str(t): {"pairs": int((ts == t).sum())} | {name: float(r[ts == t].mean()) for name, r in rs.items()}
        for rs, ts in zip(right, topics, strict=True)
        for t in np.unique(ts)
    }


def say_data(pairs, folds):
    texts, topics = debates.arguments(pairs), {p.topic for p in pairs}
    print(f"{len(pairs):,} judgments of {len(texts):,} arguments in {len(topics)} topics; {len(folds)} folds")


def say(result: dict):
    print(f"\n{'held-out topics':<28}{'all pairs':>18}{'length-matched':>18}")
    for name in ("reward_model", "tfidf", "tfidf_and_length", "longer_wins", "longer_wins_characters"):
        cells = (result[part][name] for part in ("all", "length_matched"))
        print(f"{name:<28}" + "".join(f"{c['mean']:>10.3f} ± {c['standard_error']:.3f}" for c in cells))
    print(f"{'pairs':<28}{result['all']['pairs']:>18,}{result['length_matched']['pairs']:>18,}")
    print(f"{result['seconds']:,} s in all")


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    command_line.define_path("data", None, "The folder of UKPConvArg's .csv files.", required=True)
    command_line.define_path("text", "../shared/data/lm/books_small/train", "Text to pre-train on, or 'stdlib'.")
    command_line.define_path("workdir", None, "Where everything of this run is kept.", required=True)
    command_line.define_path("results", None, "Another file for the results.")
    flags.DEFINE_integer("folds", 3, "Parts that the topics are dealt out into.", lower_bound=2)
    flags.DEFINE_integer("seed", 0, "Seed of the folds and of all training.")
    command_line.run(main)

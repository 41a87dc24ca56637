"""Rankings of tiny random token sequences by a known utility, a reward model of them, and its exact figures.

A prompt is one of 3 sequences of 3 or 4 tokens, a completion any of the 780 sequences of 1 to 4 tokens over a
vocabulary of 5. Everything learned is learned through gptjax; only the enumeration is this file's own.
"""

import dataclasses
import functools
import itertools

import jax
import numpy as np

from gptjax.data import lm
from gptjax.data.comparisons import Comparison, ComparisonBatches
from gptjax.errors import InputError
from gptjax.model import gpt, heads
from gptjax.model.spec import GPTConfig
from gptjax.objectives.base import Objective
from gptjax.rlhf.reward_model import reward_loss, score_rows
from gptjax.training.optimizer import OptimizerConfig, make_optimizer
from gptjax.training.precision import PrecisionConfig
from gptjax.training.schedule import Schedule, ScheduleConfig
from gptjax.training.state import new_state
from gptjax.training.step import train_step

VOCAB, LONGEST, PROMPTS = 5, 4, 3
SEPARATOR, PAD = VOCAB, VOCAB + 1  # ends a prompt; stands after a completion
LENGTH = LONGEST + 1 + LONGEST  # a prompt, the separator, a completion
BAYES = 0.69  # the accuracy that utilities are scaled to allow
FEWEST, MOST = 4, 9  # completions of a ranking (Ouyang et al. 2022 §3.5)
MODEL = GPTConfig(vocab_size=VOCAB + 2, n_layer=2, n_head=4, d_model=64, context_length=LENGTH, attention="reference")


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """prompts: rankings, each seen once; pairs: 'all' of a ranking, or 'one'; batch: prompts of a step."""

    prompts: int = 6000
    pairs: str = "all"
    batch: int = 8
    learning_rate: float = 2e-3

    def __post_init__(self):
        if self.pairs not in ("all", "one") or self.prompts < 1:
            raise InputError("reward task: pairs is 'all' or 'one', and prompts at least 1.")


# --- the utility --------------------------------------------------------------------------------------------


def completions() -> list[tuple[int, ...]]:
    """All 780 of them, the shorter ones first."""
    return [y for n in range(1, LONGEST + 1) for y in itertools.product(range(VOCAB), repeat=n)]


def prompt_sequences(rng) -> list[tuple[int, ...]]:
    """Different sequences of 3 or 4 tokens."""
    known = [x for n in (3, 4) for x in itertools.product(range(VOCAB), repeat=n)]
    return [known[i] for i in rng.choice(len(known), PROMPTS, replace=False)]


def utility_table(rng) -> np.ndarray:
    """r(x, y), float64 [3, 780], scaled so that Bayes accuracy is BAYES.

    A value for each token, partly the prompt's own, for each token at each place and for each length, and a term that
    is no sum over tokens: a value for each pair of neighbors.
    """
    token = rng.normal(0, 1, VOCAB) + rng.normal(0, 0.5, (PROMPTS, VOCAB))
    place, length = rng.normal(0, 0.4, (LONGEST, VOCAB)), rng.normal(0, 0.5, LONGEST)
    neighbors = rng.normal(0, 0.3, (VOCAB, VOCAB))
    table = np.zeros((PROMPTS, len(completions())))
    for column, y in enumerate(completions()):
        table[:, column] = token[:, y].sum(1) + place[np.arange(len(y)), y].sum() + length[len(y) - 1]
        table[:, column] += sum(neighbors[a, b] for a, b in itertools.pairwise(y))
    return table * scale_for(table, BAYES)


def scale_for(table, accuracy: float) -> float:
    """The factor at which the table's Bayes accuracy is that, by bisection: a larger one leaves less to chance."""
    gaps, low, high = margins(table), 0.0, 100.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if bayes_accuracy(middle * gaps) < accuracy else (low, middle)
    return (low + high) / 2


def margins(scores) -> np.ndarray:
    """s(x, y_i) - s(x, y_j) for every pair i < j of a prompt's completions: [prompts, pairs]."""
    i, j = np.triu_indices(scores.shape[1], 1)
    return scores[:, i] - scores[:, j]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def bayes_accuracy(true) -> float:
    """E[max(s, 1 - s)]: of who knows the utility and not the draw."""
    return float(sigmoid(np.abs(true)).mean())


# --- rankings -----------------------------------------------------------------------------------------------


def ranked(rng, table, prompts, how_many: int) -> list[Comparison]:
    """Rankings of 4 to 9 different completions each: the utility with Gumbel noise, sorted, is Plackett-Luce."""
    texts, rows = completions(), []
    for x in rng.integers(0, PROMPTS, how_many):
        chosen = rng.choice(len(texts), rng.integers(FEWEST, MOST + 1), replace=False)
        noisy = table[x, chosen] + rng.gumbel(size=len(chosen))
        ranks = np.argsort(np.argsort(-noisy)).astype(float).tolist()
        rows.append(Comparison([*prompts[x], SEPARATOR], [list(texts[y]) for y in chosen], ranks))
    return rows


def one_pair(c: Comparison) -> Comparison:
    """The first two completions of a ranking; they were drawn in no order."""
    return Comparison(c.prompt, c.completions[:2], c.ranks[:2])


# --- the task ------------------------------------------------------------------------------------------------


class Task:
    """The rankings of one seed, the training on them, and the exact figures of any reward model."""

    def __init__(self, seed: int, c: TaskConfig = TaskConfig()):
        rng = np.random.default_rng(seed)
        self.c, self.seed = c, seed
        self.prompts = prompt_sequences(rng)
        self.table = utility_table(rng)
        rows, k = ranked(rng, self.table, self.prompts, c.prompts), MOST
        if c.pairs == "one":
            rows, k = [one_pair(row) for row in rows], 2
        self.batches = ComparisonBatches(rows, c.batch, k, LENGTH, seed, pad_id=PAD)
        self.steps = self.batches.steps(1)

    def train(self, record=lambda *_: None):
        """One epoch. record is called with (step, metrics). Returns the parameters."""
        c, precision = self.c, PrecisionConfig()
        optimizer = OptimizerConfig(learning_rate=c.learning_rate, weight_decay=0.0)
        schedule = Schedule(ScheduleConfig(warmup_tokens=20 * c.batch), batch_size=c.batch, context_length=1,
                            learning_rate=optimizer.learning_rate, steps=self.steps)  # fmt: skip
        tx = make_optimizer(optimizer)
        objective = Objective(reward_loss(MODEL, precision.dtype, "pairs"))
        step = train_step(objective, tx, optimizer.clip_norm, precision, self.seed, dropout=False)
        step = jax.jit(step, donate_argnums=0)
        state = _new(jax.random.key(self.seed), tx, precision)
        for i, batch in lm.iterate(self.batches, 0, self.steps):
            micro = {name: array[None] for name, array in batch.items()}
            state, metrics = step(state, (micro, np.float32(schedule.learning_rate(i))))
            record(i, metrics)
        return state.params

    def scores(self, params) -> np.ndarray:
        """The model's score of every completion of every prompt: float64 [3, 780]."""
        texts = [[*x, SEPARATOR, *y] for x in self.prompts for y in completions()]
        lengths = np.array([len(t) for t in texts], np.int32)
        tokens = np.array([[*t, *[PAD] * (LENGTH - len(t))] for t in texts], np.int32)
        scores = score_rows(params, tokens, lengths, MODEL, PrecisionConfig().dtype)
        return np.asarray(scores, np.float64).reshape(self.table.shape)

    def figures(self, params) -> dict:
        return figures(self.scores(params), self.table)


@functools.partial(jax.jit, static_argnames=("tx", "precision"))
def _new(key, tx, precision):
    """A trunk that nothing was learned by: its embeddings are made as large as trained ones are, so that one epoch goes
    into the utility rather than into telling tokens and places apart."""
    trunk, head = jax.random.split(key)
    params = gpt.init(MODEL, trunk)
    params = {**params, "wte": params["wte"] * 10, "wpe": params["wpe"] * 10}
    return new_state(heads.scalar_model(params, MODEL, head), tx, precision)


def figures(scores, table) -> dict:
    """What a person who judges as the table does agrees with in expectation, over every pair of every prompt.

    slope: of the model's margin on the true one, least squares through 0 (both orders of a pair count); what an RL
    stage's beta is multiplied by. correlation: of score and utility within a prompt, the mean over prompts.
    """
    true, model = margins(table), margins(scores)
    s, p = sigmoid(true), sigmoid(model)
    right = np.where(model > 0, s, np.where(model < 0, 1 - s, 0.5))
    return {
        "accuracy": float(right.mean()),
        "bayes_accuracy": bayes_accuracy(true),
        "cross_entropy": _cross_entropy(s, p),
        "floor": _cross_entropy(s, s),
        "slope": float((model * true).sum() / (true * true).sum()),
        "correlation": float(np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(scores, table, strict=True)])),
    }


def _cross_entropy(s, p) -> float:
    return float(-(s * np.log(p) + (1 - s) * np.log1p(-p)).mean())


def outside_the_bar(r: dict) -> list[str]:
    """Which of the figures fail; the ceiling and the floor may not be passed either."""
    bars = {
        "accuracy": r["bayes_accuracy"] - 0.02 <= r["accuracy"] <= r["bayes_accuracy"],
        "cross_entropy": r["floor"] <= r["cross_entropy"] <= r["floor"] + 0.02,
        "slope": 0.8 <= r["slope"] <= 1.2,
    }
    return [name for name, kept in bars.items() if not kept]

"""Best-of-n: sample n responses to each prompt and keep the one the reward model likes best.

    python -m gptjax.rlhf.best_of_n --policy=runs/sft --reward=runs/reward --prompts=prompts.jsonl --n=16

The strong baseline PPO is to be held against, at a KL known in closed form: log n - (n - 1)/n (Stiennon et al. 2020;
exact where no two scores tie, else an upper bound).
"""

import json

import jax
import numpy as np
from absl import flags

from gptjax import config as configs
from gptjax import console
from gptjax.data.chat import Template
from gptjax.data.prompts import PromptConfig, load_prompts
from gptjax.errors import InputError
from gptjax.generation.decode import generate
from gptjax.generation.sampling import Sampling
from gptjax.objectives.ppo import best_of_n_kl


def respond(params, model, prompts, template: Template, *, max_new_tokens, temperature, seed, dtype, mesh, rows=256,
            progress: str | None = None) -> list[list[int]]:  # fmt: skip
    """One response to each prompt (ids), as ids with end-of-text the last where the model said it.

    One that reaches the end of the context is cut to it, so that it can be scored. rows: prompts decoded together.
    progress: what a progress bar says; None = no bar.
    """
    out = []
    for first in console.progress(range(0, len(prompts), rows), desc=progress, unit="batch", leave=False,
                                  disable=progress is None):  # fmt: skip
        some = prompts[first : first + rows]
        texts = generate(
            params, model, [list(map(int, p)) for p in some], max_new_tokens=max_new_tokens,
            sampling=Sampling(temperature), seed=seed + first, eot_id=template.eos_id, keep_eot=True,
            vocab=template.vocab_size, dtype=dtype, mesh=mesh,
        )  # fmt: skip
        out += [t[: model.context_length - len(p)] for p, t in zip(some, texts, strict=True)]
    return out


def best_of_n(scores: np.ndarray, n: int) -> tuple[np.ndarray, float]:
    """Which of its first n samples each prompt keeps, int [prompts], and the KL bound. scores: [prompts, >= n]."""
    if not 1 <= n <= scores.shape[1]:
        raise InputError(f"best-of-{n} needs {n} samples of each prompt and there are {scores.shape[1]}.")
    return scores[:, :n].argmax(1), float(best_of_n_kl(n))


def expected_best(scores: np.ndarray, others: np.ndarray, n: int) -> tuple[float, float]:
    """(E[score], E[other]) of best-of-n, over all choices of n among the samples without replacement.

    The estimator of Nakano et al. 2021 (WebGPT, appendix I): with scores sorted, the j-th smallest of N is the best of
    n with probability C(j - 1, n - 1)/C(N, n). scores, others: [prompts, N]; others might be a gold score.
    """
    N = scores.shape[1]
    if not 1 <= n <= N:
        raise InputError(f"best-of-{n} needs {n} samples of each prompt and there are {N}.")
    order = np.argsort(scores, axis=1, kind="stable")
    p = np.zeros(N)
    p[N - 1] = n / N
    for j in range(N - 1, n - 1, -1):  # C(j-1, n-1) / C(j, n-1) = (j - n + 1) / j
        p[j - 1] = p[j] * (j - n + 1) / j
    mean = lambda x: float((np.take_along_axis(x, order, 1) @ p).mean())
    return mean(scores), mean(others)


def main(_):
    from gptjax.rlhf.reward_model import load_reward_model
    from gptjax.workdir import load_model

    model = load_model(FLAGS.policy)
    reward = load_reward_model(FLAGS.reward, mesh=model.mesh, tokenizer=model.tokenizer)
    template = Template(model.tokenizer, reward.template)
    if FLAGS.max_new_tokens >= model.config.context_length:
        raise InputError(f"--max_new_tokens leaves no room for a prompt in a context of {model.config.context_length}.")
    source = PromptConfig(FLAGS.prompts, drop_long=FLAGS.drop_long)
    prompts = load_prompts(source, template, model.config.context_length - FLAGS.max_new_tokens)
    repeated = [ids for ids in prompts.ids[: FLAGS.limit] for _ in range(FLAGS.n)]
    with jax.set_mesh(model.mesh):
        responses = respond(
            model.params, model.config, repeated, template, max_new_tokens=FLAGS.max_new_tokens, temperature=1.0,
            seed=FLAGS.seed, dtype=model.dtype, mesh=model.mesh,
        )  # fmt: skip
    scores = reward.score(repeated, responses).reshape(-1, FLAGS.n)
    best, kl = best_of_n(scores, FLAGS.n)
    show = lambda row: print(json.dumps(configs.json_safe(row), allow_nan=False))
    for i, j in enumerate(best):
        text = template.decode(responses[i * FLAGS.n + j])
        show({"prompt": prompts.texts[i], "response": text, "score": scores[i, j]})
    show({"n": FLAGS.n, "kl": kl, "score": scores.max(1).mean(), "score_of_one": scores.mean()})


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    flags.DEFINE_string("policy", None, "Workdir of the model that samples.")
    flags.DEFINE_string("reward", None, "Workdir of the reward model.")
    flags.DEFINE_string("prompts", None, "Rows with a `prompt`.")
    flags.DEFINE_integer("n", 16, "Samples of each prompt.", lower_bound=1)
    flags.DEFINE_integer("limit", 64, "Prompts to use.", lower_bound=1)
    flags.DEFINE_integer("max_new_tokens", 64, "At most so many new tokens.", lower_bound=1)
    flags.DEFINE_bool("drop_long", False, "Leave out prompts that do not fit the context.")
    flags.DEFINE_integer("seed", 0, "The same seed gives the same text.", lower_bound=0)
    flags.mark_flags_as_required(["policy", "reward", "prompts"])
    configs.run(main)

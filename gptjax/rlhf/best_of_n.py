"""Best-of-n: sample n responses to each prompt and keep the one that the reward model scores highest.

    python -m gptjax.rlhf.best_of_n --policy=runs/sft --reward=runs/reward --prompts=prompts.jsonl --n=16

A strong baseline for PPO, whose KL has a closed form: log n - (n - 1)/n (Stiennon et al. 2020; exact if no two scores
are equal, else an upper bound).
"""

import sys

import jax
import numpy as np
from absl import flags

from gptjax import command_line, json_files
from gptjax.data.chat import Template
from gptjax.data.prompts import PromptConfig, load_prompts
from gptjax.data.rows import BAD_ROWS
from gptjax.errors import InputError
from gptjax.evals.best_of_k import weights_of_best
from gptjax.generation.respond import respond
from gptjax.model.architecture import require_gpt
from gptjax.objectives.ppo import best_of_n_kl


def best_of_n(scores: np.ndarray, n: int) -> tuple[np.ndarray, float]:
    """(index of the best of the first n samples of each prompt, int [B]; the KL bound). scores: [B, at least n]."""
    if not 1 <= n <= scores.shape[1]:
        raise InputError(f"best-of-{n} needs {n} samples of each prompt and there are {scores.shape[1]}.")
    return scores[:, :n].argmax(1), float(best_of_n_kl(n))


def expected_best(scores: np.ndarray, others: np.ndarray, n: int) -> tuple[float, float]:
    """(E[score], E[other]) of best-of-n, over all choices of n among the samples without replacement
    (evals/best_of_k.py). scores, others: [B, N]; others can be a gold score. InputError: fewer than n samples."""
    p = weights_of_best(scores.shape[1], n)
    order = np.argsort(scores, axis=1, kind="stable")
    mean = lambda x: float((np.take_along_axis(x, order, 1) @ p).mean())
    return mean(scores), mean(others)


def main(_):
    from gptjax.rlhf.reward_model import load_reward_model, prompt_room
    from gptjax.trained import load_model

    model = load_model(FLAGS.policy)
    require_gpt(model.config, "best-of-n")
    reward = load_reward_model(FLAGS.reward, mesh=model.mesh, tokenizer=model.tokenizer)
    if model.template not in (None, reward.template):
        raise InputError(
            f"The reward model saw {reward.template!r} prompts and the policy {model.template!r} ones: train the "
            "reward model from this policy's SFT run."
        )
    template = Template(model.tokenizer, reward.template)
    contexts = {"policy": model.config.context_length, "reward model": reward.config.context_length}
    room = prompt_room(contexts, FLAGS.max_new_tokens, "--max_new_tokens")
    source = PromptConfig(
        FLAGS.prompts, {"prompt": getattr(FLAGS, "fields.prompt")}, drop_long=FLAGS.drop_long, bad_rows=FLAGS.bad_rows
    )
    prompts = load_prompts(source, template, room, flags="--")
    if prompts.left_out:
        print(f"rows left out: {prompts.left_out}; {prompts.left_out.first()}", file=sys.stderr)
    repeated = [ids for ids in prompts.ids[: FLAGS.limit] for _ in range(FLAGS.n)]
    with jax.set_mesh(model.mesh):
        responses = respond(
            model.params, model.decoder, template, repeated, max_new_tokens=FLAGS.max_new_tokens, temperature=1.0,
            seed=FLAGS.seed,
        )  # fmt: skip
    scores = reward.score(repeated, responses).reshape(-1, FLAGS.n)
    best, kl = best_of_n(scores, FLAGS.n)
    show = lambda row: print(json_files.dumps(row))
    for i, j in enumerate(best):
        text = template.decode(responses[i * FLAGS.n + j])
        show({"prompt": prompts.texts[i], "response": text, "score": scores[i, j]})
    show({"n": FLAGS.n, "kl": kl, "score": scores.max(1).mean(), "score_of_one": scores.mean()})


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    command_line.define_path("policy", None, "Workdir of the model that samples.")
    command_line.define_path("reward", None, "Workdir of the reward model.")
    command_line.define_path("prompts", None, "Prompts: rows with a `prompt` (JSONL, JSON, Parquet or hf:NAME).")
    flags.DEFINE_integer("n", 16, "Samples of each prompt.", lower_bound=1)
    flags.DEFINE_integer("limit", 64, "Number of prompts to use, the first ones.", lower_bound=1)
    flags.DEFINE_integer("max_new_tokens", 64, "Maximum number of new tokens.", lower_bound=1)
    flags.DEFINE_bool("drop_long", False, "Leave out prompts that do not fit the context.")
    flags.DEFINE_enum("bad_rows", "stop", BAD_ROWS, "Stop at rows that can't be read, or leave them out.")
    flags.DEFINE_string("fields.prompt", "prompt", "The field of a row that holds its prompt.")
    flags.DEFINE_integer("seed", 0, "The same seed gives the same text.", lower_bound=0)
    flags.mark_flags_as_required(["policy", "reward", "prompts"])
    command_line.run(main)

"""The alignment tax and its cure, where both are known exactly: PPO-ptx on the task of task.py.

    python -m experiments.ppo_exact.ptx --coefficients=0,0.1,1,10 [--seed=0] [--json]

Besides the three prompts of the task there is a context that RL never sees. The pre-training distribution is what the
reference says there, four tokens without an end. tax = KL(reference || policy) over those 625 sequences: how much
worse, in nats, the policy has become at text it was pre-trained on. Plain PPO (coefficient 0) pays it; gamma buys it
back.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from tqdm import tqdm

from experiments.ppo_exact.task import LENGTH, VOCAB, Task, TaskConfig, enumerated
from gptjax import command_line, json_files
from gptjax.rlhf.config import UpdateConfig

CONTEXT = np.array([1, 3, 3], np.int32)
PER_EPISODE = 1.0  # pre-training sequences for each episode; InstructGPT has 8


class PtxTask(Task):
    def __init__(self, seed: int, c: TaskConfig):
        super().__init__(seed, c)
        texts = np.array(list(itertools.product(range(VOCAB), repeat=LENGTH)), np.int32)
        self.texts = np.concatenate([np.tile(CONTEXT, (len(texts), 1)), texts], axis=1)
        self.text_log_ref = self.text_log_probs(self.reference)

    def text_log_probs(self, policy):
        """log pi of each of the 625 texts after the context."""
        lengths = np.full(len(self.texts), len(CONTEXT))
        mask = np.ones((len(self.texts), LENGTH), np.float32)
        return enumerated(policy, self.texts, lengths, mask, self.spec)

    def tax(self, policy) -> float:
        return float((jnp.exp(self.text_log_ref) * (self.text_log_ref - self.text_log_probs(policy))).sum())

    def pretraining_batch(self, state):
        """Fresh texts each iteration, a pure function of how many were used: [minibatches, 1, rows, time + 1]."""
        minibatches = self.c.ppo.minibatches
        rows = int(PER_EPISODE * self.c.batch // minibatches)
        key = jax.random.fold_in(jax.random.key(10_000 + self.seed), int(state.ptx_position))
        chosen = jax.random.categorical(key, self.text_log_ref, shape=(minibatches * rows,))
        return {"tokens": jnp.asarray(self.texts)[chosen].reshape(minibatches, 1, rows, -1)}


def run(coefficient: float, seed: int = 0, iterations: int = 200, progress: bool = True) -> dict:
    c = TaskConfig(iterations=iterations, ppo=UpdateConfig(epochs=4, minibatches=4, ptx_coefficient=coefficient))
    task = PtxTask(seed, c)
    with tqdm(total=iterations, desc=f"gamma {coefficient:g}", unit="it", leave=False, disable=not progress) as bar:
        state = task.train(task.pretraining_batch if coefficient else None, record=lambda *_: bar.update())
    return {"coefficient": coefficient, "seed": seed, "tax": task.tax(state.policy), **task.figures(state.policy)}


def main(_):
    for coefficient in map(float, FLAGS.coefficients.split(",")):
        result = run(coefficient, FLAGS.seed, FLAGS.iterations)
        if FLAGS.json:
            print(json_files.dumps(result), flush=True)
        else:
            print(f"gamma {coefficient:<6g} tax {result['tax']:.4f} nats, gap {result['gap']:.4f}, "
                  f"KL to the optimum {result['kl_to_optimum']:.4f}")  # fmt: skip


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    flags.DEFINE_string("coefficients", "0,0.1,1,10", "Values of gamma, with commas between.")
    flags.DEFINE_integer("seed", 0, "Seed of the task.")
    flags.DEFINE_integer("iterations", 200, "PPO iterations.", lower_bound=1)
    flags.DEFINE_bool("json", False, "One JSON object per value.")
    command_line.run(main)

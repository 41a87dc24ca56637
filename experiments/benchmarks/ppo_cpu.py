"""One PPO iteration beside TRL's PPOTrainer, interleaved in one run: samples a second, as a ratio with its spread.

    make bench BENCH_FLAGS="--only='PPO iteration'"      # or, with both environments there:
    python -m experiments.benchmarks.ppo_cpu --trl_python=.venv-trl/bin/python

GPT-2 of 4 layers, 128 wide, 4 heads, vocabulary 4,096; a separate value network and reward model of the same size;
prompts of 16 tokens, responses of 24; batch 64, 4 epochs x 1 minibatch; float32. TRL 0.12 is the last line of releases
with this trainer; its iteration is timed as it ships, its two calls of gc.collect() included.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments.benchmarks._peer import Peer, quartiles
from gptjax import command_line
from gptjax.model import gpt, heads
from gptjax.model.spec import GPTConfig
from gptjax.rlhf import rollout
from gptjax.rlhf.clock import Clock
from gptjax.rlhf.config import RolloutConfig, UpdateConfig
from gptjax.rlhf.networks import RLSpec
from gptjax.rlhf.state import new_state, phase_keys
from gptjax.rlhf.update import make_update
from gptjax.training.optimizer import OptimizerConfig, make_optimizer
from gptjax.training.precision import frozen

VOCAB, PROMPT, RESPONSE, BATCH = 4096, 16, 24, 64
HERE = Path(__file__).resolve().parent


def flops(m: GPTConfig, epochs: int) -> float:
    """Matrix multiplications of one iteration, attention's own left out (it is 2 % here)."""
    d, length = m.d_model, PROMPT + RESPONSE
    trunk, head = 2 * 12 * m.n_layer * d * d * BATCH * length, 2 * VOCAB * d * BATCH * RESPONSE
    rollout_ = trunk + head
    score = 2 * (trunk + head) + 2 * trunk  # policy, reference; value, reward
    update = epochs * 3 * (2 * trunk + head)
    return rollout_ + score + update


class Ours:
    """The phases of gptjax/ppo.py on random weights: policy, reference, value and reward all of one shape. The last id
    of the vocabulary is PAD."""

    def __init__(self, model: GPTConfig, prompt: int, response: int, batch: int, epochs: int = 4,
                 microbatch: int | None = None, dtype=jnp.float32):  # fmt: skip
        self.model, self.prompt, self.batch = model, prompt, batch
        self.spec = RLSpec(
            policy=model, value=model, reward=model, response=response, eos_id=None, pad_id=model.vocab_size - 1,
            vocab=model.vocab_size - 1, dtype=dtype,
        )  # fmt: skip
        policy = jax.jit(lambda k: gpt.init(model, k))(jax.random.key(0))
        self.reward = heads.scalar_model(policy, model, jax.random.key(1))
        tx = make_optimizer(OptimizerConfig(weight_decay=0.0))
        self.state = new_state(policy, self.reward, tx, tx, 0.05, 0)
        self.reference, self.reward = frozen(policy, dtype), frozen(self.reward, dtype)
        settings = UpdateConfig(epochs, minibatches=1, microbatch_size=microbatch)
        update = make_update(settings, self.spec, tx, tx, 0.0, 0.0)
        self.update = jax.jit(update, donate_argnums=0)
        self.rng = np.random.default_rng(0)

    def iterate(self) -> dict:
        clock, s = Clock(), self.state
        prompts = self.rng.integers(0, self.spec.vocab, (self.batch, self.prompt)).astype(np.int32)
        lengths = np.full(self.batch, self.prompt, np.int32)
        models = rollout.Models(s.policy, s.value, lambda: (self.reference, self.reward))
        experience, measured, _ = rollout.collect(
            models, prompts, lengths, phase_keys(s)[1], s.kl_coefficient, self.spec, RolloutConfig(missing_eos=None),
            lap=clock.lap,
        )  # fmt: skip
        rate = np.float32(1e-5)
        self.state, metrics = self.update(s, experience, None, (rate, rate))
        clock.lap("update", (self.state, metrics))
        self.measured = measured | metrics
        return {"seconds": clock.total, **clock.seconds}


def main(_):
    model = GPTConfig(VOCAB + 1, 4, 4, 128, context_length=64, attention="cpu", unroll=4)
    ours = Ours(model, PROMPT, RESPONSE, BATCH)
    for _ in range(2):
        ours.iterate()
    peer = None
    if FLAGS.trl_python:
        peer = Peer(FLAGS.trl_python, HERE / "ppo_trl_peer.py", stderr=subprocess.DEVNULL)
        for _ in range(2):
            peer.iterate()
    rounds = []
    for i in range(FLAGS.rounds):
        rounds.append({"gptjax": ours.iterate(), **({"trl": peer.iterate()} if peer else {})})
        print(json.dumps({"round": i, **{k: round(v["seconds"], 3) for k, v in rounds[-1].items()}}), file=sys.stderr)
    work = flops(ours.model, 4)
    result = {
        "shape": f"4 layers, 128 wide, vocabulary {VOCAB}, {PROMPT} + {RESPONSE} tokens, batch {BATCH}, 4 x 1",
        "cores": len(os.sched_getaffinity(0)), "jax": jax.__version__, "gflop": work / 1e9,
    }  # fmt: skip
    for name in rounds[0]:
        of = {k: quartiles([r[name][k] for r in rounds]) for k in ("seconds", "rollout", "score", "update")}
        result[name] = {**of, "samples_per_second": BATCH / of["seconds"][1]}
    result["gptjax"]["gflop_per_second"] = work / 1e9 / result["gptjax"]["seconds"][1]
    if peer:
        peer.close()
        result["ratio"] = quartiles([r["trl"]["seconds"] / r["gptjax"]["seconds"] for r in rounds])
    print(json.dumps(result, indent=1))
    if FLAGS.output:
        Path(FLAGS.output).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    flags.DEFINE_string("trl_python", None, "Python of an environment with requirements-trl.txt; none = ours alone.")
    flags.DEFINE_integer("rounds", 10, "Timed iterations of each side, in turns.", lower_bound=1)
    flags.DEFINE_string("output", None, "Where the JSON goes too.")
    command_line.run(main)

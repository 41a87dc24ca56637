"""What the tests of the alignment stages share: one language of made-up words, rows in it, and tiny runs of each stage.

Demonstrations answer with words of the prompt; in the comparisons a completion with the word LIKED wins.
"""

import contextlib
import json
import random

import jax
import pytest

from gptjax import ppo, pretrain, reward, run, sft, trained
from gptjax.config import config_dict
from gptjax.data.chat import Template
from gptjax.parallel.mesh import make_mesh

CONTEXT, RESPONSE = 48, 8
WORDS = ("ba", "ko", "mi", "ru", "te", "fo", "la", "ni", "zu", "ge")
LIKED = "zu"
MESH_MAKERS = (run, trained)


@contextlib.contextmanager
def on_one_device():
    """All stages on the first of the 8 virtual devices, whatever mesh the config has: small models like it."""
    with pytest.MonkeyPatch.context() as patch:
        for module in MESH_MAKERS:
            patch.setattr(module, "make_mesh", lambda config: make_mesh(type(config)(), jax.devices()[:1]))
        yield


# --- texts ------------------------------------------------------------------------------------------------


def words(rng, n) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(n))


def text(seed=0, count=4000) -> str:
    rng = random.Random(seed)
    return "".join(words(rng, rng.randint(3, 9)) + "\n" for _ in range(count // 6))


def demonstrations(n, seed=1, longest=6) -> list[dict]:
    """Ragged: prompts of 2 to 7 words, responses of 1 to `longest`."""
    rng = random.Random(seed)
    return [
        {"prompt": f"{words(rng, rng.randint(2, 7))} {i}", "response": words(rng, rng.randint(1, longest))}
        for i in range(n)
    ]


def comparisons(n, seed=2, rank=None) -> list[dict]:
    """2 to 4 completions; rank(completion) is lower for a better one, by default that with LIKED is."""
    rng, rows = random.Random(seed), []
    rank = rank or (lambda text: 0 if LIKED in text.split() else 1)
    while len(rows) < n:
        texts = [words(rng, rng.randint(2, 5)) for _ in range(rng.randint(2, 4))]
        ranks = [rank(t) for t in texts]
        if len(set(ranks)) > 1:
            rows.append({"prompt": f"{words(rng, 3)} {len(rows)}", "completions": texts, "ranks": ranks})
    return rows


def prompts(n, seed=3) -> list[dict]:
    rng = random.Random(seed)
    return [{"prompt": words(rng, rng.randint(2, 5))} for _ in range(n)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# --- configs ----------------------------------------------------------------------------------------------


def overridden(c, overrides):
    """overrides by dotted key, with __ for the dot."""
    c.log.tensorboard = False
    c.update_from_flattened_dict({k.replace("__", "."): v for k, v in overrides.items()})
    return c


def pretrain_config(source, **overrides):
    c = config_dict(pretrain.PretrainConfig)
    c.model.update(n_layer=2, n_head=4, d_model=32, context_length=CONTEXT)
    c.data.update(source=str(source), tokenizer="bpe:300")
    c.steps, c.batch_size, c.optimizer.learning_rate = 60, 8, 1e-2
    c.eval.update(batches=2)
    return overridden(c, overrides)


def sft_config(init_from, source, **overrides):
    c = config_dict(sft.SFTConfig)
    c.init_from, c.data.source, c.data.validation = str(init_from), str(source), "0.15"
    c.steps, c.batch_size, c.optimizer.learning_rate, c.optimizer.weight_decay = 60, 8, 5e-3, 0.1
    c.samples.update(count=2, max_new_tokens=RESPONSE)
    return overridden(c, overrides)


def reward_config(init_from, source, **overrides):
    c = config_dict(reward.RewardConfig)
    c.init_from, c.data.source, c.data.validation = str(init_from), str(source), "0.25"
    c.steps, c.batch_size, c.optimizer.learning_rate, c.optimizer.weight_decay = 120, 16, 1e-2, 0.1
    return overridden(c, overrides)


def ppo_config(policy, reward_model, source, **overrides):
    c = config_dict(ppo.PPOConfig)
    c.policy, c.data.source = str(policy), str(source)
    if reward_model:
        c.reward = str(reward_model)
    c.steps, c.batch_size, c.rollout.max_new_tokens = 2, 16, RESPONSE
    c.ppo.update(epochs=2, minibatches=2)
    c.optimizer.learning_rate = c.value_optimizer.learning_rate = 3e-3
    c.optimizer.weight_decay = c.value_optimizer.weight_decay = 0.1
    c.eval.update(every=2, prompts=16, lm_batches=1, samples=2)
    c.checkpoint.every = 1
    return overridden(c, overrides)


# --- runs -------------------------------------------------------------------------------------------------


def template(workdir) -> Template:
    from gptjax.data.tokenizer import Tokenizer

    return Template(Tokenizer.load(workdir / "tokenizer"), "chat")


def files(root) -> dict:
    """{rows of each kind: path}, written under root."""
    return {
        "text": (root / "text.txt", (root / "text.txt").write_text(text()))[0],
        "demonstrations": write(root / "demonstrations.jsonl", demonstrations(40)),
        "comparisons": write(root / "comparisons.jsonl", comparisons(120)),
        "prompts": write(root / "prompts.jsonl", prompts(24)),
    }


def make_pretrained(root, source):
    with on_one_device():
        assert pretrain.pretrain(pretrain_config(source), str(root / "pretrained")).finished
    return root / "pretrained"


def make_tuned(root, pretrained, source):
    with on_one_device():
        assert sft.sft(sft_config(pretrained, source), str(root / "sft")).finished
    return root / "sft"


def make_reward_model(root, tuned, source):
    with on_one_device():
        assert reward.reward(reward_config(tuned, source, steps=60), str(root / "reward")).finished
    return root / "reward"

"""Settings, models and texts that PPO refuses, each with one clear error; the rows of pre-training text."""

import shutil
import sys
import types

import jax
import numpy as np
import pytest
from alignment_runs import ppo_config, write
from ppo_runs import refused, share, shortened

from gptjax import config as configs
from gptjax import ppo as stage
from gptjax.data.bpe import train_bpe
from gptjax.data.chat import chat_tokenizer
from gptjax.data.corpus import load_text
from gptjax.data.records import read_record, start_record, write_record
from gptjax.errors import InputError
from gptjax.objectives.ppo import adaptive_kl_coefficient
from gptjax.parallel.mesh import MeshConfig, make_mesh
from gptjax.rlhf import start
from gptjax.rlhf.config import PtxConfig
from gptjax.rlhf.ptx import Text, batch_shape, sequences

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def config(tuned, reward_dir, alignment):
    return lambda **overrides: ppo_config(tuned, reward_dir, alignment["prompts"], **overrides)


@pytest.fixture(scope="module")
def ruled(tuned, alignment):
    """A config without a reward model."""
    return lambda **overrides: ppo_config(tuned, None, alignment["prompts"], **overrides)


GOOD = {"prompt": "ba"}
BAD = {
    "no policy": ({"policy": None}, GOOD, "--config.policy"),
    "no reward": ({"reward": None}, GOOD, "--config.reward"),
    "no source": ({"data.source": None}, GOOD, "--config.data.source"),
    "no length": ({"steps": None}, GOOD, "--config.episodes or --config.steps"),
    "no field": ({}, {"question": "ba"}, "rows.jsonl:3.*no field 'prompt'"),
    "empty": ({}, {"prompt": ""}, "rows.jsonl:3.*empty"),
    "too long": ({}, {"prompt": "ba ko " * 20}, "rows.jsonl:3.*more than the 40"),
    "no room": ({"rollout.max_new_tokens": 48}, GOOD, "leaves no room for a prompt"),
    "top-p": ({"rollout.top_p": 0.9}, GOOD, "top_p=0.9.*whole distribution"),
    "top-k": ({"rollout.top_k": 5}, GOOD, "top_k=5.*whole distribution"),
    "minibatches": ({"ppo.minibatches": 3}, GOOD, "batch_size=16 is not a multiple of ppo.minibatches=3"),
    "micro-batch": ({"ppo.microbatch_size": 3}, GOOD, "8 episodes is not a multiple of ppo.microbatch_size=3"),
    "forward_rows": ({"rollout.forward_rows": 5}, GOOD, "rollout.forward_rows"),
    "callable": ({"reward_fn": "gptjax.nowhere:f"}, GOOD, "cannot be imported"),
    "float16": ({"precision.compute": "float16"}, GOOD, "float32 or bfloat16"),
    "reward_on": ({"reward_on": "words"}, GOOD, "text or tokens"),
    "cold": ({"rollout.temperature": 1e-40}, GOOD, "rollout.temperature=1e-40: give at least 0.01"),
    "hot": ({"rollout.temperature": float("inf")}, GOOD, "rollout.temperature=inf"),
    "horizon": ({"kl.target": 6.0, "kl.horizon": 3.2}, GOOD, "kl.horizon=3.2 with batch_size=16.*above 3.2 episodes"),
    "no horizon": ({"kl.horizon": float("nan")}, GOOD, "kl.horizon=nan"),
    "no coefficient": ({"kl.target": 6.0, "kl.coefficient": 0.0}, GOOD, "kl.target with kl.coefficient=0"),
    "not a coefficient": ({"kl.coefficient": float("nan")}, GOOD, "kl.coefficient=nan"),
    "not a target": ({"kl.target": float("nan")}, GOOD, "kl.target=nan"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_error(config, tmp_path, name):
    options, row, says = BAD[name]
    c = config(data__source=str(write(tmp_path / "rows.jsonl", [GOOD, GOOD, row])))
    for key, value in options.items():
        section, _, last = key.rpartition(".")
        place = c
        for part in section.split(".") if section else ():
            place = place[part]
        place[last] = value
    refused(c, tmp_path / "run", says)


def test_models_that_can_not_be(config, ruled, pretrained, tuned, reward_dir, tmp_path):
    c = ruled()
    c.policy = str(pretrained)
    refused(c, tmp_path / "run", "no padding token of its own", reward_fn=share)
    c.policy = str(reward_dir)
    refused(c, tmp_path / "run", "is a reward model", reward_fn=share)
    c = config()
    c.reward = str(tuned)
    refused(c, tmp_path / "run", "not a reward model")


@pytest.mark.parametrize("coefficient, horizon", [(1.0, 3.21), (1e-3, 100.0)])
def test_the_adaptive_coefficient_stays_positive(coefficient, horizon):
    """At every horizon that the config takes, whatever KL is measured; at 3.2 episodes of 16 would make it 0."""
    c = configs.build(stage.PPOConfig, {"batch_size": 16, "kl": {"target": 6.0, "horizon": horizon}})
    value = np.float32(coefficient)
    for kl in (-5.0, 0.0, 0.0, 1e-3, 0.0):
        after = np.float32(adaptive_kl_coefficient(value, kl, c.batch_size, c.kl.target, c.kl.horizon))
        assert 0 < after < value
        value = after


@pytest.mark.parametrize("shared_trunk", [False, True])
def test_a_reward_model_of_a_shorter_context(config, tmp_path, monkeypatch, shared_trunk):
    """The policy has room for 48 tokens, the reward model for 24: no text it scores may be longer."""
    monkeypatch.setattr(start, "load_reward_model", shortened(start.load_reward_model, 24))
    c = lambda **overrides: config(shared_trunk=shared_trunk, **overrides)
    reader = "reward model" if shared_trunk else "value network"
    refused(c(rollout__max_new_tokens=24), tmp_path / "run", f"no room for a prompt in the {reader}'s context of 24")
    refused(c(data__max_length=17), tmp_path / "run", "more than the shortest context, 24")
    rows = [GOOD, {"prompt": "ba ko " * 8}]
    source = str(write(tmp_path / "rows.jsonl", rows))
    refused(c(data__source=source), tmp_path / "run", "rows.jsonl:2: The prompt has 19 tokens, more than the 16")


def test_a_batch_that_does_not_divide_over_the_mesh(config, tmp_path, monkeypatch):
    for module in (sys.modules["gptjax.run"], sys.modules["gptjax.trained"]):
        monkeypatch.setattr(module, "make_mesh", make_mesh)
    refused(
        config(batch_size=12, ppo__minibatches=1), tmp_path / "run", "12 is not divisible over.*8 devices: use 8 or 16"
    )


def test_forward_passes_that_do_not_divide_over_the_mesh(ruled, tmp_path, monkeypatch):
    for module in (sys.modules["gptjax.run"], sys.modules["gptjax.trained"]):
        monkeypatch.setattr(module, "make_mesh", make_mesh)
    refused(ruled(rollout__forward_rows=4), tmp_path / "run", "forward_rows=4 is not divisible over the 8 devices",
            reward_fn=share)  # fmt: skip


@pytest.mark.parametrize(
    "per_episode, microbatch, ways, shape",
    [
        (8.0, None, 1, (2, 8, 8)),  # InstructGPT's 8 for each of a minibatch's 8 episodes
        (0.5, None, 1, (2, 1, 4)),
        (0.1, None, 8, (2, 1, 8)),  # rounded up to whole devices
        (1.25, 4, 4, (2, 3, 4)),  # and to whole micro-batches
    ],
)
def test_rows_of_pretraining_text(per_episode, microbatch, ways, shape):
    mesh = make_mesh(MeshConfig(data=ways), jax.devices()[:ways])
    assert batch_shape(PtxConfig(per_episode=per_episode), 2, 8, microbatch, mesh) == shape


@pytest.mark.parametrize("isolated", [False, True])
def test_the_text_of_ptx_does_not_depend_on_the_micro_batches(isolated):
    """3 sequences for each of two minibatches, one after the other, and rows of padding beside them, which have
    segments and positions as any other row."""

    class Examples:
        def read(self, index):
            return np.repeat(np.asarray(index)[:, None], 5, axis=1)

    c, mesh = PtxConfig(per_episode=0.75), make_mesh(MeshConfig(), jax.devices()[:1])
    source = Text(Examples(), types.SimpleNamespace(eot_id=11 if isolated else None), 4)
    for microbatch in (None, 4, 2, 1):
        shape = batch_shape(c, 2, 4, microbatch, mesh)
        batch = jax.tree.map(np.asarray, source.batch(10, shape, sequences(c, 4), mesh))
        tokens = batch.pop("tokens")
        assert tokens.shape == (*shape, 5)
        assert [row[row[..., 0] >= 0][:, 0].tolist() for row in tokens] == [[10, 11, 12], [13, 14, 15]]
        assert set(batch) == ({"segment_ids", "positions"} if isolated else set())
        for found in batch.values():
            assert found.shape == (*shape, 4) and found.min() >= 0
        if isolated:
            each = batch["segment_ids"][tokens[..., 0] >= 0][:, -1]
            assert each.tolist() == [1, 4, 1, 1, 1, 1]  # 11 ends a document, wherever its row is


def test_text_of_its_own_is_gone_on_with_as_it_was(tmp_path, tuned):
    """A source that changed after the run began changes nothing; another run takes it as it is now. Two runs may share
    a cache, and without one a remote workdir is refused with the key to give."""
    (tmp_path / "more.txt").write_text("ba la da " * 400)

    def read(name, known):
        workdir = tmp_path / name
        shutil.copytree(tuned / "tokenizer", workdir / "tokenizer", dirs_exist_ok=True)
        record = start_record(workdir, known)
        source, cache = str(tmp_path / "more.txt"), str(tmp_path / "cache")
        text = load_text(source, tuned, workdir, cache, "ptx.cache", 0, record, known)
        if not known:
            write_record(workdir, record, text)
        return text.examples(16, 0, record["shuffle"]).read(np.arange(4))

    before = read("a", False)
    (tmp_path / "more.txt").write_text("da ba ba " * 400)
    assert read("b", False).tobytes() != before.tobytes()
    assert read("a", True).tobytes() == before.tobytes()
    shutil.rmtree(tmp_path / "cache" / read_record(tmp_path / "a")["text"]["parts"][""]["directory"])
    with pytest.raises(InputError, match="are not those that .*a was trained on"):
        read("a", True)  # what is made anew is another text now
    with pytest.raises(InputError, match="memory-mapped and cannot be in memory://run.*--config.ptx.cache=DIR"):
        load_text(str(tmp_path / "more.txt"), tuned, "memory://run", None, "ptx.cache", 0, {}, False)


def test_ptx_without_a_text_leaves_no_workdir(config, tmp_path):
    c = config(ppo__ptx_coefficient=1.0, ptx__source=str(tmp_path / "nothing.txt"))
    refused(c, tmp_path / "run", "ppo.ptx_coefficient > 0 needs pre-training text.*nothing.txt")


def test_a_reward_model_of_another_tokenizer(config, reward_dir, tmp_path):
    other = shutil.copytree(reward_dir, tmp_path / "reward")
    shutil.rmtree(other / "tokenizer")
    text = "quick brown foxes jump over lazy dogs 0123 " * 20
    chat_tokenizer(train_bpe([text], 290)).save(other / "tokenizer")
    c = config()
    c.reward = str(other)
    refused(c, tmp_path / "run", "another tokenizer")

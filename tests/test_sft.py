"""Supervised fine-tuning end to end: what is learned from and what not, packing, mixing, selection, resuming."""

import dataclasses
import functools
import json
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from alignment_runs import (
    CONTEXT,
    demonstrations,
    on_one_device,
    sft_config,
    template,
    write,
)
from numerics import approx, assert_close, model_terms
from runs import assert_same_run, lines, until_sigterm

from gptjax import sample
from gptjax import sft as stage
from gptjax.data import lm
from gptjax.data.chat import Template, chat_tokenizer
from gptjax.data.corpus import pretraining_text
from gptjax.data.demonstrations import DemonstrationConfig, PackedRows, load_demonstrations
from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import InputError
from gptjax.model import gpt, heads
from gptjax.model.spec import GPTConfig
from gptjax.objectives.sft import sft_loss, weigher
from gptjax.parallel.sharding import batch_sharding
from gptjax.run_config import read_config
from gptjax.sft import sft
from gptjax.trained import load_model
from gptjax.training.checkpoint import Checkpointer
from gptjax.training.stage import Evaluation
from gptjax.training.supervised import device_batches

pytestmark = pytest.mark.usefixtures("one_device")

TERMS = model_terms(GPTConfig(300, n_layer=2, n_head=4, d_model=32, context_length=CONTEXT), rows=24)


@pytest.fixture(autouse=True)
def programs_of_what_is_patched():
    """In place of conftest's: nothing that is patched here is traced, so all runs share their programs."""


@pytest.fixture(scope="module")
def start(pretrained):
    """(params, config, tokenizer, template) an SFT run on `pretrained` begins with."""
    with on_one_device():
        base = load_model(pretrained)
    tokenizer = chat_tokenizer(base.tokenizer)
    config = dataclasses.replace(base.config, vocab_size=tokenizer.vocab_size)
    return heads.grow_vocabulary(base.params, config.vocab_size), config, tokenizer, Template(tokenizer, "chat")


@pytest.fixture(scope="module")
def some(alignment, start):
    """The training demonstrations of every run here that does not say otherwise."""
    c = DemonstrationConfig(source=str(alignment["demonstrations"]), validation="0.15")
    return load_demonstrations(c, start[3], CONTEXT, 0).train


class Stop(Exception):
    pass


def state_and_batches(config, workdir, monkeypatch, steps=0):
    """(state before the first step, the first batches) of a run that is not run: what the loop was given."""
    seen = {}

    def capture(c, program, batches, schedule, mesh, *, init, **_):
        plan, by_row = ((i, 1) for i in range(steps)), batch_sharding(mesh, 2)
        with jax.set_mesh(mesh):
            seen["params"] = jax.device_get(init().params)
        seen["batches"] = [b for *_, b in device_batches(batches, plan, c.microbatch_rows, by_row, 0, steps)]
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(stage, "supervised", capture)
        with pytest.raises(Stop):
            sft(config, str(workdir))
    return seen["params"], [jax.device_get(jax.tree.map(lambda a: a[0], b)) for b in seen["batches"]]


def by_hand(params, config, demos, lm_weight=0.0, loss_on="response"):
    """Loss (a mean over all tokens of the batch together) and gradient of demonstrations by the plainest route: one
    text a row, no segments, the mean of -log p of the tokens to learn + lm_weight x that of all."""
    tokens = np.zeros((24, CONTEXT + 1), np.int32)  # what stands behind a text changes nothing before it
    task, whole = np.zeros((2, 24, CONTEXT), np.float32)
    for row, d in enumerate(demos):
        n = len(d.ids)
        tokens[row, :n], task[row, : n - 1], whole[row, : n - 1] = d.ids, d.response[1:], 1
    return _by_hand(params, config, tokens, task if loss_on == "response" else whole, whole, lm_weight)


@functools.partial(jax.jit, static_argnames="config")
def _by_hand(params, config, tokens, task, whole, lm_weight):
    def loss(params):
        x = gpt.hidden(params, config, tokens[:, :-1], dtype=jnp.float32)
        log_probs = jax.nn.log_softmax(gpt.logits(params, config, x))
        nats = -jnp.take_along_axis(log_probs, tokens[:, 1:, None], 2)[..., 0]
        return (nats * task).sum() / task.sum() + lm_weight * (nats * whole).sum() / whole.sum()

    return jax.value_and_grad(loss)(params)


def packed_batch(demos, packing, pad_id):
    rows = PackedRows(demos, CONTEXT, packing, pad_id)
    arrays = rows.arrays(np.arange(len(rows)))
    return {**{k: arrays[k] for k in ("tokens", "segment_ids", "positions")}, "weights": arrays["response"]}


# --- what is learned from ---------------------------------------------------------------------------------


@functools.cache
def mean_loss(config):
    loss = sft_loss(config, jnp.float32, 16)

    def mean(params, batch):
        total, count = loss(params, batch, None)
        return total / count

    return jax.jit(jax.value_and_grad(mean))


def test_loss_and_gradient_are_those_of_the_responses_alone(start, some):
    """Packed, against one text a row: so the prompt's tokens give exactly nothing, nor do a row's other texts, and the
    state before a token is what foretells it."""
    params, config, _, t = start
    demos = some[:12]
    batch = packed_batch(demos, True, t.pad_id)
    assert len(batch["tokens"]) < len(demos) / 2
    expected, expected_gradient = by_hand(params, config, demos)
    assert_close(mean_loss(config)(params, batch), (expected, expected_gradient), terms=TERMS, scale=1e-3)
    whole, _ = by_hand(params, config, demos, loss_on="all")
    assert abs(whole - expected) > 1e-2  # there was something to get wrong


def test_one_example_has_no_gradient_on_another(start, some):
    """Untied, a row of wte gets gradient only where its token was read: with the loss on the first example alone, one
    that only the others have gets exactly none; with the loss on all, some."""
    params, config, tokenizer, t = start
    config = dataclasses.replace(config, tied_head=False)
    params = {**params, "lm_head": params["wte"]}
    batch = packed_batch(some[:6], True, t.pad_id)
    row = np.flatnonzero(batch["segment_ids"].max(1) > 1)[0]
    batch = {k: v[row : row + 1] for k, v in batch.items()}
    ids, segments = batch["tokens"][0, :-1], batch["segment_ids"][0]
    for mine in range(1, segments.max() + 1):
        others = sorted(set(ids[(segments > 0) & (segments != mine)]) - set(ids[segments == mine]))
        assert others
        alone = batch | {"weights": batch["weights"] * (segments == mine)}
        gradient = mean_loss(config)(params, alone)[1]["wte"]
        assert np.abs(gradient[np.array(others)]).max() == 0.0
        assert np.abs(gradient[ids[segments == mine]]).max() > 0
    assert np.abs(mean_loss(config)(params, batch)[1]["wte"][np.array(others)]).max() > 0


@pytest.mark.parametrize("options", [
    pytest.param({"data__loss_on": "all"}, marks=pytest.mark.slow),
    {"lm_weight": 0.5, "data__packing": False, "microbatch_size": 1},
])  # fmt: skip
def test_the_first_step_by_hand(pretrained, alignment, start, some, tmp_path, monkeypatch, options):
    """metrics.jsonl's loss, count and gradient norm of a whole run's first step; 4 rows of ragged demonstrations."""
    params, config, _, t = start
    monkeypatch.setattr(stage, "response_loss", lambda *_: lambda state: Evaluation({}))
    settings = {"batch_size": 4, "steps": 1, "samples__count": 0, **options}
    assert sft(sft_config(pretrained, alignment["demonstrations"], **settings), str(tmp_path / "run")).finished
    rows = PackedRows(some, CONTEXT, options.get("data__packing", True), t.pad_id)
    index = lm.shuffled(np.arange(4), len(rows), 0)
    demos = [some[i] for row in index for i in rows._rows[row]]
    assert len({int(d.response.sum()) for d in demos}) > 1
    kind = options.get("data__loss_on", "response")
    value, gradient = by_hand(params, config, demos, options.get("lm_weight", 0.0), kind)
    line = lines(tmp_path / "run")[0]
    assert line["batch_tokens"] == sum(int(d.response.sum()) if kind == "response" else len(d.ids) - 1 for d in demos)
    assert line["loss"] == approx(float(value), terms=TERMS)
    norm = float(jnp.sqrt(sum((g**2).sum() for g in jax.tree.leaves(gradient))))
    assert line["grad_norm"] == approx(norm, terms=TERMS)


def test_weights_of_the_auxiliary_term_are_of_the_whole_batch():
    """lambda times the mean over all tokens of the batch, not of a micro-batch: ragged micro-batches by hand."""
    task = np.zeros((2, 1, 6), np.float32)
    task[0, 0, :1], task[1, 0, :4] = 1, 1
    whole = np.zeros_like(task)
    whole[0, 0, :6], whole[1, 0, :5] = 1, 1
    loss = np.random.default_rng(0).random(task.shape)
    batch = weigher(0.5)({"weights": jnp.asarray(task), "lm_weights": jnp.asarray(whole)})
    got = float((batch["weights"] * loss).sum() / batch["task"].sum())
    assert got == approx((loss * task).sum() / 5 + 0.5 * (loss * whole).sum() / 11, terms=24)
    assert weigher(0.0)(batch) is batch


# --- the vocabulary ---------------------------------------------------------------------------------------


def test_new_tokens_leave_the_old_ones_as_they_were(pretrained, alignment, tmp_path, monkeypatch):
    params, _ = state_and_batches(sft_config(pretrained, alignment["demonstrations"]), tmp_path / "run", monkeypatch)
    base = load_model(pretrained)
    tokenizer = Tokenizer.load(tmp_path / "run" / "tokenizer")
    old, new = base.config.vocab_size, tokenizer.vocab_size
    assert new == old + 4 and params["wte"].shape == (new, 32)  # PAD and three roles: end-of-text was there
    assert json.loads((tmp_path / "run" / "config.json").read_text())["model"]["vocab_size"] == new
    before = jax.device_get(base.params)
    assert params["wte"][:old].tobytes() == before["wte"].tobytes()
    mean = np.tile(before["wte"].mean(0, dtype=np.float64), (4, 1))
    assert_close(params["wte"][old:], mean, terms=old)
    assert len({tokenizer.pad_id, tokenizer.eot_id, *map(tokenizer.special_id, ("<|user|>", "<|assistant|>"))}) == 4
    for path, leaf in jax.tree_util.tree_leaves_with_path({k: v for k, v in params.items() if k != "wte"}):
        there = before
        for key in path:
            there = there[key.key]
        assert leaf.tobytes() == there.tobytes(), path
    for text in ("ba ko zu", "unheard-of"):
        assert tokenizer.encode(text) == base.tokenizer.encode(text)


# --- the mix ----------------------------------------------------------------------------------------------


def test_mixed_rows_are_of_the_pre_training_text(pretrained, alignment, tmp_path, monkeypatch):
    c = sft_config(pretrained, alignment["demonstrations"], mix__fraction=0.3, batch_size=8, steps=5)
    _, batches = state_and_batches(c, tmp_path / "run", monkeypatch, steps=5)
    shards = pretraining_text(pretrained).parts[0].train
    whole = shards.read(np.array([0]), len(shards))[0].astype(np.int32)
    starts = {}
    for i in range(len(whole) - CONTEXT):
        starts[whole[i : i + CONTEXT + 1].tobytes()] = i
    found, counts = [], []
    for batch in batches:
        rows = batch["tokens"].reshape(-1, CONTEXT + 1)
        of_text = [starts[r.tobytes()] for r in rows.astype(np.int32) if r.astype(np.int32).tobytes() in starts]
        counts.append(len(of_text))
        found += of_text
        weights = batch["weights"].reshape(len(rows), -1)[-len(of_text) :]
        assert len(of_text) == 0 or (weights == 1).all()
    assert np.cumsum(counts).tolist() == [int((t + 1) * 8 * 0.3) for t in range(5)]  # 2, 4, 7, 9, 12
    assert len(set(found)) == len(found)


def test_a_mix_of_another_text(pretrained, alignment, tmp_path, monkeypatch):
    other = tmp_path / "other.txt"
    other.write_text("xyz yzx qqq " * 400)
    c = sft_config(pretrained, alignment["demonstrations"], mix__fraction=0.5, mix__source=str(other), steps=1)
    _, [batch] = state_and_batches(c, tmp_path / "run", monkeypatch, steps=1)
    decoded = [template(tmp_path / "run").decode(r) for r in batch["tokens"].reshape(8, -1)]
    assert sum("qqq" in d for d in decoded) == 4


@pytest.mark.parametrize(
    "loss_on, mix, counted", [("response", 0.0, False), ("response", 0.3, False), ("all", 0.3, True)]
)
def test_flops_are_counted_only_where_the_loss_counts_every_token(
    pretrained, alignment, tmp_path, monkeypatch, loss_on, mix, counted
):
    """With a mix too: the prompts of the other rows are computed and not counted, so an MFU would be too low."""
    seen = {}

    def capture(*_, flops_per_token, **__):
        seen["flops"] = flops_per_token
        raise Stop

    monkeypatch.setattr(stage, "supervised", capture)
    with pytest.raises(Stop):
        sft(sft_config(pretrained, alignment["demonstrations"], data__loss_on=loss_on, mix__fraction=mix, steps=1),
            str(tmp_path / "run"))  # fmt: skip
    assert (seen["flops"] is not None) == counted


@pytest.mark.parametrize("isolated", [False, True])
def test_documents_of_the_mix_are_isolated_where_pre_training_isolated_them(
    pretrained, alignment, tmp_path, monkeypatch, isolated
):
    base = shutil.copytree(pretrained, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config["data"]["isolate_documents"] = isolated
    (base / "config.json").write_text(json.dumps(config))
    other = write(tmp_path / "other.jsonl", [{"text": "ba ko " * (1 + i % 4)} for i in range(200)])
    c = sft_config(base, alignment["demonstrations"], mix__fraction=0.5, mix__source=str(other), steps=1)
    _, [batch] = state_and_batches(c, tmp_path / "run", monkeypatch, steps=1)
    tokens, segments = (batch[k].reshape(8, -1)[4:] for k in ("tokens", "segment_ids"))
    starts = tokens[:, 1:-1] == Tokenizer.load(tmp_path / "run" / "tokenizer").eot_id
    assert starts.any() and ((np.diff(segments) != 0) == (starts & isolated)).all()


# --- stopped and gone on with -----------------------------------------------------------------------------


def test_a_stopped_run_ends_where_an_uninterrupted_one_does(pretrained, alignment, tmp_path, capsys):
    """With all that it draws at random. Its base is gone by then, other demonstrations are refused, and it is made
    longer."""
    base = shutil.copytree(pretrained, tmp_path / "base")
    source, parts, straight = tmp_path / "rows.jsonl", tmp_path / "parts", tmp_path / "straight"
    source.write_text(rows := alignment["demonstrations"].read_text())

    def config(steps):
        return sft_config(
            base, source, steps=steps, model__dropout=0.2, mix__fraction=0.3, mix__source=str(alignment["text"]),
            lm_weight=0.5, samples__count=2, eval__every=2, checkpoint__every=2, schedule__kind="constant",
        )  # fmt: skip

    assert sft(config(6), str(straight)).finished
    assert not until_sigterm(sft, config(4), parts, stop=3).finished
    assert Checkpointer(parts).steps()[-1] == 3
    weights = read_config(parts)["origin"]["init_from_weights"]
    assert len(weights) == 64
    shutil.rmtree(base)
    with pytest.raises(InputError, match=f"{base} is not a workdir: there is no such folder"):
        sft(config(4), str(tmp_path / "new"))
    write(source, demonstrations(20, seed=9))
    with pytest.raises(InputError, match="has changed since the run began"):
        sft(config(4), str(parts))
    source.write_text(rows)
    capsys.readouterr()
    assert sft(config(6), str(parts)).finished
    assert "continues from its own checkpoint" in capsys.readouterr().out
    assert read_config(parts)["origin"]["init_from_weights"] == weights
    assert_same_run(parts, straight, 6)
    shown = lines(parts, "samples")
    assert shown == lines(straight, "samples") and {s["step"] for s in shown} == {0, 6}


# --- which checkpoint later stages use --------------------------------------------------------------------


def test_the_selected_checkpoint_is_the_one_that_is_loaded(pretrained, alignment, tmp_path, monkeypatch):
    """Planted validation losses: the lowest at step 2, whose checkpoint newer ones would long have displaced."""

    def planted(*args):
        seen = iter([9.0, 1.0, 2.0, 3.0])
        return lambda state: Evaluation({"loss": next(seen), "bits_per_byte": 0.0, "tokens": 1})

    monkeypatch.setattr(stage, "response_loss", planted)
    c = sft_config(
        pretrained, alignment["demonstrations"], steps=6, selection="loss", eval__every=2, checkpoint__every=2,
        checkpoint__keep_last=1, samples__count=0,
    )  # fmt: skip
    assert sft(c, str(tmp_path / "run")).finished
    best = load_model(tmp_path / "run")
    config = tmp_path / "run" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"selection": "last"}))
    last = load_model(tmp_path / "run")
    assert (best.step, last.step) == (2, 6)
    assert not np.array_equal(best.params["wte"], last.params["wte"])


@pytest.mark.slow
def test_selection_by_the_reward_model(pretrained, alignment, reward_dir, tmp_path, capsys):
    """The step whose responses to validation prompts score highest is the one later stages open; prompts leave room for
    less than samples.max_new_tokens, which does not stop the run."""
    c = sft_config(
        pretrained, alignment["demonstrations"], steps=9, selection="reward", reward=str(reward_dir), eval__every=3,
        checkpoint__every=3, optimizer__learning_rate=1e-2, samples__max_new_tokens=CONTEXT,
    )  # fmt: skip
    assert sft(c, str(tmp_path / "run")).finished
    rewards = {e["step"]: e["reward"] for e in lines(tmp_path / "run", "evaluations")}
    assert set(rewards) == {0, 3, 6, 9} and len(set(rewards.values())) == 4
    del rewards[0]  # there is no checkpoint of step 0
    assert load_model(tmp_path / "run").step == max(rewards, key=rewards.get)


def test_a_reward_model_too_short_for_the_samples(pretrained, alignment, reward_dir, tmp_path, monkeypatch):
    """Told before the first step, and not by the first evaluation."""
    real = stage.load_reward_model

    def short(*args, **kwargs):
        model = real(*args, **kwargs)
        return dataclasses.replace(model, config=dataclasses.replace(model.config, context_length=24))

    monkeypatch.setattr(stage, "load_reward_model", short)
    c = sft_config(
        pretrained, alignment["demonstrations"], steps=1, selection="reward", reward=str(reward_dir),
        samples__max_new_tokens=24,
    )  # fmt: skip
    with pytest.raises(InputError, match="reward model's context of 24. .*lower --config.samples.max_new_tokens"):
        sft(c, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


# --- what it comes to -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_handful_of_demonstrations_is_learnt_by_heart(pretrained, tmp_path, monkeypatch, capsys):
    """And gptjax.sample puts a prompt in the template and prints the response alone, up to end-of-text."""
    rows = demonstrations(8, seed=5, longest=4)
    c = sft_config(
        pretrained, write(tmp_path / "rows.jsonl", rows), steps=150, batch_size=2, samples__count=0,
        data__validation=str(write(tmp_path / "held_out.jsonl", rows[:2])), optimizer__learning_rate=1e-2,
    )  # fmt: skip
    assert sft(c, str(tmp_path / "run")).finished
    model, t = load_model(tmp_path / "run"), template(tmp_path / "run")
    assert t.eos_id in model.tokenizer.stop_ids
    capsys.readouterr()
    flags = {"workdir": str(tmp_path / "run"), "prompt": [r["prompt"] for r in rows], "n": 1, "max_new_tokens": 12,
             "step": None, "temperature": 0.0, "top_k": 0, "top_p": 1.0, "seed": 0, "raw": False,
             "speed": False}  # fmt: skip
    monkeypatch.setattr(sample, "FLAGS", types.SimpleNamespace(**flags), raising=False)
    sample.main(None)
    assert capsys.readouterr().out == "".join(f"--- {i} ---\n{r['response']}\n" for i, r in enumerate(rows))


def test_what_a_run_leaves(tuned, capsys):
    run = json.loads((tuned / "config.json").read_text())
    assert run["stage"] == "sft" and run["data"]["template"] == "chat" and run["model"]["context_length"] == CONTEXT
    metrics, samples = lines(tuned), lines(tuned, "samples")
    assert [m["step"] for m in metrics] == list(range(1, 61)) and metrics[-1]["loss"] < metrics[0]["loss"] - 0.5
    assert [s["step"] for s in samples] == [0, 0, 60, 60]
    assert all({"prompt", "text", "demonstration"} <= s.keys() and "<|" not in s["text"] + s["prompt"] for s in samples)
    assert [e["step"] for e in lines(tuned, "evaluations")] == [0, 60]
    page = (tuned / "report.html").read_text()
    assert page.startswith("<!doctype html>") and "sft" in page and page.count("<pre><b>") == 4
    assert samples[-1]["prompt"] in page


def test_validation_is_of_the_held_out_prompts(tuned, alignment, start):
    c = DemonstrationConfig(source=str(alignment["demonstrations"]), validation="0.15")
    held_out = load_demonstrations(c, start[3], CONTEXT, 0).validation
    model = load_model(tuned)
    expected, _ = by_hand(jax.device_get(model.params), model.config, held_out)
    assert lines(tuned, "evaluations")[-1]["loss"] == approx(float(expected), terms=TERMS)


# --- bad input --------------------------------------------------------------------------------------------

GOOD = {"prompt": "ba", "response": "ko"}
BAD = {
    "no field": ({"prompt": "ba"}, {}, "rows.jsonl:3.*no field 'response'"),
    "empty response": ({"prompt": "ba", "response": ""}, {}, "rows.jsonl:3.*response is empty"),
    "too long": ({"prompt": "ba " * 60, "response": "ko"}, {}, "rows.jsonl:3.*more than 48"),
    "no source": (GOOD, {"data__source": None}, "--config.data.source"),
    "no model": (GOOD, {"init_from": None}, "--config.init_from"),
    "no length": (GOOD, {"steps": None}, "--config.steps or --config.epochs"),
    "a share": (GOOD, {"mix__fraction": 1.0}, "mix.fraction=1.0"),
    "micro-batch": (GOOD, {"microbatch_size": 3}, "not a multiple of microbatch_size=3"),
    "selection": (GOOD, {"selection": "reward"}, "--config.reward"),
    "max_length": (GOOD, {"data__max_length": 49}, "more than the 48 tokens"),
}
CLAIMED = {"no length"}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_error(pretrained, tmp_path, name):
    row, options, says = BAD[name]
    source = write(tmp_path / "rows.jsonl", [GOOD, {"prompt": "mi", "response": "ko"}, row])
    c = sft_config(pretrained, source, data__validation="0.4")
    for k, v in options.items():
        c.update_from_flattened_dict({k.replace("__", "."): v}) if v is not None else _unset(c, k)
    with pytest.raises(InputError, match=f"(?s){says}") as caught:
        sft(c, str(tmp_path / "run"))
    assert "\n" not in str(caught.value)
    if name not in CLAIMED:
        assert not (tmp_path / "run").exists()


def _unset(c, name):
    *parts, last = name.split("__")
    for part in parts:
        c = c[part]
    c[last] = None


def test_a_forgotten_length_leaves_no_workdir(pretrained, tmp_path):
    source = write(tmp_path / "rows.jsonl", demonstrations(6))
    with pytest.raises(InputError, match="--config.steps"):
        sft(sft_config(pretrained, source, steps=None), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_reward_model_writes_no_text_to_start_from(reward_dir, alignment, tmp_path):
    with pytest.raises(InputError, match="is a reward model"):
        sft(sft_config(reward_dir, alignment["demonstrations"]), str(tmp_path / "run"))

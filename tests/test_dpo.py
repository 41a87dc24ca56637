"""DPO: the objective beside its closed form and the reward-model loss, and the stage end to end."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from alignment_runs import CONTEXT, comparisons, overridden, template, write
from numerics import approx, assert_close, model_terms
from runs import assert_same_run, lines, until_sigterm

from gptjax import dpo as stage
from gptjax import run, trained
from gptjax.aot import programs
from gptjax.config import build, config_dict
from gptjax.cost import topology
from gptjax.data.comparisons import ComparisonConfig, load_comparisons
from gptjax.dpo import DPOConfig, dpo
from gptjax.errors import InputError
from gptjax.model import gpt
from gptjax.model.spec import GPTConfig
from gptjax.objectives.dpo import dpo_objective
from gptjax.objectives.dpo import response_log_probs as response_log_probs_
from gptjax.objectives.preference import dpo_loss
from gptjax.parallel.mesh import make_mesh
from gptjax.trained import load_model
from gptjax.training.checkpoint import Checkpointer

pytestmark = pytest.mark.usefixtures("one_device")

MODEL = GPTConfig(31, n_layer=2, n_head=2, d_model=16, context_length=16, attention="reference")
TERMS = model_terms(MODEL)


def dpo_config(init_from, source, **overrides):
    c = config_dict(DPOConfig)
    c.init_from, c.data.source, c.data.validation = str(init_from), str(source), "0.25"
    c.steps, c.batch_size, c.optimizer.learning_rate = 12, 8, 1e-3
    return overridden(c, overrides)


# --- the objective ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def batch():
    """Three prompts of two ragged completions; in row 1 the second wins; row 2 is padding."""
    rng = np.random.default_rng(0)
    return {
        "tokens": rng.integers(0, 31, (3, 2, 12), np.int32),
        "starts": np.array([[3, 3], [5, 5], [0, 0]], np.int32),
        "lengths": np.array([[7, 12], [9, 6], [1, 1]], np.int32),
        "ranks": np.array([[0, 1], [2, 1], [0, 0]], np.float32),
        "valid": np.array([[1, 1], [1, 1], [0, 0]], np.float32),
        "reference": rng.normal(-8, 1, (3, 2)).astype(np.float32),
    }


@pytest.fixture(scope="module")
def params():
    return jax.jit(gpt.init, static_argnums=0)(MODEL, jax.random.key(0))


def flat(batch):
    """tokens [6, 12], starts [6], lengths [6] of the six texts."""
    return tuple(batch[k].reshape(6, *batch[k].shape[2:]) for k in ("tokens", "starts", "lengths"))


def plain_log_probs(params, tokens, starts, lengths):
    """Of each text by the formula, without chunks; what stands behind its end is the future, which nothing sees."""
    log_p = jax.nn.log_softmax(gpt.logits(params, MODEL, gpt.hidden(params, MODEL, tokens[:, :-1])))
    of_token = jnp.take_along_axis(log_p, tokens[:, 1:, None], 2)[..., 0]
    at = np.arange(1, tokens.shape[1])
    return jnp.where((at >= starts[:, None]) & (at < lengths[:, None]), of_token, 0).sum(1)


response_log_probs = jax.jit(response_log_probs_, static_argnums=1, static_argnames=("dtype", "chunk"))


def test_the_log_probability_of_a_response_counts_its_tokens_alone(params, batch):
    found = response_log_probs(params, MODEL, *flat(batch), dtype=jnp.float32, chunk=5)
    for value, expected in zip(found, jax.jit(plain_log_probs)(params, *flat(batch)), strict=True):
        assert float(value) == approx(float(expected), terms=TERMS)


def test_it_is_rafailovs_loss_in_value_and_gradient(params, batch):
    """eq. 7 on the four log-probabilities of each pair, each worked out by itself."""

    def written_out(params):
        log_p, rows, wins = plain_log_probs(params, *flat(batch)).reshape(3, 2), np.array([0, 1]), np.array([0, 1])
        pairs = [of[rows, i] for of in (log_p, batch["reference"]) for i in (wins, 1 - wins)]
        return dpo_loss(*pairs, jnp.ones(2), 0.3)[0]

    objective = dpo_objective(MODEL, 0.3, jnp.float32, 5)

    def total(p):
        sums = objective(p, batch, None)
        return sums.total, sums

    d_total, sums = jax.jit(jax.grad(total, has_aux=True))(params)
    assert float(sums.count) == 2 and float(sums.extra["pairs"]) == 2
    value, gradient = jax.jit(jax.value_and_grad(written_out))(params)
    assert float(sums.total) == approx(float(value), terms=TERMS)
    assert_close(d_total, gradient, terms=TERMS)


def test_before_the_first_step_the_loss_is_log_2(params, batch):
    """Policy and reference are one: every implicit reward is 0."""
    same = response_log_probs(params, MODEL, *flat(batch), dtype=jnp.float32, chunk=5).reshape(3, 2)
    objective = dpo_objective(MODEL, 0.1, jnp.float32, 5)
    sums = jax.jit(lambda p, b: objective(p, b, None))(params, {**batch, "reference": same})
    assert float(sums.total / sums.count) == pytest.approx(np.log(2), rel=1e-6)
    assert float(sums.extra["margin"]) == 0


def test_the_optimum_on_enumerated_preferences_is_the_closed_form():
    """All pairs of six responses, weighted by Bradley-Terry's probabilities under a reward r: of all policies the loss
    is lowest at ref(y) exp(r(y) / beta) / Z (Rafailov et al. eq. 4), and descent from the reference comes there."""
    rng, beta = np.random.default_rng(0), 0.5
    reward = rng.normal(0, 1, 6)
    log_ref = jax.nn.log_softmax(jnp.asarray(rng.normal(0, 1, 6), jnp.float32))
    optimum = jax.nn.log_softmax(log_ref + reward / beta)
    first, second = np.nonzero(~np.eye(6, dtype=bool))
    weights = jnp.asarray(1 / (1 + np.exp(reward[second] - reward[first])), jnp.float32)

    def loss(logits):
        log_pi = jax.nn.log_softmax(logits)
        total, count, _ = dpo_loss(log_pi[first], log_pi[second], log_ref[first], log_ref[second], weights, beta)
        return total / count

    assert np.abs(jax.grad(loss)(optimum)).max() < 1e-6 < np.abs(jax.grad(loss)(log_ref)).max()
    logits = log_ref
    step = jax.jit(lambda x: x - 20 * jax.grad(loss)(x))
    for _ in range(600):
        logits = step(logits)
    np.testing.assert_allclose(jax.nn.softmax(logits), jnp.exp(optimum), atol=1e-4)


LONG = {"steps": 60, "eval__every": 20, "checkpoint__every": 20}

# --- the stage --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def straight(tuned, alignment, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("dpo") / "run"
    assert dpo(dpo_config(tuned, alignment["comparisons"], **LONG), str(workdir)).finished
    return workdir


def test_it_learns_the_preference(straight, tuned):
    """Completions with the liked word win: the policy comes to rank them first (of 65 pairs, .7 is 3 sigma)."""
    first, *_, last = lines(straight, "evaluations")
    assert first["loss"] == pytest.approx(np.log(2), rel=1e-5) and first["margin"] == pytest.approx(0, abs=1e-4)
    assert last["loss"] < first["loss"] and last["accuracy"] > 0.7
    model = load_model(straight)
    assert model.template == "chat" and model.step == 60
    assert json.loads((straight / "config.json").read_text())["kind"] == "lm"


def test_the_reference_is_the_sft_model(straight, tuned, alignment):
    """reference.npz has its log-probabilities, each text by itself."""
    loaded = load_comparisons(
        ComparisonConfig(source=str(alignment["comparisons"]), validation="0.25"), template(straight), CONTEXT, 0
    )
    saved, model = np.load(straight / "reference.npz"), load_model(tuned)
    assert saved["train"].shape == (len(loaded.train), loaded.k)

    @jax.jit
    def log_prob(params, text, start, length):  # of one text on its own, whatever stands after it
        log_p = jax.nn.log_softmax(gpt.logits(params, model.config, gpt.hidden(params, model.config, text[None])))[0]
        at = jnp.arange(1, CONTEXT)
        of_token = log_p[at - 1, text[1:]]
        return jnp.where((at >= start) & (at < length), of_token, 0).sum()

    for split, rows in (("train", loaded.train), ("validation", loaded.validation)):
        for row, e in list(zip(saved[split], rows, strict=True))[:2]:
            for value, completion in zip(row, e.completions, strict=False):
                text = np.zeros(CONTEXT, np.int32)
                length = len(e.prompt) + len(completion)
                text[:length] = [*e.prompt, *completion]
                expected = log_prob(model.params, text, len(e.prompt), length)
                assert value == approx(float(expected), terms=model_terms(model.config))


def test_killed_and_resumed_it_is_the_same_run(straight, tuned, alignment, tmp_path):
    """Bit for bit, and without the SFT model: reference.npz has what was needed of it."""
    base = shutil.copytree(tuned, tmp_path / "sft")
    c = dpo_config(base, alignment["comparisons"], **LONG)
    assert not until_sigterm(dpo, c, tmp_path / "parts", stop=27).finished
    assert Checkpointer(tmp_path / "parts").steps()[-1] == 27
    shutil.rmtree(base)
    result = dpo(c, str(tmp_path / "parts"))
    assert result.finished and result.steps == 60 and result.best["step"] > 0
    assert_same_run(tmp_path / "parts", straight, 60)


@pytest.mark.slow
def test_higher_beta_stays_nearer_the_reference(straight, tuned, alignment, tmp_path):
    """straight's beta is 0.1."""
    assert dpo(dpo_config(tuned, alignment["comparisons"], beta=10.0, **LONG), str(tmp_path / "run")).finished
    params, start = load_model(tmp_path / "run").params, load_model(tuned).params
    assert jax.tree.structure(params) == jax.tree.structure(start)
    near, far = (lines(w, "evaluations")[-1]["margin"] / b for w, b in ((tmp_path / "run", 10.0), (straight, 0.1)))
    assert 0 < near < far


@pytest.mark.parametrize(
    "change, says",
    [
        ({"init_from": None}, "--config.init_from"),
        ({"data.source": None}, "--config.data.source"),
        ({"steps": None}, "--config.epochs or --config.steps"),
        ({"beta": 0.0}, "beta=0.0 must be above 0"),
        ({"selection": "reward"}, "choose last or loss"),
        ({"batch_size": 7, "microbatch_size": 2}, "not a multiple of microbatch_size=2"),
    ],
)
def test_bad_input_is_one_clear_error(tuned, alignment, tmp_path, change, says):
    c = dpo_config(tuned, alignment["comparisons"])
    c.update_from_flattened_dict(change)
    with pytest.raises(InputError, match=says):
        dpo(c, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_model_without_a_template_is_refused(pretrained, alignment, tmp_path):
    with pytest.raises(InputError, match="answers no prompts: give the workdir of an SFT run"):
        dpo(dpo_config(pretrained, alignment["comparisons"]), str(tmp_path / "run"))


def test_other_comparisons_are_refused_on_resume(straight, tuned, alignment, tmp_path, monkeypatch):
    copy, source = shutil.copytree(straight, tmp_path / "run"), write(tmp_path / "rows.jsonl", comparisons(40))
    other = lambda c, *args, **kwargs: load_comparisons(dataclasses.replace(c, source=str(source)), *args, **kwargs)
    monkeypatch.setattr(stage, "load_comparisons", other)
    with pytest.raises(InputError, match="has changed since the run began"):
        dpo(dpo_config(tuned, alignment["comparisons"], **LONG | {"steps": 61}), str(copy))


def test_aot_lowers_the_program_that_the_stage_runs(tuned, alignment, tmp_path, monkeypatch):
    """The arrays of aot's batch are the loader's, by name, shape and dtype."""
    seen = {}

    def capture(c, program, batches, *args, **kwargs):
        seen["batch"] = batches[0]
        raise KeyboardInterrupt

    monkeypatch.setattr(stage, "supervised", capture)
    config = dpo_config(tuned, alignment["comparisons"])
    with pytest.raises(KeyboardInterrupt):
        dpo(config, str(tmp_path / "run"))
    config.data.max_length = seen["batch"]["tokens"].shape[2]
    c = build(DPOConfig, config)
    mesh = topology.topology_mesh(c.mesh, topology.parse("v5e-1"))
    base = dataclasses.replace(load_model(tuned).config, attention="auto")
    lowered = programs.dpo_program(c, base, mesh, completions=seen["batch"]["tokens"].shape[1])
    expected = {k: (v.shape[2:], v.dtype) for k, v in lowered.arguments[1].items()}
    assert {k: (v.shape, v.dtype) for k, v in seen["batch"].items()} == expected


@pytest.mark.slow
def test_a_mesh_of_8_gives_the_run_of_one_device(tuned, alignment, tmp_path, monkeypatch):
    mesh = {"mesh__data": 1, "mesh__stage": 2, "mesh__fsdp": 2, "mesh__tensor": 2}
    options = {"steps": 3, "optimizer__eps": 1e-4}
    dpo(dpo_config(tuned, alignment["comparisons"], **options), str(tmp_path / "alone"))
    for module in (run, trained):
        monkeypatch.setattr(module, "make_mesh", make_mesh)
    dpo(dpo_config(tuned, alignment["comparisons"], **options, **mesh), str(tmp_path / "mesh"))
    terms = model_terms(load_model(tuned).config)
    for a, b in zip(lines(tmp_path / "mesh"), lines(tmp_path / "alone"), strict=True):
        assert a["loss"] == approx(b["loss"], terms=terms) and a["grad_norm"] == approx(b["grad_norm"], terms=terms)

"""Fine-tuning: GPT-1's loss and its parts, the head, what is transferred, and the stage on a task to be learned."""

import dataclasses
import functools
import json
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from alignment_runs import on_one_device, overridden
from numerics import assert_close, model_terms
from runs import assert_same_run, lines, until_sigterm

from gptjax import finetune as stage
from gptjax.aot import programs
from gptjax.config import build, config_dict
from gptjax.cost import topology
from gptjax.errors import InputError
from gptjax.finetune import FinetuneConfig, finetune
from gptjax.model import gpt, heads
from gptjax.model.spec import GPTConfig
from gptjax.objectives.finetune import finetune_loss, task_logits, task_loss
from gptjax.objectives.lm import lm_loss
from gptjax.seeds import each_seed, over_seeds
from gptjax.trained import load_model
from gptjax.training.schedule import Schedule, ScheduleConfig

V, C = 17, 3
MODEL = GPTConfig(V, n_layer=2, n_head=2, d_model=16, context_length=12, norm="post", attention="cpu")
TERMS = model_terms(MODEL, rows=12)


init = jax.jit(gpt.init, static_argnums=0)
classifier = jax.jit(heads.classifier, static_argnums=(1, 2))


def params(outputs=C, seed=0):
    key = jax.random.key(seed)
    small = init(dataclasses.replace(MODEL, vocab_size=V - 3), key)
    made = classifier(small, MODEL, outputs, key)
    return made | {"head": jax.tree.map(lambda a: a + 0.1, made["head"])}


def batch(n=1, outputs=C, seed=0):
    """4 examples, the last of which is padding."""
    rng = np.random.default_rng(seed)
    return {
        "tokens": rng.integers(0, V, (4, n, 12)).astype(np.int32),
        "lengths": rng.integers(3, 13, (4, n)).astype(np.int32),
        "valid": np.ones((4, n), np.float32),
        "target": rng.dirichlet(np.ones(outputs), 4).astype(np.float32),
        "weights": np.array([1, 1, 1, 0], np.float32),
    }


@functools.cache
def loss_of(task, lm_weight):
    loss = finetune_loss(MODEL, task, lm_weight, 0.0, jnp.float32, 5)
    return jax.jit(jax.value_and_grad(lambda p, b: loss(p, b, None).total))


# --- the loss -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task, n", [
    pytest.param("entailment", 1, marks=pytest.mark.slow), ("similarity", 2), ("choice", 3),
])  # fmt: skip
def test_the_gradient_of_l3_is_that_of_l2_plus_lambda_l1s(task, n):
    """L1 by hand: of each example the mean over its sequences of their mean loss per token, by the plain loss."""
    p, b = params(1 if task == "choice" else C), batch(n, n if task == "choice" else C)
    value, grads = loss_of(task, 0.5)(p, b)
    task_value, task_grads = loss_of(task, 0.0)(p, b)

    def l1(p):
        lengths = b["lengths"].reshape(-1, 1)
        share = b["weights"].repeat(n)[:, None] / n / (lengths - 1)
        weights = jnp.where(jnp.arange(11) < lengths - 1, share, 0.0)
        return lm_loss(p["trunk"], MODEL, {"tokens": b["tokens"].reshape(-1, 12), "weights": weights})[0]

    lm_value, lm_grads = jax.jit(jax.value_and_grad(l1))(p)
    assert_close(value, task_value + 0.5 * lm_value, terms=TERMS)
    expected = jax.tree.map(lambda a, b: a + 0.5 * b, task_grads, lm_grads)
    largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves((task_grads, lm_grads)))  # they cancel in places
    assert_close(grads, expected, terms=TERMS, scale=largest)


def test_classification_is_softmax_of_the_hidden_state_at_the_last_token():
    """GPT-1 eq. 3-4, with the bias of the released code."""
    p, b = params(), batch()
    value, _ = loss_of("classification", 0.0)(p, b)
    x = jax.jit(gpt.hidden, static_argnums=1)(p["trunk"], MODEL, b["tokens"][:, 0])
    last = np.asarray(x)[np.arange(4), b["lengths"][:, 0] - 1]
    logits = last @ np.asarray(p["head"]["kernel"]) + np.asarray(p["head"]["bias"])
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert_close(value, -(b["weights"][:, None] * b["target"] * log_p).sum(), terms=TERMS)


def test_padding_changes_nothing():
    p, b = params(), batch()
    value, _ = loss_of("classification", 0.5)(p, b)
    other = b["tokens"].copy()
    for row, length in enumerate(b["lengths"][:, 0]):
        other[row, 0, length:] = 1
    other[3] = 2
    assert loss_of("classification", 0.5)(p, b | {"tokens": other})[0] == value


def test_similarity_does_not_depend_on_the_order():
    head = {"kernel": jax.random.normal(jax.random.key(0), (16, C)), "bias": jnp.ones(C)}
    x = jax.random.normal(jax.random.key(1), (4, 2, 16))
    one, other = (task_logits(head, x[:, order], jnp.ones((4, 2)), "similarity") for order in ([0, 1], [1, 0]))
    np.testing.assert_array_equal(one, other)
    assert_close(one, (x[:, 0] + x[:, 1]) @ head["kernel"] + 1, terms=2 * 16)


def test_a_choice_is_softmax_over_the_choices_that_are_there():
    head = {"kernel": jax.random.normal(jax.random.key(0), (16, 1)), "bias": jnp.zeros(1)}
    x, valid = jax.random.normal(jax.random.key(1), (2, 3, 16)), jnp.array([[1, 1, 1], [1, 1, 0]])
    logits = task_logits(head, x, valid, "choice")
    p = jax.nn.softmax(logits)
    assert p[1, 2] == 0 and logits.shape == (2, 3)
    np.testing.assert_allclose(p.sum(-1), 1, rtol=1e-6)
    target = jnp.array([[0, 1, 0], [1, 0, 0]])
    assert_close(task_loss(logits, target), -jnp.log(jnp.array([p[0, 1], p[1, 0]])), terms=16)
    grads = jax.grad(lambda h: task_loss(task_logits(h, x, valid, "choice"), target).sum())(head)
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads))  # for all the -inf


def test_the_choices_share_a_dropout_mask():
    """noise_shape [1, D] over an example's choices in the released code: equal states get equal logits."""
    head = {"kernel": jnp.ones((16, 1)), "bias": jnp.zeros(1)}
    x = jnp.broadcast_to(jax.random.normal(jax.random.key(1), (8, 1, 16)), (8, 3, 16))
    logits = task_logits(head, x, jnp.ones((8, 3)), "choice", 0.5, jax.random.split(jax.random.key(2), 8))
    np.testing.assert_array_equal(logits, logits[:, :1].repeat(3, 1))
    kept = task_logits(head, jnp.ones((2000, 1, 16)), jnp.ones((2000, 1)), "choice", 0.5,
                       jax.random.split(jax.random.key(3), 2000))  # fmt: skip
    assert abs(float(kept.mean()) - 16) < 4 * 16 / np.sqrt(16 * 2000)  # its expectation is without dropout's


# --- what is transferred ------------------------------------------------------------------------------------


def test_new_rows_and_head_are_drawn_and_the_rest_is_kept():
    key = jax.random.key(0)
    old = init(dataclasses.replace(MODEL, vocab_size=V - 3), key)
    made = classifier(old, MODEL, C, key)
    np.testing.assert_array_equal(made["trunk"]["wte"][:-3], old["wte"])
    np.testing.assert_array_equal(made["trunk"]["blocks"]["attn"]["c_attn"]["kernel"],
                                  old["blocks"]["attn"]["c_attn"]["kernel"])  # fmt: skip
    assert made["trunk"]["wte"].shape == (V, 16) and made["head"]["kernel"].shape == (16, C)
    wide = dataclasses.replace(MODEL, vocab_size=V + 2000)
    drawn = classifier(old, wide, 500, key)
    for values in (drawn["trunk"]["wte"][V - 3 :], drawn["head"]["kernel"]):
        assert abs(float(values.std()) - 0.02) < 4 * 0.02 / np.sqrt(2 * values.size)


@pytest.mark.parametrize("layers", [None, -1, 0, 1, 2])
def test_the_first_layers_are_transferred(layers):
    old, fresh = (init(MODEL, jax.random.key(i)) for i in range(2))
    found = heads.transferred(old, fresh, MODEL, layers)
    kernel = lambda p: np.asarray(p["blocks"]["mlp"]["c_fc"]["kernel"])
    k = 2 if layers is None else max(layers, 0)
    np.testing.assert_array_equal(kernel(found)[:k], kernel(old)[:k])
    np.testing.assert_array_equal(kernel(found)[k:], kernel(fresh)[k:])
    np.testing.assert_array_equal(found["wte"], (fresh if layers == -1 else old)["wte"])


# --- the schedule of the released code ----------------------------------------------------------------------


def test_the_learning_rate_is_the_released_codes():
    """warmup_linear at x = 0, .001, .002, .1, .5 of the run; the first update has a rate of 0."""
    schedule = Schedule(ScheduleConfig(kind="gpt1_linear", warmup_fraction=0.002), batch_size=1, context_length=1,
                        learning_rate=1.0, steps=1000)  # fmt: skip
    found = [schedule.learning_rate(step) for step in (0, 1, 2, 100, 500)]
    np.testing.assert_allclose(found, [0, 0.4995, 0.998, 0.9, 0.5], rtol=1e-12)


def test_a_warm_up_as_a_fraction_is_the_same_in_tokens():
    of = lambda **c: Schedule(ScheduleConfig(**c), batch_size=4, context_length=5, learning_rate=1.0, steps=50)
    one, other = of(warmup_fraction=0.2), of(warmup_tokens=200.0)
    assert [one.learning_rate(s) for s in range(50)] == [other.learning_rate(s) for s in range(50)]
    with pytest.raises(InputError, match="set one of them to 0"):
        ScheduleConfig(warmup_fraction=0.2, warmup_tokens=200.0)


# --- the stage ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Texts labeled by whether they end in 'zu', and as many choices, of which that of 'zu' is right."""
    rng, folder = random.Random(0), tmp_path_factory.mktemp("rows")
    made = []
    for i in range(160):
        words = [rng.choice(("ba", "ko", "mi", "ru", "te")) for _ in range(5)]
        if label := i % 2:
            words[-1] = "zu"
        made.append({"text": " ".join(words), "label": ("no", "yes")[label]})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    choices = [
        {"context": made[i]["text"], "choices": ["ba ba", "zu zu"][:: 1 if i % 3 else -1], "label": int(not i % 3)}
        for i in range(160)
    ]
    (folder / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in choices))
    return folder


def config(init_from, rows, **overrides):
    c = config_dict(FinetuneConfig)
    c.init_from, c.data.train, c.data.valid = str(init_from), str(rows / "rows.jsonl"), "0.2"
    c.steps, c.batch_size, c.optimizer.learning_rate = 60, 16, 1e-2
    c.eval.every, c.checkpoint.every = 30, 30
    return overridden(c, overrides)


@pytest.fixture(scope="module")
def learned(pretrained, rows, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finetuned") / "run"
    with on_one_device():
        result = finetune(config(pretrained, rows), workdir)
    assert result.finished and result.steps == 60
    return workdir


def test_a_task_is_learned(learned):
    first, *_, last = lines(learned, "evaluations")
    assert first["accuracy"] < 0.8 < 0.95 < last["accuracy"] and last["matthews"] > 0.9
    metrics = lines(learned)[-1]
    assert metrics["loss"] == pytest.approx(metrics["task_loss"] + 0.5 * metrics["lm_loss"], rel=1e-5)
    assert metrics["batch_examples"] == 16


def test_what_a_run_leaves(learned, rows):
    run, results = (json.loads((learned / f"{name}.json").read_text()) for name in ("config", "results"))
    assert run["kind"] == "classifier" and run["labels"] == ["no", "yes"] and results["step"] == 60
    last = lines(learned, "evaluations")[-1]
    assert results["validation"]["accuracy"] == last["accuracy"]
    predictions = lines(learned, "predictions")
    right = [p["predicted"] == p["label"] for p in predictions]
    assert np.mean(right) == results["validation"]["accuracy"] and {p["split"] for p in predictions} == {"validation"}
    for p in predictions:
        assert sum(p["probabilities"].values()) == pytest.approx(1)
        assert max(p["probabilities"], key=p["probabilities"].get) == p["predicted"]
    with pytest.raises(InputError, match="is a classifier, which labels texts and writes none"):
        load_model(learned)


def test_stopped_and_resumed_without_its_base_it_is_the_same_run(pretrained, rows, learned, tmp_path):
    base = shutil.copytree(pretrained, tmp_path / "base")
    with on_one_device():
        assert not until_sigterm(finetune, config(base, rows), tmp_path / "run", 40).finished
        shutil.rmtree(base)
        assert finetune(config(base, rows), tmp_path / "run").finished
    assert_same_run(tmp_path / "run", learned, 60)


def test_choices_and_seeds(pretrained, rows, tmp_path):
    """The mean over seeds and its standard error; a second call finds all runs finished."""
    c = config(pretrained, rows, data__train=str(rows / "choices.jsonl"), data__task="choice", steps=30)
    with on_one_device():
        found = each_seed(finetune, c, tmp_path, (0, 1))
        again = each_seed(finetune, c, tmp_path, (0, 1))
    assert found == again == json.loads((tmp_path / "results.json").read_text())
    of_seed = [json.loads((tmp_path / f"seed{s}" / "results.json").read_text())["validation"] for s in (0, 1)]
    values = [r["accuracy"] for r in of_seed]
    assert min(values) > 0.9  # zu zu is right, wherever it stands
    of_loss = found["validation"]["loss"]
    assert of_loss["values"] == [r["loss"] for r in of_seed] and of_loss["values"][0] != of_loss["values"][1]
    assert of_loss["mean"] == pytest.approx(np.mean(of_loss["values"]))
    assert of_loss["stderr"] == pytest.approx(abs(np.diff(of_loss["values"])[0]) / 2)
    assert over_seeds([0.5]) == {"mean": 0.5, "stderr": None, "values": [0.5]}  # one run has no spread


@pytest.mark.slow
def test_eight_devices_are_one_device(pretrained, rows, learned, tmp_path):
    c = config(pretrained, rows, steps=3, mesh__data=2, mesh__tensor=2, mesh__seq=2, eval__every=30)
    finetune(c, tmp_path / "eight")
    with on_one_device():
        finetune(config(pretrained, rows, steps=3, eval__every=30), tmp_path / "one")
    for a, b in zip(lines(tmp_path / "eight"), lines(tmp_path / "one"), strict=True):
        assert_close(a["loss"], b["loss"], terms=model_terms(GPTConfig(300, n_layer=2, n_head=4, d_model=32,
                                                                      context_length=48), rows=16))  # fmt: skip


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"init_from": None}, "No model to start from"),
        ({"data__train": None}, "No labeled data"),
        ({"steps": None}, "Say how long to train"),
        ({"transfer": 3}, "transfer=3: give -1 .nothing. to 2, the number of layers"),
        ({"data__max_length": 99}, "more than the model's context of 48"),
        ({"selection": "accuracy"}, "choose last or loss"),
    ],
)
def test_bad_input(pretrained, rows, tmp_path, overrides, message):
    c = config(pretrained, rows)
    for key, value in overrides.items():
        section, _, name = key.rpartition("__")
        (c[section] if section else c)[name] = value
    with on_one_device(), pytest.raises(InputError, match=message):
        finetune(c, tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


def test_other_rows_are_refused_on_resume(pretrained, rows, learned, tmp_path):
    copy = shutil.copytree(learned, tmp_path / "run")
    text = (rows / "rows.jsonl").read_text()
    (tmp_path / "rows.jsonl").write_text(text.replace("ba", "ko", 3))
    with on_one_device(), pytest.raises(InputError, match="another run's config"):
        finetune(config(pretrained, rows, data__train=str(tmp_path / "rows.jsonl"), steps=70), copy)


@pytest.mark.parametrize("task, labels, sequences", [("classification", None, 1), ("choice", "0,1", 2)])
def test_aot_lowers_the_program_that_the_stage_runs(pretrained, rows, tmp_path, monkeypatch, task, labels, sequences):
    """The arrays of aot's batch are the loader's, by name, shape and dtype, and the state is the stage's."""
    seen = {}

    def capture(c, program, batches, *args, **kwargs):
        seen.update(batch=batches[0], abstract=program.abstract)
        raise KeyboardInterrupt

    monkeypatch.setattr(stage, "supervised", capture)
    file = rows / ("rows.jsonl" if task == "classification" else "choices.jsonl")
    c = config(pretrained, rows, data__train=str(file), data__task=task)
    if labels:
        c.data.labels = labels
    with on_one_device(), pytest.raises(KeyboardInterrupt):
        finetune(c, tmp_path / "run")
    assert seen["batch"]["tokens"].shape[1] == sequences
    c.data.max_length = seen["batch"]["tokens"].shape[2]
    c.data.labels = labels or "no,yes"
    built = build(FinetuneConfig, c)
    mesh = topology.topology_mesh(built.mesh, topology.parse("v5e-1"))
    base = dataclasses.replace(load_model(pretrained).config, attention="auto")
    lowered = programs.finetune_program(built, base, mesh)
    expected = {k: (v.shape[2:], v.dtype) for k, v in lowered.arguments[1].items()}
    assert {k: (v.shape[1:], v.dtype) for k, v in seen["batch"].items()} == {
        k: (shape[1:], dtype) for k, (shape, dtype) in expected.items()
    }
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert shapes(lowered.arguments[0].params) == shapes(seen["abstract"].params)


def test_the_presets_build():
    from configs import gpt1_finetune

    assert gpt1_finetune.PRESETS["finetune"] == list(gpt1_finetune.TASKS)
    for task in gpt1_finetune.TASKS:
        c = build(FinetuneConfig, gpt1_finetune.get_config(task))
        assert c.epochs == 3.0 and c.optimizer.name == "gpt1_adam" and c.data.columns != ""

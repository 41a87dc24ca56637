"""The reward model end to end: what it learns, the zero of its scale, what it refuses."""

import json
import re
import shutil
import types

import jax
import numpy as np
import pytest
from alignment_runs import (
    LIKED,
    comparisons,
    demonstrations,
    pretrain_config,
    reward_config,
    sft_config,
    template,
    write,
)
from numerics import approx, assert_close, model_terms
from runs import assert_same_run, lines, until_sigterm
from safetensors.numpy import load_file, save_file

from gptjax import convert
from gptjax import reward as stage
from gptjax import run as spine
from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import InputError
from gptjax.interop import huggingface
from gptjax.model import gpt
from gptjax.parallel.mesh import MeshConfig, make_mesh
from gptjax.pretrain import pretrain
from gptjax.reward import reward
from gptjax.rlhf import reward_model
from gptjax.rlhf.reward_model import load_reward_model
from gptjax.sft import sft
from gptjax.trained import load_model
from gptjax.training.checkpoint import Checkpointer
from gptjax.training.stage import Evaluation

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(), jax.devices()[:1])


@pytest.fixture(scope="module")
def model(reward_dir, mesh):
    return load_reward_model(reward_dir, mesh=mesh)


def scores(model, rows, name):
    """Scores of the rows' `name`, one text each, and of completions the whole list."""
    t = template_of(model)
    return model.score([t.prompt(r["prompt"]) for r in rows], [t.response(r[name]) for r in rows])


def template_of(model):
    from gptjax.data.chat import Template

    return Template(model.tokenizer, model.template)


def result(workdir):
    return json.loads((workdir / "reward.json").read_text())


# --- what it learns ---------------------------------------------------------------------------------------


def test_a_planted_preference_is_learned(reward_dir, model):
    """Prompts it never saw: in every pair of 60 rows the completion with the word is to score higher."""
    assert result(reward_dir)["accuracy"] > 0.95 and result(reward_dir)["pairs"] > 40
    t, right = template_of(model), []
    for row in comparisons(60, seed=77):
        prompt = t.prompt(row["prompt"])
        found = model.score([prompt] * len(row["ranks"]), [t.response(c) for c in row["completions"]])
        for a, rank in zip(found, row["ranks"], strict=True):
            right += [a > b for b, other in zip(found, row["ranks"], strict=True) if rank < other]
    assert len(right) > 60 and np.mean(right) > 0.95


def test_exported_scores_are_the_normalized_ones(reward_dir, model, tmp_path, capsys):
    """Its bias too, which that layout's head has no place for; that transformers agrees: tests/peers."""
    convert.export_weights(reward_dir, tmp_path / "out")
    assert "normalized score" in capsys.readouterr().out
    tensors = load_file(tmp_path / "out/model.safetensors")
    kernel = tensors.pop("score.weight")
    assert kernel.shape == (1, model.config.d_model)
    save_file(tensors, tmp_path / "out/model.safetensors")
    config, trunk = huggingface.read(tmp_path / "out")
    chat = template(reward_dir)
    text = [*chat.prompt("ba ko"), *chat.response(LIKED)]
    x = gpt.hidden(trunk, config, np.array([text]))[0, -1]
    expected = model.score([text[:-2]], [text[-2:]])
    summed = float(np.abs(x * kernel[0]).sum())
    assert float(x @ kernel[0]) == approx(float(expected[0]), terms=model_terms(config), scale=summed)
    assert abs(float(model.params["head"]["bias"])) > 0.01  # or this would show nothing of it
    settings = json.loads((tmp_path / "out/config.json").read_text())
    assert settings["architectures"] == ["GPT2ForSequenceClassification"] and len(settings["id2label"]) == 1
    assert settings["pad_token_id"] == chat.pad_id
    with pytest.raises(InputError, match="normalized, and exported, at step"):
        convert.export_weights(reward_dir, tmp_path / "other", step=1)


def test_what_a_run_leaves(reward_dir):
    run, metrics = json.loads((reward_dir / "config.json").read_text()), lines(reward_dir)
    assert run["stage"] == "reward" and run["template"] == "chat"
    assert [m["step"] for m in metrics] == list(range(1, 61))
    names = {"loss", "accuracy", "margin", "pairs", "grad_norm", "batch_prompts", "prompts_per_second"}
    assert names <= metrics[0].keys()
    assert metrics[-1]["accuracy"] > 0.9 > metrics[0]["accuracy"] and metrics[0]["batch_prompts"] == 16
    evaluations = lines(reward_dir, "evaluations")
    assert [e["step"] for e in evaluations] == [0, 60]
    assert evaluations[-1]["accuracy"] == result(reward_dir)["accuracy"]
    rows = result(reward_dir)["calibration"]
    assert sum(r["pairs"] for r in rows) == result(reward_dir)["pairs"] and len(rows) == 10
    assert "calibration" in (reward_dir / "report.html").read_text().lower()


def test_validation_loss_by_hand(reward_dir, model, alignment):
    """-1/#pairs sum of log sigmoid over a prompt's pairs, prompts equal: of held-out rows, ragged and all."""
    from gptjax.data.comparisons import ComparisonConfig, load_comparisons

    c = ComparisonConfig(source=str(alignment["comparisons"]), validation="0.25")
    held_out = load_comparisons(c, template(reward_dir), 48, 0).validation
    assert len({len(x.ranks) for x in held_out}) == 3
    losses = []
    for x in held_out:
        r = model.score([x.prompt] * len(x.ranks), x.completions).astype(np.float64)
        pairs = [r[i] - r[j] for i, a in enumerate(x.ranks) for j, b in enumerate(x.ranks) if a < b]
        losses.append(np.mean(np.log1p(np.exp(-np.array(pairs)))))
    assert lines(reward_dir, "evaluations")[-1]["loss"] == approx(np.mean(losses), terms=model_terms(model.config))


def longer_wins(n, seed=4):
    return comparisons(n, seed, rank=lambda text: -len(text.split()))


@pytest.mark.slow
def test_the_best_of_k_objective(tuned, tmp_path, capsys):
    """It learns; and what it has learned here length alone explains, of which there is a warning."""
    source = write(tmp_path / "rows.jsonl", longer_wins(120))
    c = reward_config(tuned, source, objective="best", steps=40, batch_size=12)
    assert reward(c, str(tmp_path / "run")).finished
    found = result(tmp_path / "run")
    assert found["accuracy"] > 0.9 and found["longer_wins"] > 0.9
    assert "length alone agrees with" in capsys.readouterr().out
    first, last = lines(tmp_path / "run", "evaluations")
    assert last["loss"] < first["loss"] and last["loss"] > 0


def test_more_evaluation_batches_than_there_are_mean_all_of_them(reward_dir, alignment, mesh):
    """eval.batches is a limit: of fewer batches of held-out rows than 10 are all."""
    from gptjax.data.comparisons import ComparisonConfig, load_comparisons, validation_batches

    c = ComparisonConfig(source=str(alignment["comparisons"]), validation="0.25")
    loaded, model = load_comparisons(c, template(reward_dir), 48, 0), load_reward_model(reward_dir, mesh=mesh)
    batches = validation_batches(loaded.validation, 8, loaded.k, 48, pad_id=template(reward_dir).pad_id)
    assert len(batches) >= 3
    found = {}
    for most in (0, len(batches), 10):
        read = stage.scorer(
            lambda params, *texts: stage.score_at_end(params, *texts, model.config, model.dtype, mesh), mesh
        )
        with jax.set_mesh(mesh):
            evaluate = stage.ranking(read, stage.CRITERIA["pairs"], stage.spread(batches, most))
            found[most] = evaluate(types.SimpleNamespace(params=model.params)).figures
    assert found[0] == found[len(batches)]
    assert found[10] == found[0]


# --- the zero of the scale --------------------------------------------------------------------------------


def raw(reward_dir, mesh, tmp_path):
    """The reward model as training left it: gain 1, bias 0."""
    copy = shutil.copytree(reward_dir, tmp_path / "raw")
    (copy / "reward.json").write_text(json.dumps({**result(reward_dir), "gain": 1.0, "bias": 0.0}))
    return load_reward_model(copy, mesh=mesh)


def test_demonstrations_score_0_on_average(reward_dir, model, mesh, alignment, tmp_path):
    rows = [json.loads(line) for line in alignment["demonstrations"].read_text().splitlines()]
    from gptjax.data.demonstrations import DemonstrationConfig, load_demonstrations

    c = DemonstrationConfig(source=str(alignment["demonstrations"]), validation="0.15")
    demos = load_demonstrations(c, template(reward_dir), 48, 0).train
    prompts, responses = [d.ids[: d.prompt] for d in demos], [d.ids[d.prompt :] for d in demos]
    after, before = model.score(prompts, responses), raw(reward_dir, mesh, tmp_path).score(prompts, responses)
    assert abs(after.mean()) < 1e-4 < abs(before.mean())
    assert result(reward_dir)["demonstrations"] == len(demos) and abs(result(reward_dir)["mean_after"]) < 1e-4
    assert before.mean() == pytest.approx(result(reward_dir)["mean_before"], abs=1e-4)
    # a bias alone: no margin is changed
    assert_close(after, before - before.mean(), terms=len(before), scale=np.abs(before).max())
    assert result(reward_dir)["gain"] == 1.0 and len(rows) > len(demos)


def test_the_scale_is_of_the_selected_checkpoint(pretrained, alignment, mesh, tmp_path, monkeypatch, capsys):
    """Planted validation losses, the lowest at step 2: mean 0 and deviation 1 are of its weights, and they are opened.
    On a trunk without demonstrations they are named, and those that do not fit the context are counted. A step forwards
    each completion once, not K - 1 times, as pairs would: rows x K texts."""
    from gptjax.data.demonstrations import DemonstrationConfig, load_demonstrations

    def planted(*args):
        seen = iter([9.0, 1.0, 2.0, 3.0])
        return lambda state: Evaluation({"loss": next(seen), "accuracy": 0.5, "margin": 0.0, "pairs": 1})

    def counting(params, tokens, *args, **kwargs):
        shapes.append(tokens.shape)
        return real(params, tokens, *args, **kwargs)

    shapes, real = [], stage.score_at_end
    monkeypatch.setattr(stage, "ranking", planted)
    monkeypatch.setattr(stage, "score_at_end", counting)
    named = tmp_path / "d.jsonl"
    named.write_text(alignment["demonstrations"].read_text() + json.dumps({"prompt": "ba " * 99, "response": "ko"}))
    c = reward_config(
        pretrained, alignment["comparisons"], steps=6, selection="loss", eval__every=2, checkpoint__every=2,
        checkpoint__keep_last=1, normalize="mean_std", demonstrations=str(named),
    )  # fmt: skip
    assert reward(c, str(tmp_path / "run")).finished
    assert re.search(r"demonstrations left out: 1 too long; .*d.jsonl:\d+: ", capsys.readouterr().out)
    assert shapes and {s[0] for s in shapes} == {16 * 4}
    opened, found = load_reward_model(tmp_path / "run", mesh=mesh), result(tmp_path / "run")
    assert opened.step == found["step"] == 2 and abs(found["mean_after"]) < 1e-4
    source = DemonstrationConfig(source=str(named), drop_long=True)
    demos = load_demonstrations(source, template_of(opened), 48, 0).train
    assert len(demos) == found["demonstrations"]
    scored = opened.score([d.ids[: d.prompt] for d in demos], [d.ids[d.prompt :] for d in demos])
    assert abs(scored.mean()) < 1e-4 and scored.std() == pytest.approx(1, abs=1e-3)
    unscaled = raw(tmp_path / "run", mesh, tmp_path)
    rows = [{**r, "response": r["completions"][0]} for r in comparisons(10, seed=5)]
    expected = found["gain"] * scores(unscaled, rows, "response") + found["bias"]
    assert_close(scores(opened, rows, "response"), expected, terms=4 * opened.config.d_model, scale=abs(found["bias"]))


def test_a_longer_run_has_no_scale_until_it_is_finished(reward_dir, mesh, tmp_path, monkeypatch, tuned, alignment):
    """reward.json of the shorter run tells of other weights: stopped on the way, the workdir is no reward model."""
    copy = shutil.copytree(reward_dir, tmp_path / "longer")
    monkeypatch.setattr(spine.loop, "run", lambda stage, state, *_: (state, False, 0.0))
    c = reward_config(tuned, alignment["comparisons"], steps=120)
    assert not reward(c, str(copy)).finished
    with pytest.raises(InputError, match="no reward.json"):
        load_reward_model(copy, mesh=mesh)


def test_the_score_is_read_at_end_of_text_and_nothing_after_it_counts(model):
    t = template_of(model)
    prompt, response = t.prompt("ba ko"), t.response(f"mi {LIKED} ru")
    alone = model.score([prompt], [response])
    with_others = model.score([prompt, prompt], [response, t.response("mi ko ru te fo la ni ba ko mi ru te")])
    assert alone[0] == approx(with_others[0], terms=model_terms(model.config), scale=1)
    assert abs(alone[0] - model.score([prompt], [t.response("mi ko ru")])[0]) > 0.5
    tokens = np.zeros((1, 32), np.int32)
    n = len(prompt) + len(response)
    tokens[0, :n] = prompt + response
    junk = tokens.copy()
    junk[0, n:] = 270
    without_end = tokens.copy()
    without_end[0, n - 1] = prompt[-1]
    args = (np.array([n], np.int32), model.config, model.dtype)
    score = reward_model.score_rows(model.params, tokens, *args)
    assert score == reward_model.score_rows(model.params, junk, *args)
    assert score != reward_model.score_rows(model.params, without_end, *args)


def test_scoring_more_than_one_batch_keeps_the_order(model):
    t, rows = template_of(model), [{**r, "response": r["completions"][0]} for r in comparisons(13, seed=6)]
    together = scores(model, rows, "response")
    parts = model.score([t.prompt(r["prompt"]) for r in rows], [t.response(r["response"]) for r in rows], rows=4)
    assert_close(together, parts, terms=model_terms(model.config))
    with pytest.raises(InputError, match="longer than the reward model's context of 48"):
        model.score([[1] * 40], [[1] * 9])


# --- length -----------------------------------------------------------------------------------------------


def test_fewer_comparisons_than_a_batch_train_and_are_warned_of(tuned, tmp_path, capsys):
    """One step of a decay to 0: it is taken at the peak, moves the trunk, and what it is worth is said."""
    from gptjax.model import heads

    source = write(tmp_path / "rows.jsonl", comparisons(20))
    c = reward_config(tuned, source, steps=None, epochs=1.0, batch_size=16, model__dropout=0.0)
    c.optimizer.learning_rate = 1e-3
    c.schedule.final_fraction = 0.0
    assert reward(c, str(tmp_path / "run")).finished
    (line,) = lines(tmp_path / "run")
    assert line["learning_rate"] == 1e-3
    assert "warning: the run has only 1 optimizer step, which hardly move" in capsys.readouterr().out
    before, after = load_model(tuned).params, load_reward_model(tmp_path / "run", mesh=one_mesh()).params["trunk"]
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), heads.trunk(before), after)
    del moved["ln_f"]["bias"]  # the same for all completions: no gradient but for rounding
    assert min(jax.tree.leaves(moved)) > 9e-4  # Adam's first step is the learning rate, for every parameter


def one_mesh():
    return make_mesh(MeshConfig(), jax.devices()[:1])


def test_no_such_warning_elsewhere(reward_dir, mesh):
    from gptjax.evals.preference import length_explains

    assert not length_explains(result(reward_dir)) and result(reward_dir)["longer_wins"] < 0.9


# --- what it says of its rows -----------------------------------------------------------------------------


def test_counts_say_what_they_count(tuned, tmp_path, capsys):
    """Pairs without ties, what was left out by kind, and completions that are the same text."""
    ranked = lambda prompt, texts, ranks: {"prompt": prompt, "completions": texts, "ranks": ranks}
    rows = [ranked(f"ba {i}", ["ko", "mi zu", "ru"], [0, 1, 1]) for i in range(8)]  # 2 pairs of 3
    rows += [{"prompt": f"ko {i}", "chosen": "ba", "rejected": "ba"} for i in range(3)]
    rows += [ranked("mi", ["ko", "ba"], [1, 1]), {"prompt": "", "chosen": "ba", "rejected": "ko"}]
    held_out = [ranked("la 1", ["zu zu", "te te te", "fo"], [0, 1, 1]), ranked("la 2", ["zu", "te"], [0, 1])]
    c = reward_config(
        tuned, write(tmp_path / "rows.jsonl", rows), steps=1, data__bad_rows="drop", normalize="none",
        data__validation=str(write(tmp_path / "held_out.jsonl", held_out)),
    )  # fmt: skip
    reward(c, str(tmp_path / "run"))
    assert (result(tmp_path / "run")["gain"], result(tmp_path / "run")["bias"]) == (1.0, 0.0)
    out = capsys.readouterr().out
    dropped = "dropped: 1 all ties, 1 bad (dropped_rows.jsonl)"
    assert f"11 comparisons of up to 3 completions, {dropped}; 2 held out; 19 pairs; " in out
    assert "warning: in 3 of the 19 pairs the better and the worse completion are the same text" in out
    dropped = lines(tmp_path / "run", "dropped_rows")
    assert [row["row"].rpartition("/")[2] for row in dropped] == ["rows.jsonl:12", "rows.jsonl:13"]
    assert result(tmp_path / "run")["longer_wins_characters"] == 0.5  # shorter, longer, equal: 5 and 8, 2; 2 and 2
    assert result(tmp_path / "run")["length_baseline"]["accuracy"] >= 0.5


# --- stopped and gone on with -----------------------------------------------------------------------------


@pytest.mark.slow
def test_a_stopped_run_ends_where_an_uninterrupted_one_does(tuned, alignment, tmp_path):
    c = reward_config(
        tuned,
        alignment["comparisons"],
        steps=4,
        model__dropout=0.1,
        eval__every=2,
        checkpoint__every=2,
        eval__batches=1,
    )
    assert reward(c, str(tmp_path / "straight")).finished
    assert not until_sigterm(reward, c, tmp_path / "parts", stop=1).finished
    assert Checkpointer(tmp_path / "parts").steps() == [1]
    with pytest.raises(InputError, match="no reward.json: let its training finish"):
        load_reward_model(tmp_path / "parts", mesh=make_mesh(MeshConfig(), jax.devices()[:1]))
    assert reward(c, str(tmp_path / "parts")).finished
    assert_same_run(tmp_path / "parts", tmp_path / "straight", 4)
    assert result(tmp_path / "parts") == result(tmp_path / "straight")


# --- what is refused --------------------------------------------------------------------------------------


def test_workdirs_that_are_no_reward_model(tuned, pretrained, reward_dir, mesh, tmp_path):
    for workdir, says in ((tuned, "is a sft run"), (pretrained, "is a pretrain run"), (tmp_path, "not a workdir")):
        with pytest.raises(InputError, match=says):
            load_reward_model(workdir, mesh=mesh)
    with pytest.raises(InputError, match="is a reward model, which scores texts and writes none"):
        load_model(reward_dir)
    with pytest.raises(InputError, match="another tokenizer"):
        load_reward_model(reward_dir, mesh=mesh, tokenizer=Tokenizer.load(pretrained / "tokenizer"))
    load_reward_model(reward_dir, mesh=mesh, tokenizer=Tokenizer.load(tuned / "tokenizer"))


def test_a_trunk_without_demonstrations(pretrained, alignment, tmp_path):
    """Straight from pre-training there are none to set the zero by, unless they are named."""
    with pytest.raises(InputError, match="--config.demonstrations=PATH, or --config.normalize=none"):
        reward(reward_config(pretrained, alignment["comparisons"]), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


ROW = {"prompt": "ba", "completions": ["ko", "mi"], "ranks": [0, 1]}
BAD = {
    "no field": ({"prompt": "ba", "completions": ["ko", "mi"]}, {}, "rows.jsonl:4.*no field 'ranks'"),
    "one completion": (ROW | {"completions": ["ko"], "ranks": [0]}, {}, "rows.jsonl:4.*1 completions: give 2 to 9"),
    "ranks": (ROW | {"ranks": [0, 1, 2]}, {}, "rows.jsonl:4.*3 ranks for 2 completions"),
    "not a number": (ROW | {"ranks": [0, "good"]}, {}, "rows.jsonl:4.*'good' is not a finite number"),
    "empty": (ROW | {"completions": ["ko", ""]}, {}, "rows.jsonl:4.*Completion 2.*is empty"),
    "too long": (ROW | {"completions": ["ko", "ba " * 60]}, {}, "rows.jsonl:4.*more than 48"),
    "no length": (ROW, {"steps": None}, "--config.epochs=1"),
    "no model": (ROW, {"init_from": None}, "--config.init_from"),
    "no source": (ROW, {"data.source": None}, "--config.data.source"),
    "objective": (ROW, {"objective": "dpo"}, "pairs, best"),
    "template": (ROW, {"template": "plain"}, "tuned with 'chat'"),
    "micro-batch": (ROW, {"microbatch_size": 3}, "multiple of microbatch_size=3"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_error(tuned, tmp_path, name):
    row, options, says = BAD[name]
    rows = [ROW, ROW | {"prompt": "te"}, ROW | {"prompt": "mi"}, row]
    c = reward_config(tuned, write(tmp_path / "rows.jsonl", rows))
    for key, value in options.items():
        section, _, last = key.rpartition(".")
        (c[section] if section else c)[last] = value
    with pytest.raises(InputError, match=f"(?s){says}") as caught:
        reward(c, str(tmp_path / "run"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_reward_model_of_another_tokenizer(reward_dir, tmp_path):
    """A second line of runs, whose BPE was trained on another text, is not scored by the first's."""
    (tmp_path / "text.txt").write_text("quick brown foxes jump over lazy dogs 0123 " * 200)
    pretrain(pretrain_config(tmp_path / "text.txt", steps=1), str(tmp_path / "pretrained"))
    with pytest.raises(InputError, match="another tokenizer"):
        one_device = make_mesh(MeshConfig(), jax.devices()[:1])
        load_reward_model(reward_dir, mesh=one_device, tokenizer=load_model(tmp_path / "pretrained").tokenizer)
    c = sft_config(
        tmp_path / "pretrained", write(tmp_path / "d.jsonl", demonstrations(8)), steps=1, selection="reward",
        reward=str(reward_dir),
    )  # fmt: skip
    with pytest.raises(InputError, match="another tokenizer"):
        sft(c, str(tmp_path / "sft"))
    assert not (tmp_path / "sft").exists()

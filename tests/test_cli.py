"""End to end: pretrain, sample, evaluate and describe as a newcomer runs them, every kind of source, bad input."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import types

import jax
import pytest
from alignment_runs import on_one_device
from conftest import ROOT
from ml_collections import config_flags
from numerics import approx, model_terms
from runs import lines, main_of, one_device_environment

from gptjax import command_line
from gptjax.config import config_dict
from gptjax.data.corpus import pretraining_text
from gptjax.data.prepare import prepare
from gptjax.errors import InputError
from gptjax.evaluate import score, source_text
from gptjax.generation.sampling import Sampling
from gptjax.model.spec import GPTConfig
from gptjax.pretrain import PretrainConfig, pretrain
from gptjax.run_config import read_config
from gptjax.sample import continue_texts
from gptjax.trained import load_model

METRICS = {
    "step", "tokens_seen", "loss", "bits_per_byte", "grad_norm", "learning_rate", "batch_tokens", "tokens_per_second",
    "mfu",
}  # fmt: skip
STEPS = 30
TERMS = model_terms(GPTConfig(100, n_layer=2, n_head=4, d_model=32, context_length=32), rows=64)


def words(seed=0, count=3000):
    rng = random.Random(seed)
    known = ["".join(rng.choice("abcdefgh") for _ in range(rng.randint(2, 6))) for _ in range(40)]
    return "".join(rng.choice(known) + rng.choice(" \n") for _ in range(count))


@pytest.fixture(autouse=True)
def programs_of_what_is_patched():
    """In place of conftest's: nothing that is patched here is traced, so all runs share their programs."""


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(words())
    return path


def command(name, *options):
    """stdout of `python -m gptjax.<name>` on one device, a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", f"gptjax.{name}", *options], cwd=ROOT, env=one_device_environment(),
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory):
    """(workdir, what pretrain printed) of a small run."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    options = {
        "steps": STEPS, "batch_size": 8, "steps_per_dispatch": 5, "model.n_layer": 2, "model.unroll": 1,
        "model.d_model": 32, "model.context_length": 32, "eval.every": 15, "checkpoint.every": 15,
        "samples.max_new_tokens": 8, "schedule.warmup_tokens": 1024,
        "optimizer.learning_rate": 0.01, "data.source": text,
    }  # fmt: skip
    printed = command(
        "pretrain", "--config=configs/shakespeare_char.py", f"--workdir={workdir}",
        *(f"--config.{k}={v}" for k, v in options.items()),
    )  # fmt: skip
    return workdir, printed


# --- pretrain ---------------------------------------------------------------------------------------------


def test_pretrain_leaves_a_whole_workdir(trained):
    workdir, printed = trained
    metrics, evaluations = lines(workdir, "metrics"), lines(workdir, "evaluations")
    assert [m["step"] for m in metrics] == list(range(1, STEPS + 1))
    assert all(METRICS <= m.keys() for m in metrics)
    assert [m["tokens_seen"] for m in metrics] == [8 * 32 * n for n in range(1, STEPS + 1)]
    assert all(m["batch_tokens"] == 256 and m["tokens_per_second"] > 0 for m in metrics)
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 0.1
    assert [e["step"] for e in evaluations] == [0, 15, STEPS]
    assert evaluations[-1]["loss"] < evaluations[0]["loss"] - 0.1
    assert {s["step"] for s in lines(workdir, "samples")} == {0, STEPS}
    assert list((workdir / "tensorboard").iterdir())
    assert {"15", str(STEPS)} <= set(os.listdir(workdir / "checkpoints"))
    assert json.loads((workdir / "config.json").read_text())["model"]["vocab_size"] == 10  # a-h, space, newline


def test_one_character_is_one_byte_here(trained):
    """bits per byte of plain ASCII, character by character: nats / ln 2."""
    for record in (*lines(trained[0], "metrics"), *lines(trained[0], "evaluations")):
        assert record["bits_per_byte"] == pytest.approx(record["loss"] / 0.69314718, rel=1e-5)


def test_what_pretrain_prints(trained):
    workdir, printed = trained
    assert "compiled the train step in" in printed and "memory per device" in printed
    assert "bits per byte" in printed and "parameters" in printed and "--- sample at step 30" in printed
    assert printed.rstrip().endswith(f"report: {workdir}/report.html")


def test_the_report_is_one_page_that_needs_nothing_else(trained):
    page = (trained[0] / "report.html").read_text()
    assert page.startswith("<!doctype html>")
    assert not re.search(r"https?://|(src|href)\s*=\s*(?!['\"]?data:)", page)
    assert "src='data:image/png;base64," in page and "<script" not in page
    for told in ("hardware", "last validation", "bits/byte", "training time", "n_layer", "tokens/s", f"step {STEPS}"):
        assert told in page, told
    assert page.count("<pre><b>") == 2  # the sample before and the one after


def test_the_report_escapes_what_the_model_wrote(trained, tmp_path):
    from gptjax import report

    for name in ("config.json", "metrics.jsonl", "evaluations.jsonl"):
        shutil.copy(trained[0] / name, tmp_path)
    sample = {"step": 0, "prompt": "<script>", "text": "</pre><img src=http://x>"}
    (tmp_path / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    page = report.write(tmp_path).read_text()
    assert "<script" not in page and "<img src=http" not in page and "&lt;script&gt;" in page


def test_the_report_of_a_run_with_a_validation_loss_that_is_not_finite(trained, tmp_path):
    """JSON has null for it, which is no candidate for the best."""
    from gptjax import report

    for name in ("config.json", "metrics.jsonl"):
        shutil.copy(trained[0] / name, tmp_path)
    losses = [None, 2.5, None]
    found = [{"step": 5 * i, "loss": loss, "bits_per_byte": loss} for i, loss in enumerate(losses)]
    (tmp_path / "evaluations.jsonl").write_text("".join(json.dumps(e) + "\n" for e in found))
    page = report.write(tmp_path).read_text()
    assert "best validation</th><td>2.5000 nats/token" in page and "first validation" in page


def test_the_best_of_a_report_is_the_one_that_the_run_selects(trained, tmp_path):
    """By `selection` where there is one, as best.json, `--step=best` and RunResult: not by the loss."""
    from gptjax import report

    for name in ("config.json", "metrics.jsonl"):
        shutil.copy(trained[0] / name, tmp_path)
    found = [
        {"step": 5 * i, "loss": loss, "bits_per_byte": loss, "reward": -selection, "selection": selection}
        for i, (loss, selection) in enumerate([(2.5, -1.0), (2.75, -3.0), (3.0, -2.0)])
    ]
    (tmp_path / "evaluations.jsonl").write_text("".join(json.dumps(e) + "\n" for e in found))
    page = report.write(tmp_path).read_text()
    assert "best validation</th><td>2.7500 nats/token" in page


# --- sample -----------------------------------------------------------------------------------------------

NUCLEUS = Sampling(0.8, top_p=0.95)


@pytest.fixture(scope="module")
def model(trained):
    return load_model(trained[0])


def continued(model, prompts, sampling=NUCLEUS, seed=0):
    return continue_texts(model, prompts, max_new_tokens=12, sampling=sampling, seed=seed)


def test_sample_prints_what_continue_texts_returns(trained, model):
    """The command line, on one device, and this process, on eight, write the same; in either a seed repeats."""
    options = (f"--workdir={trained[0]}", "--prompt=ab", "--prompt=c", "--n=2", "--max_new_tokens=12",
               "--temperature=0.8", "--top_p=0.95", "--seed=3")  # fmt: skip
    prompts = ["ab", "ab", "c", "c"]
    texts = [prompt + text for prompt, text in zip(prompts, continued(model, prompts, seed=3), strict=True)]
    assert [len(text) for text in texts] == [14, 14, 13, 13] and len(set(texts)) == 4
    assert command("sample", *options) == "".join(f"--- {i} ---\n{text}\n" for i, text in enumerate(texts))


def test_a_seed_repeats_and_another_differs_unless_greedy(model):
    prompts = ["ab", "ab", "c", "c"]
    texts = {seed: tuple(continued(model, prompts, seed=seed)) for seed in range(4)}
    assert texts[2] == tuple(continued(model, prompts, seed=2))
    assert len(set(texts.values())) == 4
    greedy = [continued(model, prompts, Sampling(0.0), seed) for seed in (1, 2)]
    assert greedy[0] == greedy[1] and greedy[0][0] == greedy[0][1]


def test_prompts_that_can_not_be(trained, model):
    with pytest.raises(InputError, match="Prompt 0 has 33 tokens and the model's context is 32"):
        continued(model, ["a" * 33])
    with pytest.raises(InputError, match="no end-of-text"):
        continued(model, [""])
    with pytest.raises(InputError, match="'z'"):
        continued(model, ["z"])
    code, out, err = main_of("gptjax.sample", f"--workdir={trained[0]}", f"--prompt={'a' * 33}")
    assert code == 2 and err.startswith("error: ") and "33 tokens" in err and not out
    assert len(continued(model, ["a" * 32])[0]) == 1  # the last position predicts once more


def test_workdirs_that_can_not_be(trained, tmp_path):
    with pytest.raises(InputError, match="is not a workdir"):
        load_model(tmp_path)
    with pytest.raises(InputError, match="no checkpoint of step 7: there are 15, 30"):
        load_model(trained[0], step=7)
    for name in ("config.json", "tokenizer"):
        (shutil.copytree if name == "tokenizer" else shutil.copy)(trained[0] / name, tmp_path / name)
    with pytest.raises(InputError, match="no checkpoint yet"):
        load_model(tmp_path)
    assert load_model(trained[0], step=15).step == 15


# --- evaluate ---------------------------------------------------------------------------------------------


def test_evaluate_is_what_training_measured(trained):
    code, out, _ = main_of("gptjax.evaluate", f"--workdir={trained[0]}", "--json")
    assert code == 0
    result = json.loads(out)
    last = lines(trained[0], "evaluations")[-1]
    assert result["loss"] == approx(last["loss"], terms=TERMS)
    assert result["bits_per_byte"] == approx(last["bits_per_byte"], terms=TERMS)
    assert (result["tokens"], result["step"]) == (last["tokens"], STEPS)
    assert result["bytes"] == result["tokens"] and result["perplexity"] == pytest.approx(2.718281828 ** result["loss"])


def test_evaluate_of_another_text_and_an_older_step(trained, model, tmp_path):
    """Every token is scored once, whatever the size of the batch; the first one has nothing before it here."""
    path = tmp_path / "other.txt"
    path.write_text("abc def\n" * 40)
    other = source_text(str(path), model.tokenizer, "text")
    results = [score(model, other, rows) for rows in (8, 16)]
    assert results[0]["tokens"] == results[1]["tokens"] == 319 and results[0]["tokens_unscored"] == 1
    assert score(model, other, 8, stride=8)["tokens"] == 319
    assert results[0]["loss"] == approx(results[1]["loss"], terms=TERMS)
    code, printed, _ = main_of("gptjax.evaluate", f"--workdir={trained[0]}", f"--source={path}", "--step=15")
    assert code == 0
    assert re.search(r"step\s+15\b", printed) and "perplexity" in printed
    assert len(pretraining_text(trained[0]).parts[0].validation) == lines(trained[0], "evaluations")[0]["tokens"] + 1
    path.write_text("abc")  # shorter than a context
    options = (f"--workdir={trained[0]}", f"--source={path}", "--per_document", "--json")
    result = json.loads(main_of("gptjax.evaluate", *options)[1])
    assert (result["tokens"], result["tokens_unscored"]) == (2, 1)


# --- describe ---------------------------------------------------------------------------------------------


@pytest.fixture
def described(monkeypatch):
    """described(options) -> what `python -m gptjax.describe` prints."""
    monkeypatch.chdir(ROOT)

    def described(*options):
        code, out, err = main_of("gptjax.describe", *options)
        assert (code, err) == (0, "")
        return out

    return described


def test_describe_json(described):
    d = json.loads(described("--config=configs/gpt3.py:175b", "--json"))
    assert {"params", "params_non_embedding", "flops_per_token", "tokens", "pf_days", "bytes_per_device"} <= d.keys()
    assert d["params"] == 174_604_259_328 and d["tokens"] == 300_000_000_000
    assert {"causal_halved", "palm", "6n"} <= d["flops_per_token"].keys()
    assert {"params", "optimizer", "gradients"} == d["bytes_per_device"].keys()
    assert {"params", "optimizer", "gradients", "kept for the backward pass"} <= d["peak_per_tpu_chip"].keys()
    assert d["pf_days"] == pytest.approx(3637, rel=2e-3)  # the paper's table says 3,640
    ways = d["mesh"]["fsdp"] * d["mesh"]["tensor"]
    assert d["devices"] == ways and d["bytes_per_device"]["params"] == pytest.approx(
        4 * d["params"] / ways,
        rel=0.06,  # embeddings are not cut up over tensor, gains and biases not at all
    )
    assert d["bytes_per_device"]["optimizer"] == pytest.approx(2 * d["bytes_per_device"]["params"], rel=0.01)


def test_describe_goes_by_the_rules(described):
    flags = ("--config=configs/gpt2.py:124m", "--config.mesh.fsdp=4", "--json")
    cut, whole = (
        json.loads(described(*flags, *more))["bytes_per_device"] for more in ((), ("--config.mesh.rules.embed=none",))
    )
    assert whole["params"] == 4 * 124_439_808
    assert cut["params"] < 0.26 * whole["params"] and cut["optimizer"] < 0.26 * whole["optimizer"]


def test_describe_is_a_table_too(described):
    printed = described("--config=configs/gpt1.py")
    assert "116,534,784" in printed and "per device" in printed


# --- sources ----------------------------------------------------------------------------------------------


def tiny(source, **overrides):
    c = config_dict(PretrainConfig)
    c.model.update(n_layer=2, n_head=4, d_model=32, context_length=32, vocab_size=10)
    c.data.update(source=str(source), tokenizer="char")
    c.steps, c.batch_size, c.log.tensorboard = 2, 8, False
    c.eval.batches, c.samples.max_new_tokens = 1, 4
    c.update_from_flattened_dict({k.replace("__", "."): v for k, v in overrides.items()})
    return c


CUT = {"mesh__data": 1, "mesh__fsdp": 8, "model__vocab_size": 320}  # one program for any source


def json_lines(folder):
    rows = [{"body": words(n, 100), "id": n} for n in range(30)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "rows.jsonl", {"data__text_field": "body"}


def parquet(folder):
    import pyarrow
    from pyarrow import parquet as pq

    pq.write_table(pyarrow.table({"text": [words(n, 100) for n in range(30)]}), folder / "rows.parquet")
    return folder / "rows.parquet", {}


def directory(folder):
    for n in range(30):
        (folder / f"part{n % 3}").mkdir(exist_ok=True)
        (folder / f"part{n % 3}" / f"{n}.txt").write_text(words(n, 100))
    return folder, {}


def mixture(folder):
    """Directories with a BPE, whose end-of-text keeps documents apart."""
    for name in ("one", "two"):
        (folder / name).mkdir()
        directory(folder / name)
    weights = {"one": 3.0, "two": 1.0}
    return folder, {"data__mixture": weights, "data__tokenizer": "bpe:300", "data__isolate_documents": True}


@pytest.mark.parametrize("kind", [json_lines, parquet, directory, pytest.param(mixture, marks=pytest.mark.slow)])
def test_every_kind_of_source_trains(tmp_path, kind):
    """On 8 devices, parameters cut up over them, with samples: the prompts need not divide over the devices.

    The model has more ids than the tokenizer and is untrained: only those that have a text are sampled."""
    (tmp_path / "data").mkdir()
    source, options = kind(tmp_path / "data")
    assert pretrain(tiny(source, samples__prompts=("ab", "c", "def"), **options, **CUT), str(tmp_path / "run")).finished
    assert [m["step"] for m in lines(tmp_path / "run", "metrics")] == [1, 2]
    assert len(lines(tmp_path / "run", "samples")) == 6
    assert load_model(tmp_path / "run").step == 2


# --- bad input --------------------------------------------------------------------------------------------


def write(content):
    def make(folder):
        path = folder / "bad.txt"
        path.write_bytes(content)
        return path

    return make


def bad_lines(content):
    def make(folder):
        (folder / "bad.jsonl").write_text(content)
        return folder / "bad.jsonl"

    return make


ROW = json.dumps({"text": "abc def"}) + "\n"
BAD = {
    "missing": (lambda folder: folder / "nothing.txt", {}, r"nothing\.txt"),
    "empty": (write(b""), {}, r"bad\.txt' contains no text: give one"),
    "empty directory": (lambda folder: folder, {}, "contains no text: give one"),
    "not text": (write(bytes(range(256)) * 20), {}, r"bad\.txt"),
    "too short": (write(b"abc def ghi"), {}, "fewer than one context of 32"),
    "not JSON": (bad_lines(ROW * 3 + "{oops\n"), {}, r"bad\.jsonl:4|bad\.jsonl.*line 4"),
    "no such field": (bad_lines(ROW + '{"body": "x"}\n'), {}, r"bad\.jsonl(:2|.*line 2).*text"),
    "not set": (lambda folder: None, {}, "--config.data.source"),
    "batch over mesh": (write(b"abc def " * 500), {"batch_size": 12}, "batch_size=12 is not divisible.*8 or 16"),
    "heads over mesh": (
        write(b"abc def " * 500), {"mesh__data": 1, "mesh__tensor": 8}, "n_head=4 is not divisible by mesh.tensor=8",
    ),
    "rules": (write(b"abc def " * 500), {"mesh__rules__mlp": "tensr"}, "mesh.rules.mlp='tensr': there is no mesh axis"),
    "mesh over devices": (write(b"abc def " * 500), {"mesh__data": 3}, "needs 3 devices and there are 8"),
    "vocabulary": (write(b"abc def " * 500), {"model__vocab_size": 3}, "tokenizer has .* tokens and the model 3"),
    "no length": (write(b"abc def " * 500), {"steps": None}, "--config.steps"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_error(tmp_path, name):
    """Once it is mended, the same workdir goes on."""
    make, options, says = BAD[name]
    folder = tmp_path / "data"
    folder.mkdir()
    config = tiny("", **options)
    source = make(folder)
    config.data.source = source and str(source)
    with pytest.raises(InputError, match=f"(?is){says}"):
        pretrain(config, str(tmp_path / "run"))
    good = tmp_path / "data" / "good.txt"
    good.write_text("abc def " * 500)
    if name in ("missing", "too short", "no length"):
        with on_one_device():
            assert pretrain(tiny(good, steps=1), str(tmp_path / "run")).finished


def test_a_prompt_for_samples_that_can_not_be_is_refused_before_training(tmp_path):
    """And the message says that it is of samples.prompts, which a config file may have set."""
    path = tmp_path / "text.txt"
    path.write_text("abc def " * 500)
    with pytest.raises(InputError, match="samples.prompts"):
        pretrain(tiny(path, samples__prompts=("\n",)), str(tmp_path / "run"))
    with pytest.raises(InputError):
        pretrain(tiny(path, samples__prompts=("a" * 33,)), str(tmp_path / "run2"))


def test_a_prompt_of_the_config_file_that_can_not_be_is_skipped(tmp_path, monkeypatch, capsys):
    """The preset's "\\n" on text of one line: whoever gave no prompt is not refused for one."""
    path = tmp_path / "text.txt"
    path.write_text("abc def " * 500)
    given = {}
    monkeypatch.setattr(config_flags, "get_override_values", lambda flag: given)
    monkeypatch.setattr(command_line, "flags", types.SimpleNamespace(FLAGS={"config": None}))
    config = tiny(path, steps=1, samples__prompts=("\n", "a", "b" * 33), **CUT)
    assert pretrain(config, str(tmp_path / "run")).finished
    assert {s["prompt"] for s in lines(tmp_path / "run", "samples")} == {"a"}
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: no sample")]
    assert len(said) == 2 and "'\\n'" in said[0] and "33 tokens" in said[1]
    given["samples.prompts"] = ("\n",)
    with pytest.raises(InputError, match="samples.prompts"):
        pretrain(config, str(tmp_path / "given"))


def test_a_tokenizer_too_large_for_its_dtype(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("abc def " * 500)
    with pytest.raises(InputError, match="70000.*uint16.*uint32"):
        prepare(str(path), "bpe:70000", tmp_path / "shards", token_dtype="uint16")


def test_shards_that_do_not_match_their_manifest(text, tmp_path):
    workdir = tmp_path / "run"
    with on_one_device():
        assert pretrain(tiny(text), str(workdir)).finished
        (shard,) = (workdir / "data").glob("*/train-00000.bin")
        content = bytearray(shard.read_bytes())
        content[100] ^= 1
        shard.write_bytes(content)
        said = "train-00000.bin does not have .*hash: delete .*/data/[0-9a-f]{16}, and it"
        with pytest.raises(InputError, match=said):
            pretrain(tiny(text, steps=4), str(workdir))
        shutil.rmtree(workdir / "data")  # as the message says
        assert pretrain(tiny(text, steps=4), str(workdir)).finished
    assert [m["step"] for m in lines(workdir, "metrics")] == [1, 2, 3, 4]


def test_another_runs_workdir(trained, text):
    before = {p: p.stat().st_mtime_ns for p in trained[0].rglob("*")}
    with pytest.raises(InputError, match="holds another run's config(?s:.*)batch_size: saved 8, requested 16"):
        pretrain(tiny(text, batch_size=16), str(trained[0]))
    assert {p: p.stat().st_mtime_ns for p in trained[0].rglob("*")} == before  # nothing lost, nothing written


def test_weights_of_another_run_to_start_from(trained, text, tmp_path):
    """init_from: the first loss is the other run's last, a model of another shape is refused, and once the run has a
    checkpoint it goes on without the other one."""
    base = shutil.copytree(trained[0], tmp_path / "[2026]" / "base")
    same, run = {"init_from": str(base), "eval__batches": 0}, tmp_path / "[2026]" / "run"
    with on_one_device():
        assert pretrain(tiny(text, steps=1, **same), str(run)).finished
        first = lines(run, "evaluations")[0]
        assert first["step"] == 0
        assert first["loss"] == approx(lines(trained[0], "evaluations")[-1]["loss"], terms=TERMS)
        with pytest.raises(InputError, match=r"model.n_layer=2, this run 3"):
            pretrain(tiny(text, model__n_layer=3, **same), str(tmp_path / "other"))
        origin = read_config(run)["origin"]
        assert origin["init_from_step"] == STEPS and len(origin["init_from_weights"]) == 64
        shutil.rmtree(base)
        assert pretrain(tiny(text, steps=2, **same), str(run)).finished
    assert read_config(run)["origin"] == origin


def test_eight_devices_are_what_these_tests_run_on():
    assert jax.device_count() == 8

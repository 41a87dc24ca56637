"""lm-evaluation-harness gives the same result of every request, and the same metrics, with its own model class on an
export (transformers, torch) and with our adapter on the workdir.

Runs in an environment of its own (requirements-peers.txt), offline: the tasks are local files.
"""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from numerics import assert_close, model_terms

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"  # read when they are imported
NEEDS = "needs lm-eval, torch and transformers: pip install -r requirements-peers.txt"
pytest.importorskip("torch", reason=NEEDS)
lm_eval = pytest.importorskip("lm_eval", reason=NEEDS)

import lm_eval_tasks as local  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.metrics import mean_stderr  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402
from test_huggingface import TEXT, random_params  # noqa: E402

from gptjax import convert  # noqa: E402
from gptjax.data.bpe import train_bpe  # noqa: E402
from gptjax.data.chat import chat_tokenizer  # noqa: E402
from gptjax.errors import InputError  # noqa: E402
from gptjax.generation.sampling import Sampling  # noqa: E402
from gptjax.interop import huggingface  # noqa: E402
from gptjax.lm_eval.__main__ import main  # noqa: E402
from gptjax.lm_eval.adapter import GPTJAX, Generation  # noqa: E402
from gptjax.model.spec import GPTConfig  # noqa: E402
from gptjax.parallel.mesh import MeshConfig, make_mesh  # noqa: E402
from gptjax.tasks import harness  # noqa: E402
from gptjax.tasks.generate import Continuation  # noqa: E402
from gptjax.tasks.task import load_task  # noqa: E402
from gptjax.trained import load_model  # noqa: E402

CONTEXT = 96


def exported(folder, template=None):
    tokenizer = train_bpe([*TEXT, " ".join(local.WORDS) + " Zoë"] * 2, 330)
    tokenizer = chat_tokenizer(tokenizer) if template else tokenizer
    config = GPTConfig(tokenizer.vocab_size, 2, 2, 32, CONTEXT)
    params = random_params(config, seed=1)
    params["wte"] *= 0.3  # far from uniform, so that an error is seen, and yet no text repeats one token
    begins = [tokenizer.decode([i]).startswith(" ") for i in range(tokenizer.vocab_size)]
    params["wte"][~np.array(begins)] *= 0.1  # it writes whole words: what it writes is encoded as it was written
    huggingface.write(folder / "hf", config, params, tokenizer, template=template)
    convert.import_weights(folder / "hf", folder / "run")
    return folder / "hf", folder / "run"


def on_one_device(ours, run):
    """Programs for the eight virtual devices of the tests take longer to compile; the command's test has them."""
    ours.model = load_model(run, mesh=make_mesh(MeshConfig(), jax.devices()[:1]))
    return ours


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    hf, run = exported(folder)
    theirs = HFLM(pretrained=str(hf), dtype="float32", batch_size=4, device="cpu")
    ours = on_one_device(GPTJAX(run, batch_size=3), run)

    def written(contexts):
        return [ours.generate_until([Instance("generate_until", {}, (c, {"until": [], "max_gen_toks": 1}), 0)])[0]
                for c in contexts]  # fmt: skip

    local.write(folder / "tasks", written)
    return theirs, ours, folder


@pytest.fixture(scope="module")
def manager(models):
    return TaskManager(include_path=str(models[2] / "tasks"), include_defaults=False)


def results(model, manager, task, shots=0):
    return lm_eval.simple_evaluate(model=model, tasks=[f"{task}_local"], num_fewshot=shots, task_manager=manager,
                                   log_samples=True, bootstrap_iters=0, verbosity="ERROR")  # fmt: skip


def responses(found, task):
    """All of a task's answers to requests, in order."""
    samples = found["samples"][f"{task}_local"]
    return [r for s in sorted(samples, key=lambda s: s["doc_id"]) for r in s["resps"]]


LIKELIHOOD = [("piqa", 0), ("piqa", 5), ("hellaswag", 0), ("hellaswag", 2), ("winogrande", 0), ("blimp", 0),
              ("lambada", 0), ("lambada", 3), ("arithmetic", 0), ("wikitext", 0)]  # fmt: skip


@pytest.mark.parametrize("task, shots", LIKELIHOOD)
def test_every_request_and_metric_is_the_same(models, manager, task, shots):
    theirs, ours = (results(model, manager, task, shots) for model in models[:2])
    a, b = (np.array(responses(found, task), dtype=object).reshape(-1) for found in (ours, theirs))
    scored = lambda values: np.array([v for v in values.tolist() if not isinstance(v, bool)], float)
    greedy = [[v for v in values.tolist() if isinstance(v, bool)] for values in (a, b)]
    assert greedy[0] == greedy[1] and len(scored(a)) == len(scored(b)) >= 12
    if task in ("lambada", "arithmetic") and not shots:
        assert 0.3 < np.mean(greedy[0]) < 0.9
    terms = model_terms(models[1].model.config, time=CONTEXT)
    assert_close(scored(a), scored(b), terms=terms)
    print(task, shots, "largest relative difference", np.abs(scored(a) / scored(b) - 1).max())
    assert np.abs(scored(a) / scored(b) - 1).max() < 1e-6
    same_metrics(ours["results"][f"{task}_local"], theirs["results"][f"{task}_local"])


def same_metrics(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if isinstance(value, float):
            assert ours[name] == pytest.approx(value, rel=2e-5), name
        else:
            assert ours[name] == value, name


def test_what_the_tasks_above_cover(models, manager):
    """Several tokens a choice, items beyond the context, texts of several windows: or the test above shows less."""
    _, ours, folder = models
    encode = ours.model.tokenizer.encode
    rows = lambda task: [json.loads(line) for line in open(folder / "tasks" / f"{task}.jsonl", encoding="utf-8")]
    assert sum(len(encode(row["text"])) > CONTEXT + 1 for row in rows("lambada")) >= 2
    assert max(len(encode(row["page"])) for row in rows("wikitext")) > 3 * CONTEXT
    assert np.mean([len(encode(end)) for row in rows("hellaswag") for end in row["endings"]]) > 5


@pytest.mark.parametrize("task", ["gsm8k", "everything"])
def test_greedy_text_is_the_same(models, manager, task):
    theirs, ours = (responses(results(model, manager, task), task) for model in models[:2])
    assert ours == theirs and len({text for (text,) in ours}) > 6
    if task == "gsm8k":
        assert sum(len(text) < 40 for (text,) in ours) >= 4  # some ended at a stop string, or nothing was tested


# --- our own harness --------------------------------------------------------------------------------------

OURS = {
    "hellaswag": ('kind = "choice"\nmetric = "acc_norm"\n[[form]]\ncontext = "{ctx}"\nchoices = "endings"\n'
                  'gold = "{label}"\n', {"acc": "acc", "acc_norm": "acc_norm", "acc_bytes": "acc_bytes"}),
    "piqa": ('kind = "choice"\nmetric = "acc"\n[[form]]\ncontext = "Question: {goal}\\nAnswer:"\n'
             'choices = ["{sol1}", "{sol2}"]\ngold = "{label}"\n', {"acc": "acc", "acc_norm": "acc_norm"}),
    "arithmetic": ('kind = "cloze"\nmetric = "acc"\ndelimiter = ""\n[[form]]\ncontext = "{context}"\n'
                   'answer = "{completion}"\n', {"acc": "acc", "perplexity": "perplexity"}),
    "wikitext": ('kind = "text"\nmetric = "word_perplexity"\nunits = "gptjax.tasks.detokenize:lm_eval_words"\n'
                 '[[form]]\ntext = "{page}"\n',
                 {name: name for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")}),
}  # fmt: skip


@pytest.mark.parametrize("task", OURS)
def test_our_harness_gives_the_same_numbers(models, manager, tmp_path, task):
    _, ours, folder = models
    keys, names = OURS[task]
    path = tmp_path / f"{task}.toml"
    path.write_text(f'about = "as the local task"\n{keys}')
    found = harness.evaluate(harness.scorer(ours.model), load_task(str(path)), str(folder / f"tasks/{task}.jsonl"))
    reference = results(ours, manager, task)
    for name, theirs in names.items():
        value = reference["results"][f"{task}_local"][f"{theirs},none"]
        assert found.metrics[name][0] == pytest.approx(value, rel=1e-6), name
        if theirs.startswith("acc"):
            error = mean_stderr([sample[theirs] for sample in reference["samples"][f"{task}_local"]])
            assert found.metrics[name][1] == pytest.approx(error, rel=1e-6), name


# --- chat templates ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chat_models(tmp_path_factory):
    hf, run = exported(tmp_path_factory.mktemp("chat"), template="chat")
    ours = on_one_device(GPTJAX(run), run)
    return HFLM(pretrained=str(hf), dtype="float32", batch_size=4, device="cpu"), ours


HISTORY = [{"role": "system", "content": "be kind."}, {"role": "user", "content": "the cat?\n"},
           {"role": "assistant", "content": "sat"}, {"role": "user", "content": " and  then"}]  # fmt: skip


@pytest.mark.parametrize("history, prompts", [(HISTORY, True), (HISTORY[1:2], True), (HISTORY[1:3], False)])
def test_a_conversation_is_rendered_and_read_as_transformers_does(chat_models, history, prompts):
    theirs, ours = chat_models
    text = ours.apply_chat_template(history, add_generation_prompt=prompts)
    assert text == theirs.apply_chat_template(history, add_generation_prompt=prompts)
    assert ours._tokenizer(text).encode(text) == theirs.tok_encode(text)
    assert ours.chat_template(True) == theirs.chat_template(True)
    requests = [Instance("loglikelihood", {}, (text, " a mat"), 0), Instance("loglikelihood", {}, (text, "sat"), 1)]
    terms = model_terms(ours.model.config, time=CONTEXT)
    a, b = (np.array([v for v, _ in model.loglikelihood(requests)]) for model in chat_models[::-1])
    assert_close(a, b, terms=terms)
    settings = {"until": ["cat"], "max_gen_toks": 12}
    a, b = (model.generate_until([Instance("generate_until", {}, (text, settings), 0)]) for model in chat_models)
    assert a == b


def test_a_model_without_a_chat_template_says_so(models, chat_models):
    with pytest.raises(InputError, match="leave out --apply_chat_template"):
        models[1].apply_chat_template(HISTORY)
    with pytest.raises(InputError, match=r"has <\|user\|> in its text"):
        chat_models[1].apply_chat_template([{"role": "user", "content": "a <|user|> b"}])
    assert chat_models[1].tokenizer_name != models[1].tokenizer_name


# --- generation settings ----------------------------------------------------------------------------------


def test_generation_settings():
    of = lambda **kwargs: Generation.of(kwargs, 64)
    sampling = lambda **kwargs: of(**kwargs).continuation.sampling
    # 256, the harness's default, is clipped
    assert of(until="a") == Generation(Continuation(("a",), 32, Sampling(0.0)), 32)
    assert of(max_gen_toks=8, until=["", "b"]) == Generation(Continuation(("b",), 8, Sampling(0.0)), 56)
    assert of(max_gen_toks=63).room == 1 and of(max_new_tokens=64).continuation.max_new_tokens == 32
    assert sampling(do_sample=True, top_k=5, max_gen_toks=8) == Sampling(1.0, 5, 1.0)
    assert sampling(temperature=0.7, top_p=0.9) == Sampling(0.7, 0, 0.9)
    assert sampling(temperature=0.7, do_sample=False) == Sampling(0.0)
    with pytest.raises(InputError, match="num_beams=4 is not supported"):
        of(num_beams=4)
    assert sampling(num_beams=1, repetition_penalty=1.0).greedy


def test_sampled_text_differs_between_repeats(models):
    _, ours, _ = models
    settings = {"until": ["345"], "max_gen_toks": 40, "do_sample": True, "temperature": 1.0, "top_k": 20}
    request = lambda context: Instance("generate_until", {}, (context, settings), 0)
    texts = ours.generate_until([request("the cat")] * 7 + [request("a " * 300), request("")])
    assert len(set(texts)) >= 8 and not any("345" in text for text in texts)
    ours.batch_size, batch_size = 2, ours.batch_size
    again = ours.generate_until([request("the cat")] * 7 + [request("a " * 300), request("")])
    ours.batch_size = batch_size
    assert again == texts


# --- the command and the registry -------------------------------------------------------------------------


def test_the_harness_keeps_its_own_models():
    code = (
        "import gptjax.lm_eval.adapter as a; from lm_eval.api.registry import get_model\n"
        "assert get_model('gptjax') is a.GPTJAX; print(get_model('hf').__name__, get_model('dummy').__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.split() == ["HFLM", "DummyLM"], done.stderr


def test_the_command_is_the_harness_s_own(models, tmp_path, capsys, monkeypatch):
    _, ours, folder = models
    monkeypatch.setattr(sys, "argv", [])
    arguments = [f"--model_args=workdir={folder / 'run'},dtype=float32", "--tasks=piqa_local,wikitext_local",
                 f"--include_path={folder / 'tasks'}", "--num_fewshot=0", f"--output_path={tmp_path / 'out.json'}",
                 "--limit=5"]  # fmt: skip
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "gptjax" in out and "acc_norm" in out and "word_perplexity" in out
    (path,) = tmp_path.glob("out*.json")
    found = json.loads(path.read_text())["results"]
    assert 0 <= found["piqa_local"]["acc,none"] <= 1 and found["wikitext_local"]["word_perplexity,none"] > 1
    assert main(["--model_args=workdir=/nowhere", "--tasks=piqa_local", f"--include_path={folder / 'tasks'}"]) == 2
    assert "error: " in capsys.readouterr().err

"""gptjax's published tasks on our model against lm-evaluation-harness's own task files on its own model class: the same
random weights, the same made-up rows, the same numbers."""

import math
import os
import tempfile
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from gptjax import convert, json_files
from gptjax.data.bpe import train_bpe
from gptjax.interop import huggingface
from gptjax.model import gpt
from gptjax.model.spec import GPTConfig
from gptjax.tasks import harness
from gptjax.tasks.task import load_task
from gptjax.trained import load_model

# Ours, the harness's file, {our metric: its metric}.
TASKS = {
    "lambada": ("lambada/lambada_openai.yaml", {"acc": "acc", "perplexity": "perplexity"}),
    "hellaswag": ("hellaswag/hellaswag.yaml", {"acc": "acc", "acc_norm": "acc_norm"}),
    "wikitext": (
        "wikitext/wikitext.yaml",
        {name: name for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")},
    ),
    "piqa": ("piqa/piqa.yaml", {"acc": "acc", "acc_norm": "acc_norm"}),
    "winogrande": ("winogrande/default.yaml", {"acc": "acc"}),
}
RELATIVE = 1e-6  # of a metric; float32's roundings in the model come to 6e-8, with weights twice as large to 7.5e-7
WORDS = (
    "the cat sat on a mat and ran to its naïve café where 345 dogs jump over foxes quickly ; it is 東京 's [title] "
    "@-@ Zoë , they were late . ( so ) he said \" no \" — and , then , left"
).split()


class Agreement(NamedTuple):
    task: str
    metric: str
    ours: float
    theirs: float


def compare(items: int = 24, seed: int = 0) -> list[Agreement]:
    """Every metric of every task, computed both ways. AssertionError: two differ."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder, seed)
        for task, rows in made_rows(np.random.default_rng(seed), items).items():
            json_files.write_json_lines(folder / f"{task}.jsonl", rows)
        ours, theirs = our_metrics(folder), their_metrics(folder)
    found = [
        Agreement(task, metric, ours[task][metric][0], theirs[task][f"{name},none"])
        for task, (_, names) in TASKS.items()
        for metric, name in names.items()
    ]
    for a in found:
        assert math.isclose(a.ours, a.theirs, rel_tol=RELATIVE), a
    return found


def table(found: list[Agreement]) -> str:
    lines = [f"{'task':<12}{'metric':<18}{'gptjax':>16}{'lm-eval, hf':>16}{'relative difference':>22}"]
    for task, metric, ours, theirs in found:
        apart = abs(ours / theirs - 1) if theirs else 0.0
        lines.append(f"{task:<12}{metric:<18}{ours:>16.7g}{theirs:>16.7g}{apart:>22.1e}")
    return "\n".join(lines)


def make_model(folder: Path, seed: int):
    """A GPT-2 of random weights, as Hugging Face's files (hf) and as a workdir (run)."""
    tokenizer = train_bpe([" ".join(WORDS)] * 3, 400)
    config = GPTConfig(tokenizer.vocab_size, 2, 2, 32, 96)
    params = jax.jit(lambda key: gpt.init(config, key))(jax.random.key(seed))
    params = jax.tree.map(lambda p: np.asarray(p) * (3 if p.ndim > 1 else 1), params)  # far from init's
    huggingface.write(folder / "hf", config, params, tokenizer)
    convert.import_weights(folder / "hf", folder / "run")


def our_metrics(folder: Path) -> dict:
    scorer = harness.scorer(load_model(folder / "run"))
    return {task: harness.evaluate(scorer, load_task(task), str(folder)).metrics for task in TASKS}


def their_metrics(folder: Path) -> dict:
    """By lm-evaluation-harness: its task files, with local rows in place of its data sets."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    root, tasks = Path(lm_eval.__file__).parent / "tasks", folder / "tasks"
    tasks.mkdir()
    for task, (file, _) in TASKS.items():
        (tasks / f"{task}.yaml").write_text(
            f"include: {root / file}\ntask: {task}_local\ndataset_path: json\ndataset_name: null\ndataset_kwargs:\n"
            f"  data_files:\n    test: {folder / f'{task}.jsonl'}\ntraining_split: null\nvalidation_split: null\n"
            f"test_split: test\ntag: null\n"
        )
    found = lm_eval.simple_evaluate(
        model=HFLM(pretrained=str(folder / "hf"), dtype="float32", device="cpu", batch_size=8),
        tasks=[f"{task}_local" for task in TASKS],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
    )
    return {task: found["results"][f"{task}_local"] for task in TASKS}


def made_rows(rng: np.random.Generator, n: int) -> dict[str, list[dict]]:
    """Rows in the form in which each task's data is published."""

    def text(low: int, high: int) -> str:
        return " ".join(rng.choice(WORDS, rng.integers(low, high)))

    def hellaswag():
        a, b = text(3, 8), text(1, 4)
        return {"activity_label": "Ice skating", "ctx_a": a, "ctx_b": b, "ctx": f"{a} {b.capitalize()}",
                "endings": [text(2, 9) for _ in range(4)], "label": str(rng.integers(4))}  # fmt: skip

    return {
        "lambada": [{"text": text(*((5, 20) if i % 8 else (60, 90)))} for i in range(n)],
        "hellaswag": [hellaswag() for _ in range(n)],
        "wikitext": [{"page": f" = {text(1, 3)} = \n\n {text(9 + 9 * i, 15 + 9 * i)} \n"} for i in range(n)],
        "piqa": [{"goal": text(3, 8), "sol1": text(1, 6), "sol2": text(1, 6), "label": int(rng.integers(2))}
                 for _ in range(n)],
        "winogrande": [{"sentence": f"{text(2, 6)} _ {text(2, 6)}.", "option1": text(1, 2), "option2": text(1, 3),
                        "answer": str(rng.integers(1, 3))} for _ in range(n)],
    }  # fmt: skip

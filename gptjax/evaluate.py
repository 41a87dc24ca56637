"""Loss, perplexity and bits per byte of a trained model on any text; or its zero- and few-shot skill on tasks.

    python -m gptjax.evaluate --workdir=runs/x [--source=PATH] [--stride=256] [--per_document] [--json]
    python -m gptjax.evaluate --workdir=runs/x --tasks=lambada,piqa,my.toml --data=DIR [--num_fewshot=0,1,8]
        [--every_checkpoint] [--log_samples] [--limit=100] [--compare=runs/sft/tasks] [--json]
    python -m gptjax.evaluate --workdir=runs/x --suite=bias --data=DIR [--samples=100]

With --tasks: each task's rows are looked for in --data; the table has every metric with its standard error, and
<workdir>/tasks/tasks.json (--out) the protocol too: templates, normalization, prefix token, what was cut. A task is a
small file, published ones in gptjax/tasks/published, the format in gptjax/tasks/task.py. --tasks=superglue is its
eight tasks and, wherever all eight are evaluated, their score. --every_checkpoint draws skill over training. For
choices reliability diagrams are drawn too, with those of --compare in the same picture (before and after RLHF).
--suite=bias is the bias benchmarks and GPT-3's probes (gptjax/tasks/bias.py), of those whose files are in --data.

Without --tasks and without --source: the validation split the run held out; of a mixture each part's and the mean under
its weights. With --source: every document of it, told apart and joined as in training. Each token is scored once; the
first one is predicted from end-of-text, as documents begin in training, and is counted as unscored where the tokenizer
has none.
"""

import contextlib
import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from gptjax import command_line, json_files, paths
from gptjax.console import progress
from gptjax.data import sources
from gptjax.data.corpus import Part, Text, pretraining_text
from gptjax.data.records import documents_within, isolates_documents
from gptjax.data.tokens import around
from gptjax.errors import InputError
from gptjax.evals import superglue
from gptjax.evals.lm import evaluation_sums
from gptjax.objectives.lm import causal_lm_loss
from gptjax.parallel.mesh import batch_shards
from gptjax.parallel.sharding import batch_sharding
from gptjax.tasks import harness, table
from gptjax.tasks.bias import SUITE as BIAS
from gptjax.tasks.files import task_files
from gptjax.tasks.harness import Result
from gptjax.tasks.task import Task, load_task
from gptjax.trained import Model, load_model
from gptjax.training.checkpoint import Checkpointer
from gptjax.training.step import jit_eval_step

SUITES = {"bias": BIAS}


def score(model: Model, text: Text, rows: int, *, stride: int | None = None, per_document: bool = False,
          loss_chunk: int = 128) -> dict:  # fmt: skip
    """{'loss' nats/token, 'perplexity', 'bits_per_byte', 'tokens', 'tokens_unscored', 'bytes', 'step'} on a text's
    validation tokens; of a mixture the means under its weights, and 'loss/<name>' of each part.

    rows: sequences at a time. stride, per_document: as validation.Scored has stride and documents.
    """
    loss = causal_lm_loss(model.config, model.dtype, loss_chunk, model.mesh)
    step, sharding = jit_eval_step(loss, model.mesh), batch_sharding(model.mesh, 0)
    documents = document_spans if per_document else None
    batches = text.validation_batches(model.config.context_length, rows, stride=stride, documents=documents)
    with jax.set_mesh(model.mesh):
        sums = {name: evaluation_sums(step, model.params, part, sharding) for name, part in batches.items()}
    figures = text.figures(sums)
    mean = figures.pop("loss")
    return {
        "loss": mean,
        "perplexity": math.exp(mean) if mean < 709 else mean * math.inf,  # e^710 is more than a float holds
        "bits_per_byte": figures.pop("bits_per_byte"),
        "tokens": figures["tokens"],
        "tokens_unscored": sum(len(part.validation) for part in text.parts) - figures.pop("tokens"),
        "bytes": round(sum(p.validation.byte_ratio * sums[p.name][2]["target_bytes"] for p in text.parts)),
        **figures,
        "step": model.step,
    }


def main(_):
    if FLAGS.tasks or FLAGS.suite:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for the result
            results = _evaluate_tasks()
        print(json_files.dumps([r.record() for _, r in results]) if FLAGS.json else _tables(results))
        return
    with contextlib.redirect_stdout(sys.stderr):
        result = _evaluate()
    if FLAGS.json:
        print(json_files.dumps(result))
    else:
        width = max(14, *map(len, result))
        for name, value in result.items():
            print(f"{name:>{width}}  {value:,.4f}" if isinstance(value, float) else f"{name:>{width}}  {value:,}")


def _evaluate() -> dict:
    model = load_model(FLAGS.workdir, step=FLAGS.step)
    rows = -(-FLAGS.batch_size // batch_shards(model.mesh.shape)) * batch_shards(model.mesh.shape)
    if FLAGS.source is None:
        try:
            text = pretraining_text(FLAGS.workdir)
        except InputError as error:
            raise InputError(
                f"The text this workdir was trained on is not at hand ({error}): give --source=PATH."
            ) from error
    else:
        text = source_text(
            FLAGS.source, model.tokenizer, FLAGS.text_field, isolates_documents(FLAGS.workdir),
            **documents_within(FLAGS.workdir),
        )  # fmt: skip
    return score(model, text, rows, stride=FLAGS.stride, per_document=FLAGS.per_document)


def _evaluate_tasks() -> list[tuple[int, Result]]:
    """(step, result) of every checkpoint asked for, task and number of examples."""
    given = FLAGS.tasks or []
    names = [each for name in given for each in (superglue.METRICS if name == "superglue" else [name])]
    tasks = [load_task(name) for name in dict.fromkeys(names)]
    if twice := [task.name for i, task in enumerate(tasks) if task.name in {other.name for other in tasks[:i]}]:
        raise InputError(f"--tasks has two files of the name {twice[0]!r}, as their results would have: rename one.")
    for task in tasks:  # a missing file is known before hours of computing
        task_files(task, FLAGS.data)
    if FLAGS.suite:
        tasks += [task for task in suite(SUITES[FLAGS.suite], FLAGS.data) if task.name not in names]
    if FLAGS.allow_code_execution:
        tasks = [dataclasses.replace(task, allow_code_execution=True) for task in tasks]
    if FLAGS.samples:
        tasks = [dataclasses.replace(task, samples=FLAGS.samples) if task.samples > 1 else task for task in tasks]
    shots = shots_of(FLAGS.num_fewshot)
    asked = [(task, k) for task in tasks for k in (shots if task.takes_examples else [0])]
    steps = Checkpointer(FLAGS.workdir).steps() if FLAGS.every_checkpoint else [FLAGS.step]
    folder = Path(paths.local(FLAGS.out or f"{FLAGS.workdir}/tasks"))
    results = evaluate_checkpoints(
        FLAGS.workdir, steps or [None], asked, FLAGS.data, folder, rows=FLAGS.batch_size, limit=FLAGS.limit,
        seed=FLAGS.seed, log_samples=FLAGS.log_samples,
    )  # fmt: skip
    if FLAGS.every_checkpoint:
        table.plot_over_steps(results, folder / "tasks.png")
    table.plot_reliability([*map(Path, FLAGS.compare), folder], folder / "reliability.png")
    print(f"written to {folder}")
    return results


def evaluate_checkpoints(
    workdir, steps: Sequence[int | str | None], asked: Sequence[tuple[Task, int]], data: str, folder: Path, *,
    rows: int = 16, limit: int | None = None, seed: int = 0, log_samples: bool = False,
) -> list[tuple[int, Result]]:  # fmt: skip
    """(step, result) of each checkpoint and of each task with its number of examples; written to folder/tasks.json
    (table.write) after each. SuperGLUE's score is one more, where all eight tasks are there.

    steps: as of trained.load_model. asked: (task, examples). rows: computed at a time. The others as of
    harness.evaluate, whose InputError says which task and what is kept.
    """
    results = []
    for step in steps:
        model = load_model(workdir, step=step)
        about = {"workdir": str(workdir), "weights": model.weights, "dtype": jnp.dtype(model.dtype).name}
        score = harness.scorer(model, rows=rows, seed=seed)
        for task, k in asked:
            print(f"step {model.step:,}: {task.name}, {k}-shot")
            try:
                result = harness.evaluate(score, task, data, shots=k, limit=limit, seed=seed)
            except InputError as error:
                n = len(results)
                before = "The result before it is" if n == 1 else f"The {n} results before it are"
                kept = f" {before} in {folder / 'tasks.json'}." if n else ""
                raise InputError(f"{task.name}, {k}-shot: {error}{kept}") from error
            results.append((model.step, result))
            table.write(results, folder, about, log_samples)
        for k in dict.fromkeys(k for _, k in asked):
            of_k = [result for step, result in results if (step, result.shots) == (model.step, k)]
            if score_of_eight := harness.superglue_result(of_k):
                results.append((model.step, score_of_eight))
                table.write(results, folder, about, log_samples=False)
    return results


def suite(names: Sequence[str], data: str | None) -> list[Task]:
    """The tasks of a suite whose files are in the folder `data`; prints which others are left out, and why. InputError:
    there is no folder, or none of their files in it."""
    if data is None or not Path(paths.local(data)).is_dir():
        raise InputError("--suite needs --data=DIR, the folder with the files of its tasks.")
    found, missing = [], []
    for task in map(load_task, names):
        try:
            task_files(task, data)
            found.append(task)
        except InputError as error:
            missing.append(f"{task.name} is left out: {error}")
    if all(task.rows for task in found):
        raise InputError("\n".join([f"{data} has no file of the suite.", *missing]))
    print("\n".join(missing), end="\n" * bool(missing))
    return found


def shots_of(given: list[str]) -> list[int]:
    """--num_fewshot as numbers, each once. InputError: one is not a whole number from 0 on, or there is none."""
    if not given or not all(k.isascii() and k.isdigit() for k in given):
        raise InputError(f"--num_fewshot={','.join(given)}: give whole numbers from 0 on, with commas between.")
    return list(dict.fromkeys(map(int, given)))


def _tables(results: list[tuple[int, Result]]) -> str:
    steps = dict.fromkeys(step for step, _ in results)
    return "\n\n".join(f"step {step:,}\n{table.table([r for s, r in results if s == step])}" for step in steps)


def source_text(source: str, tokenizer, text_field: str, isolate_documents: bool = False, *,
                document_separator: str | None = None, split: str | None = None) -> Text:  # fmt: skip
    """A source as a text to score. document_separator, split: records.documents_within."""
    documents = sources.documents(source, text_field=text_field, separator=document_separator, lines=split == "lines")
    shards = TokensInMemory(documents, tokenizer)
    return Text(tokenizer, (Part("", 1.0, shards, shards),), isolate_documents, {})


class TokensInMemory:
    """Documents as tokens.TokenShards has them, not on disk: 4 bytes a token.

    spans: int64 [documents, 2], first and last + 1 token of each."""

    def __init__(self, documents, tokenizer):
        ids, spans, n_bytes, total = [], [], 0, 0
        for document in progress(documents, desc="tokenizing", unit="doc"):
            before, after = around(tokenizer, first=not ids)
            ids.append(np.array(before + tokenizer.encode(document.text) + after, np.int32))
            n_bytes += len(document.text.encode()) + int(tokenizer.byte_lengths[before + after].sum())
            spans.append((total + len(before), total + len(ids[-1])))
            total += len(ids[-1])
        self._ids, self.spans = np.concatenate(ids), np.array(spans, np.int64)
        self.eot_id, self.vocab_size = tokenizer.eot_id, tokenizer.vocab_size
        of_tokens = int(tokenizer.byte_lengths[self._ids].sum(dtype=np.int64))
        self.byte_ratio = 1.0 if tokenizer.lossless else n_bytes / max(of_tokens, 1)

    def __len__(self):
        return len(self._ids)

    def read(self, starts, length):
        """int32 [n, length]: the `length` tokens from each of starts."""
        return self._ids[np.asarray(starts)[:, None] + np.arange(length)]


def document_spans(shards) -> np.ndarray:
    """int64 [documents, 2]: first and last + 1 token of each. InputError: a split that does not tell them apart."""
    if isinstance(shards, TokensInMemory):
        return shards.spans
    if shards.eot_id is None:
        raise InputError(
            "The tokenizer has no end-of-text, so that the documents of the validation split cannot be told apart: "
            "give the text itself with --source=PATH."
        )
    block = 1 << 22
    pieces = [shards.read(np.array([i]), min(block, len(shards) - i))[0] for i in range(0, len(shards), block)]
    ends = 1 + np.concatenate([i * block + np.flatnonzero(p == shards.eot_id) for i, p in enumerate(pieces)])
    ends = ends if len(ends) and ends[-1] == len(shards) else np.append(ends, len(shards))
    return np.stack([np.concatenate([[0], ends[:-1]]), ends], axis=1)


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    command_line.define_path("workdir", None, "A training run's workdir.")
    command_line.define_path("source", None, "Text to score: a file, a directory, JSONL, Parquet, ...")
    flags.DEFINE_string("text_field", "text", "Field of JSONL and Parquet rows.")
    flags.DEFINE_integer("batch_size", 16, "Sequences at a time.", lower_bound=1)
    command_line.define_step()
    flags.DEFINE_integer(
        "stride", None, "Tokens between windows, so that a token has at least context - stride tokens before it; the "
        "context if not given.", lower_bound=1,
    )  # fmt: skip
    flags.DEFINE_bool("per_document", False, "Score each document by itself, not what was joined.")
    flags.DEFINE_bool("json", False, "JSON instead of a table.")
    flags.DEFINE_list("tasks", None, "Names of tasks, or .toml files; superglue is eight of them and their score.")
    flags.DEFINE_enum("suite", None, list(SUITES), "Tasks that belong together, of those whose files are in --data.")
    command_line.define_path("data", None, "The folder with the tasks' files, or a single file.")
    flags.DEFINE_list("num_fewshot", ["0"], "Examples in a prompt; several with commas. Whole texts have none.")
    flags.DEFINE_integer("limit", None, "Only the first so many items of a task.", lower_bound=1)
    flags.DEFINE_integer("samples", None, "Texts for a prompt, of tasks that sample several.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Which examples are drawn, and samples.", lower_bound=0)
    flags.DEFINE_bool("every_checkpoint", False, "Every checkpoint on disk, and a picture of skill over training.")
    flags.DEFINE_bool("log_samples", False, "Write a record of each item.")
    command_line.define_path("out", None, "Folder for the results of tasks; WORKDIR/tasks if not given.")
    flags.DEFINE_list("compare", [], "Folders with other models' results, drawn into the same reliability diagrams.")
    flags.DEFINE_bool("allow_code_execution", False, "Run programs that the model wrote (tasks of kind code).")
    flags.mark_flag_as_required("workdir")
    command_line.run(main)

"""The sentiment unit: a linear probe of the state that a language model is in at the end of a text.

    python -m experiments.sentiment_unit --workdir=runs/mlstm --train=train.csv --test=test.csv [--valid=dev.csv] \
        --text_field=sentence --output=runs/mlstm/sentiment

Radford, Jozefowicz & Sutskever 2017: the features of a text are tanh of the cell of a (multiplicative) LSTM after
'\\n ' + text + ' '; a logistic regression with an L1 penalty, its C in 2^-8 .. 2^0 chosen on validation, tells positive
from negative. Of a GPT they are the hidden state at the last token, of texts longer than the context those tokens'
that fit. Rows have a text and a label 0 or 1. Writes results.json and unit.png: the values of the unit that matters
most, by label. The study has 91.8 % on SST of all 4,096 units; its one unit alone has 92.3 % on IMDB.
"""

import html
import sys
from pathlib import Path

import jax
import numpy as np
from absl import flags

from experiments.sentiment_unit import probe
from gptjax import command_line, console, json_files
from gptjax.data import sources
from gptjax.data.rows import Record
from gptjax.distributed import hosts
from gptjax.errors import InputError
from gptjax.model import architecture, lstm
from gptjax.model.lstm import LSTMConfig
from gptjax.parallel.mesh import batch_shards
from gptjax.parallel.sharding import batch_sharding
from gptjax.trained import Model, load_model

WIDTH = 64  # texts are padded to a multiple of so many tokens


def read(source: str, text_field: str, label_field: str) -> tuple[list[str], np.ndarray]:
    """(texts, labels 0 or 1). InputError: another label, or a row without one."""
    texts, labels = [], []
    for row in sources.rows(source):
        try:
            record = Record(row.value, {"text": text_field, "label": label_field}, None)
            text, label = record["text"], str(record["label"])
        except InputError as error:
            raise InputError(f"{row.where}: {error}") from None
        if label not in ("0", "1"):
            raise InputError(f"{row.where}: the label {label!r} is neither 0 nor 1: leave the row out.")
        texts.append(str(text))
        labels.append(int(label))
    return texts, np.array(labels)


def prepared(text: str) -> str:
    """As the released code prepares a text."""
    return f"\n {html.unescape(text).replace(chr(10), ' ').strip()} "


def features(model: Model, texts: list[str], rows: int) -> np.ndarray:
    """float32 [N, D] of the texts, `rows` of them at a time, those of like lengths together."""
    ids = [model.tokenizer.encode(prepared(text)) for text in texts]
    if not isinstance(model.config, LSTMConfig):
        ids = [tokens[-model.config.context_length :] for tokens in ids]
    last = jax.jit(lambda params, tokens, lengths: last_state(model, params, tokens, lengths))
    rows = -(-rows // batch_shards(model.mesh.shape)) * batch_shards(model.mesh.shape)
    order, found = np.argsort([len(tokens) for tokens in ids], kind="stable"), [None] * len(ids)
    sharding = batch_sharding(model.mesh, 0)
    with jax.set_mesh(model.mesh):
        for first in console.progress(range(0, len(order), rows), desc="states", unit="batch"):
            some = order[first : first + rows]
            width = -(-max(len(ids[i]) for i in some) // WIDTH) * WIDTH
            width = width if isinstance(model.config, LSTMConfig) else min(width, model.config.context_length)
            tokens, lengths = np.zeros((rows, width), np.int32), np.ones(rows, np.int32)
            for row, i in enumerate(some):
                tokens[row, : len(ids[i])], lengths[row] = ids[i], len(ids[i])
            batch = (hosts.global_array(a, sharding) for a in (tokens, lengths))
            for i, state in zip(some, np.asarray(last(model.params, *batch)), strict=False):
                found[i] = state
    return np.stack(found)


def last_state(model: Model, params, tokens_BT, lengths_B):
    """float32 [B, D]: tanh of the cell, or a GPT's hidden state, after the last token."""
    if isinstance(model.config, LSTMConfig):
        _, x_BTD = lstm.states(params, model.config, tokens_BT, dtype=model.dtype)
        x_BTD = jax.numpy.tanh(x_BTD)
    else:
        x_BTD = architecture.hidden(params, model.config, tokens_BT, dtype=model.dtype, mesh=model.mesh)
    return jax.numpy.take_along_axis(x_BTD, (lengths_B - 1)[:, None, None], 1)[:, 0].astype(np.float32)


def study(train, valid, test) -> tuple[dict, int]:
    """(figures, the unit that matters most) of (features [N, D], labels [N]) each."""
    (x_ND, y_N), (x_test_ND, y_test_N) = train, test
    found = probe.path(x_ND, y_N, *valid)
    C, fit, _ = max(found, key=lambda one: one[2])  # of equals the smallest C
    w_D = np.asarray(fit.w_D)
    unit = int(np.abs(w_D * x_ND.std(0)).argmax())  # how far it moves the logit
    threshold = probe.best_threshold(x_ND[:, unit], y_N)
    share = probe.accuracy(x_test_ND, y_test_N, fit)
    return {
        "accuracy": share,
        "accuracy_stderr": float(np.sqrt(share * (1 - share) / max(len(y_test_N) - 1, 1))),
        "majority": float(max(y_test_N.mean(), 1 - y_test_N.mean())),
        "C": C,
        "nonzero": int((w_D != 0).sum()),
        "features": len(w_D),
        "unit": unit,
        "unit_weight": float(w_D[unit]),
        "unit_threshold": threshold.at,
        "unit_accuracy": threshold.accuracy(x_test_ND[:, unit], y_test_N),
        "violation": float(fit.violation),
        "path": [{"C": c, "valid_accuracy": a, "nonzero": int((np.asarray(f.w_D) != 0).sum())} for c, f, a in found],
        "examples": [len(y_N), len(valid[1]), len(y_test_N)],
    }, unit


def picture(values_N, y_N, threshold: float, title: str, path: Path):
    """A histogram of a unit's values for each label."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 3.2), constrained_layout=True)
    edges = np.linspace(values_N.min(), values_N.max(), 61)
    for label, name, color in ((0, "negative", "#d1495b"), (1, "positive", "#3b6fb6")):
        axis.hist(values_N[y_N == label], edges, alpha=0.6, color=color, label=name)
    axis.axvline(threshold, color="#666666", lw=1, ls=":")
    axis.set_title(title, loc="left", fontsize=10)
    axis.set_xlabel("value after the last token")
    axis.set_ylabel("texts")
    axis.legend(frameon=False, fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(_):
    model, split = load_model(FLAGS.workdir, step=FLAGS.step), {}
    for name in ("train", "valid", "test"):
        if source := FLAGS[name].value:
            texts, labels = read(source, FLAGS.text_field, FLAGS.label_field)
            split[name] = features(model, texts, FLAGS.batch_size), labels
    if "valid" not in split:
        x_ND, y_N = split["train"]
        held_out = np.arange(len(y_N)) % 10 == 9
        split["train"], split["valid"] = (x_ND[~held_out], y_N[~held_out]), (x_ND[held_out], y_N[held_out])
    result, unit = study(split["train"], split["valid"], split["test"])
    result = {"model": architecture.describe(model.config), "step": model.step} | result
    output = Path(FLAGS.output or f"{FLAGS.workdir}/sentiment_unit")
    output.mkdir(parents=True, exist_ok=True)
    json_files.write_json(output / "results.json", result)
    x_ND, y_N = split["test"]
    title = f"unit {unit}: alone {result['unit_accuracy']:.1%}, all {result['features']} {result['accuracy']:.1%}"
    picture(x_ND[:, unit], y_N, result["unit_threshold"], title, output / "unit.png")
    print(f"test accuracy {result['accuracy']:.4f} ± {result['accuracy_stderr']:.4f} (majority "
          f"{result['majority']:.4f}), C {result['C']:g}, {result['nonzero']} of {result['features']} weights not 0\n"
          f"unit {unit} alone: {result['unit_accuracy']:.4f}\n{output}/results.json, unit.png")  # fmt: skip


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    command_line.define_path("workdir", None, "A pre-training run's workdir.")
    command_line.define_path("train", None, "Labeled rows to fit: CSV, TSV, JSONL, Parquet or hf:NAME.")
    command_line.define_path("valid", None, "Rows that choose C; every tenth row of --train if not given.")
    command_line.define_path("test", None, "Rows to test on.")
    command_line.define_path("output", None, "Folder of the results; WORKDIR/sentiment_unit if not given.")
    flags.DEFINE_string("text_field", "text", "Field of the text.")
    flags.DEFINE_string("label_field", "label", "Field of the label, 0 or 1.")
    flags.DEFINE_integer("batch_size", 64, "Texts at a time.", lower_bound=1)
    command_line.define_step()
    flags.mark_flags_as_required(["workdir", "train", "test"])
    sys.exit(command_line.run(main))

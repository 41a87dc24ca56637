"""Which items of evaluation sets occur in a training corpus: GPT-2's, GPT-3's or GPT-4's method.

    python -m gptjax.contamination --eval=DIR --corpus=RUN_OR_PATH [--method=gpt3] [--fields=question,answer] \
        [--scores=scores.jsonl] [--log=items.jsonl] [--json]

--eval: a file of rows (.jsonl, .json, .csv, .tsv, .parquet) or a folder of them, each file one evaluation set.
--corpus: a pre-training workdir, whose token shards are decoded, or any source of text; it is read as a stream. The
methods are described in evals/contamination.py. --scores: rows {"set", "item" (from 0), "score"}: their mean over all,
the clean and the dirty items. --log: a row for each item, with what was found of it.
"""

import contextlib
import sys
from collections.abc import Iterable, Iterator

import numpy as np
from absl import flags

from gptjax import command_line, json_files, paths
from gptjax.config import nearest
from gptjax.console import progress
from gptjax.data import sources
from gptjax.data.corpus import pretraining_text
from gptjax.data.evaluation_sets import evaluation_sets
from gptjax.errors import InputError
from gptjax.evals import contamination

_BLOCK, _OVERLAP = 1 << 20, 256  # tokens decoded at a time where nothing separates documents, and read again


def corpus_texts(corpus: str, text_field: str) -> Iterable[str]:
    """The texts of a pre-training workdir's token shards, or the documents of a source."""
    if (paths.local(corpus) / "config.json").exists():
        text = pretraining_text(corpus)
        for part in text.parts:
            for shards in (part.train, part.validation):
                yield from decoded(shards, text.tokenizer)
    else:
        for document in sources.documents(corpus, text_field=text_field):
            yield document.text


def decoded(shards, tokenizer) -> Iterator[str]:
    """The documents of token shards; without end-of-text between them, overlapping pieces."""
    rest = np.zeros(0, np.int32)
    for start in range(0, len(shards), _BLOCK):
        block = shards.read(np.array([start]), min(_BLOCK, len(shards) - start))[0]
        tokens = np.concatenate([rest, block])
        if shards.eot_id is None:
            yield tokenizer.decode(tokens)
            rest = tokens[-_OVERLAP:]
            continue
        *ended, rest = np.split(tokens, 1 + np.flatnonzero(tokens == shards.eot_id))
        for document in ended:
            yield tokenizer.decode(document[:-1])
    if shards.eot_id is not None and len(rest):
        yield tokenizer.decode(rest)


def find(sets: dict, corpus: str, method: str, text_field: str = "text", seed: int = 0) -> dict:
    """{set: contamination.Overlap}. InputError: an unknown method."""
    if method not in contamination.METHODS:
        raise InputError(f"--method={method} is unknown{nearest(method, contamination.METHODS)}")
    read = lambda what="reading": progress(corpus_texts(corpus, text_field), desc=f"{what} {corpus}", unit="doc")
    if method == "gpt2":
        return contamination.by_filter(sets, read)
    if method == "gpt3":
        return contamination.by_ngrams(sets, read())
    return contamination.by_probes(sets, read(), seed)


def read_scores(path: str, sets: dict) -> dict[str, np.ndarray]:
    """{set: score of each item}. InputError: an unknown set or item, no number, or items without a score."""
    found = {name: np.full(len(items), np.nan) for name, items in sets.items()}
    for row in sources.rows(path):
        value = row.value
        name, item = value.get("set", next(iter(sets)) if len(sets) == 1 else None), value.get("item")
        if name not in found:
            raise InputError(f"{row.where}: There is no evaluation set {name!r}, only {', '.join(map(repr, found))}.")
        if not isinstance(item, int) or not 0 <= item < len(found[name]):
            raise InputError(f"{row.where}: item={item!r} is not one of the {len(found[name])} items of {name!r}.")
        if not isinstance(value.get("score"), int | float):
            raise InputError(f"{row.where}: score={value.get('score')!r} is not a number: fix the row.")
        found[name][item] = value["score"]
    for name, scores in found.items():
        if np.isnan(scores).any():
            raise InputError(f"{path} has no score for item {int(np.isnan(scores).argmax())} of {name!r}.")
    return found


def main(_):
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the result
        sets = evaluation_sets(FLAGS.eval, FLAGS.fields)
        scores = FLAGS.scores and read_scores(FLAGS.scores, sets)
        found = find(sets, FLAGS.corpus, FLAGS.method, FLAGS.text_field, FLAGS.seed)
    result = {name: overlap.figures() for name, overlap in found.items()}
    for name in scores or {}:
        result[name]["scores"] = contamination.split_scores(scores[name], found[name].dirty)
    if FLAGS.log:
        json_files.write_json_lines(FLAGS.log, (
            {"set": name, "item": item, "dirty": bool(dirty), "found": evidence}
            for name, overlap in found.items()
            for item, (dirty, evidence) in enumerate(zip(overlap.dirty, overlap.evidence, strict=True))
        ))  # fmt: skip
    if FLAGS.json:
        print(json_files.dumps({"method": FLAGS.method, "corpus": FLAGS.corpus, "sets": result}))
        return
    print(f"{'set':<24}{'items':>8}{'dirty':>8}{'%':>8}{'overlap %':>11}{'short':>7}{'n':>4}")
    for name, f in result.items():
        overlap = f"{f['overlap_percent']:.2f}" if "overlap_percent" in f else "-"
        counts = f"{f['items']:>8,}{f['dirty']:>8,}{f['dirty_percent']:>8.2f}{overlap:>11}{f['short']:>7}{f['n']:>4}"
        print(f"{name:<24}{counts}")
        for subset in ("all", "clean", "dirty"):
            if score := f.get("scores", {}).get(subset):
                spread = "" if score["stderr"] is None else f" ± {score['stderr']:.4f}"
                print(f"  score of {subset}: {score['score']:.4f}{spread} ({score['items']:,} items)")


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    command_line.define_path("eval", None, "A file of rows, or a folder of them: the evaluation sets.")
    command_line.define_path("corpus", None, "A pre-training workdir, or a source of text.")
    flags.DEFINE_string("method", "gpt3", "gpt2, gpt3 or gpt4.")
    flags.DEFINE_list("fields", None, "Fields of the rows that are an item's text; all text of a row if not given.")
    flags.DEFINE_string("text_field", "text", "Field of the corpus's JSONL and Parquet rows.")
    command_line.define_path("scores", None, "Rows with the score of each item.")
    command_line.define_path("log", None, "Where to write a row for each item.")
    flags.DEFINE_integer("seed", 0, "Which substrings gpt4 draws.", lower_bound=0)
    flags.DEFINE_bool("json", False, "One JSON object.")
    flags.mark_flags_as_required(["eval", "corpus"])
    command_line.run(main)

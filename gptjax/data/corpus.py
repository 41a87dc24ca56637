"""From a data config to a tokenizer, training examples and validation tokens: one source or a mixture."""

import dataclasses
import itertools
import os
from collections.abc import Mapping

from gptjax import paths
from gptjax.config import build, read_config
from gptjax.data import sources, tokens
from gptjax.data.lm import Mixture, Windows, warn_if_few
from gptjax.data.splits import HOW
from gptjax.data.tokenizer import Tokenizer, make_tokenizer
from gptjax.errors import InputError


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """source: what data/sources.py reads: 'stdlib', a file, a directory, a glob, 'hf:NAME', gs:// paths.
    tokenizer: 'bpe:SIZE' (trained on the source), 'char', or a directory with GPT-2's, GPT-1's or our files.
    validation: the share of documents held out, or another source. text_field: of JSONL and Parquet rows.
    mixture: {name: weight}: `source` is then a folder and each name a source in it (GPT-3 Table 2.2);
        weights are normalised. isolate_documents: attention stays within a document, positions restart.
    split: how the share is held out: 'documents', 'lines' (each line of a text file is a document) or 'position' (the
        last of the text); None = documents where there are several, else position.
    document_separator: text that ends a document inside a text, as '<|endoftext|>'.
    cache: where token shards are kept; None = in the workdir."""

    source: str | None = paths.field(paths.SOURCE)
    tokenizer: str = paths.field(paths.TOKENIZER, "bpe:50257")
    validation: str = paths.field(paths.SHARE, "0.1")
    text_field: str = "text"
    mixture: Mapping[str, float] = dataclasses.field(default_factory=dict)
    isolate_documents: bool = False
    split: str | None = None
    document_separator: str | None = None
    cache: str | None = paths.field()

    def __post_init__(self):
        if self.split not in (None, *HOW):
            raise InputError(f"data.split={self.split!r} is none of {', '.join(HOW)}")
        if self.document_separator == "":
            raise InputError("data.document_separator is empty; give the text that stands between documents")
        if self.mixture and (min(self.mixture.values()) < 0 or sum(self.mixture.values()) <= 0):
            raise InputError("data.mixture: weights are >= 0 and not all 0.")


@dataclasses.dataclass(frozen=True)
class Corpus:
    tokenizer: Tokenizer
    train: Windows | Mixture
    train_tokens: int
    validation: tokens.TokenShards
    fingerprint: str  # of the training tokens


def shards_directory(c: DataConfig, workdir) -> str:
    return c.cache or os.path.join(workdir, "data")


def load_corpus(c: DataConfig, workdir, context_length: int, seed: int, resumed: bool = False) -> Corpus:
    """Tokenises, or reuses the shards when nothing changed. Raises InputError for anything amiss.

    resumed: the run has begun, and goes on with the tokens it began with whatever became of the source.
    """
    if c.source is None:
        raise InputError("No text to train on: give --config.data.source=PATH (or 'stdlib').")
    cache = shards_directory(c, workdir)

    def prepare(source, tokenizer, directory):
        if resumed and os.path.exists(os.path.join(directory, "manifest.json")):
            return tokens.open_shards(directory)
        made, splits = tokens.prepare(
            source, tokenizer, directory, validation=_fraction(c.validation), text_field=c.text_field, seed=seed,
            split=c.split, document_separator=c.document_separator,
        )  # fmt: skip
        warn_if_few(splits["validation"], context_length)
        return made, splits

    if not c.mixture:
        tokenizer, splits = prepare(c.source, c.tokenizer, cache)
        train = Windows(splits["train"], context_length, seed)
        return Corpus(tokenizer, train, len(splits["train"]), splits["validation"], splits["train"].fingerprint)

    # One tokenizer for all parts: trained on them together, or the one that was given.
    parts = {name: os.path.join(c.source, name) for name, weight in c.mixture.items() if weight > 0}
    saved = os.path.join(cache, "tokenizer")
    if not (resumed and os.path.exists(saved)):
        read = lambda: itertools.chain.from_iterable(
            (d.text for d in sources.documents(path, text_field=c.text_field, separator=c.document_separator))
            for path in parts.values()
        )
        make_tokenizer(c.tokenizer, read).save(saved)
    windows, n, held_out, fingerprints = [], 0, None, []
    for i, (name, path) in enumerate(parts.items()):
        tokenizer, splits = prepare(path, saved, os.path.join(cache, name))
        windows.append(Windows(splits["train"], context_length, seed + i))
        fingerprints.append(splits["train"].fingerprint)
        n += len(splits["train"])
        held_out = held_out or splits["validation"]  # of the first part, the mixture's main one
    weights = [c.mixture[name] for name in parts]
    return Corpus(tokenizer, Mixture(windows, weights, seed), n, held_out, "+".join(fingerprints))


# --- the pre-training text of a run, for the stages after it ------------------------------------------------


def pretraining_run(workdir) -> tuple[str, dict]:
    """(workdir, config.json) of the pre-training that a run's weights began with, following init_from.

    Raises InputError where the chain ends without one (imported weights have no text here).
    """
    seen = []
    while workdir and str(workdir) not in seen:
        seen.append(str(workdir))
        run = read_config(workdir)
        if run.get("stage") == "pretrain" and (run.get("data") or {}).get("source"):
            return str(workdir), run
        workdir = run.get("init_from") or run.get("policy")
    raise InputError(f"{' <- '.join(seen)}: no pre-training text is known of these weights; name a source of text")


def pretraining_split(workdir, split: str) -> list[tuple[tokens.TokenShards, float]]:
    """[(tokens of a split, weight)] of the pre-training a run began with: several for a mixture; of its validation,
    the first part's alone, as pre-training has it."""
    directory, run = pretraining_run(workdir)
    c = build(DataConfig, run["data"], "data")
    cache = shards_directory(c, directory)
    parts = {name: weight for name, weight in c.mixture.items() if weight > 0} or {"": 1.0}
    shards = [(tokens.open_shards(os.path.join(cache, name))[1][split], weight) for name, weight in parts.items()]
    return shards if split == "train" else shards[:1]


def text_windows(
    source: str | None, init_from, tokenizer_directory, cache, context_length: int, seed: int, resumed: bool = False
):
    """Pre-training text as a later stage mixes it in: (training examples, validation tokens).

    source: None = the text the run `init_from` was pre-trained on; else any source, tokenised into `cache` with the
    tokenizer saved in tokenizer_directory. resumed: the run goes on with the tokens it began with, as in load_corpus.
    """
    if source is not None:
        if resumed and os.path.exists(os.path.join(cache, "manifest.json")):
            _, splits = tokens.open_shards(cache)
        else:
            _, splits = tokens.prepare(source, str(tokenizer_directory), cache, seed=seed)
        return Windows(splits["train"], context_length, seed), splits["validation"]
    train = pretraining_split(init_from, "train")
    windows = [Windows(shards, context_length, seed + i) for i, (shards, _) in enumerate(train)]
    examples = windows[0] if len(windows) == 1 else Mixture(windows, [weight for _, weight in train], seed)
    return examples, pretraining_split(init_from, "validation")[0][0]


def _fraction(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text

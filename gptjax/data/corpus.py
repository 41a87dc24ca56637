"""From a data config to a tokenizer, training examples and validation tokens, for one source or a mixture.

The tokens of a run are recorded in its data.json (records.py) and verified when they are opened again.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import os
from collections.abc import Callable, Mapping

from gptjax import paths
from gptjax.config import build
from gptjax.data import lm, prepare, sources, tokens, validation
from gptjax.data.lm import Mixture, Windows
from gptjax.data.records import pretraining_documents, pretraining_run, read_record
from gptjax.data.splits import HOW
from gptjax.data.tokenizer import Tokenizer
from gptjax.distributed import hosts
from gptjax.errors import InputError
from gptjax.objectives.lm import bits_per_byte
from gptjax.ranges import Seed


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The text, its tokenizer and what is held out of it for validation.

    source: what data/sources.py reads: 'stdlib', a file, a directory, a glob, 'hf:NAME', gs:// paths.
    tokenizer: 'bpe:SIZE' (trained on the source), 'char', or a directory with GPT-2's, GPT-1's or our files.
    validation: share of the documents that is held out, or another source.
    text_field: field of JSONL and Parquet rows that holds the text.
    mixture: weight of each part: `source` is then a folder and each name a source in it (GPT-3 Table 2.2); weights are
        normalized.
    isolate_documents: attention stays within a document and positions restart in each.
    split: how the share is held out: 'documents', 'lines' (each line of a text file is a document) or 'position' (the
        last of the text); None = documents where there are several, else position.
    document_separator: text that ends a document inside a text, as '<|endoftext|>'.
    split_seed: of the choice of documents that are held out, where runs with several seeds are to have the same ones;
        None = the run's own seed.
    cache: local folder where token shards are kept, each request in a folder of its own, so that runs can share it;
        None = `data` in the workdir.
    """

    source: str | None = paths.field(paths.SOURCE)
    tokenizer: str = paths.field(paths.TOKENIZER, "bpe:50257")
    validation: str = paths.field(paths.SHARE, "0.1")
    text_field: str = "text"
    mixture: Mapping[str, float] = dataclasses.field(default_factory=dict)
    isolate_documents: bool = False
    split: str | None = None
    document_separator: str | None = None
    split_seed: Seed | None = None
    cache: str | None = paths.field()

    def __post_init__(self):
        if self.split not in (None, *HOW):
            raise InputError(f"data.split={self.split!r} is unknown: use one of {', '.join(HOW)}.")
        if self.document_separator == "":
            raise InputError("data.document_separator is empty: give the text that separates documents.")
        if self.mixture and (min(self.mixture.values()) < 0 or sum(self.mixture.values()) <= 0):
            raise InputError("data.mixture has a negative weight, or only zeros: give weights >= 0 that are not all 0.")


@dataclasses.dataclass(frozen=True)
class Part:
    """One source of a text. name: in the mixture, '' if there is only one source; weight: its share of the mixture
    (they sum to 1); train, validation: its tokens."""

    name: str
    weight: float
    train: tokens.TokenShards
    validation: tokens.TokenShards


@dataclasses.dataclass(frozen=True)
class Text:
    """The text of a run. record: its entry in data.json. isolate_documents: as in the pre-training of the weights."""

    tokenizer: Tokenizer
    parts: tuple[Part, ...]
    isolate_documents: bool
    record: dict

    @property
    def fingerprint(self) -> str:
        """Of the training tokens, as stored in checkpoints of pre-training."""
        return "+".join(part.train.fingerprint for part in self.parts)

    @property
    def train_tokens(self) -> int:
        """Number of training tokens of all parts."""
        return sum(len(part.train) for part in self.parts)

    @property
    def eot_id(self) -> int | None:
        """Id of end-of-text if documents are isolated, else None."""
        return self.tokenizer.eot_id if self.isolate_documents else None

    @property
    def byte_lengths(self):
        """[vocab_size]: bytes of text per token; for a tokenizer that normalizes, on average over the training text."""
        if self.tokenizer.lossless:
            return self.tokenizer.byte_lengths
        return self.tokenizer.byte_lengths * sum(part.weight * part.train.byte_ratio for part in self.parts)

    def examples(self, context_length: int, seed: int, shuffle: int) -> Windows | Mixture:
        """The training examples. shuffle: version of lm.shuffled. InputError: as Windows and Mixture."""
        windows = []
        for i, part in enumerate(self.parts):
            with _naming(part.name):
                windows.append(Windows(part.train, context_length, seed + i, shuffle))
        return windows[0] if len(windows) == 1 else Mixture(windows, [part.weight for part in self.parts], seed)

    def validation_batches(
        self, context_length: int, rows: int, most: int | None = None, *, documents: Callable | None = None, **options
    ) -> dict[str, lm.LmBatches]:
        """{name of a part: validation.validation_batches}.

        most: maximum number of batches of each part. documents: function from the validation tokens of a part to its
        document boundaries (validation.Scored), None = one text. options: of validation.validation_batches.
        """
        batches = {}
        for part in self.parts:
            with _naming(part.name):
                batches[part.name] = validation.validation_batches(
                    part.validation, context_length, rows, most, byte_lengths=self.tokenizer.byte_lengths,
                    isolate_documents=self.eot_id is not None, documents=documents and documents(part.validation),
                    **options,
                )  # fmt: skip
        return batches

    def figures(self, sums: Mapping[str, tuple[float, float, dict]]) -> dict:
        """{'loss' in nats per token, 'bits_per_byte', 'tokens'} from the evaluation sums of each part. For a mixture
        they are means weighted by its weights, with 'loss/<name>' of each part."""
        losses = {part.name: sums[part.name][0] / sums[part.name][1] for part in self.parts}
        loss = sum(part.weight * losses[part.name] for part in self.parts)
        bytes_per_token = sum(
            part.weight * part.validation.byte_ratio * sums[part.name][2]["target_bytes"] / sums[part.name][1]
            for part in self.parts
        )
        named = {f"loss/{name}": value for name, value in losses.items()} if len(losses) > 1 else {}
        return {
            "loss": loss,
            "bits_per_byte": float(bits_per_byte(loss, max(bytes_per_token, 1e-9))),
            "tokens": int(sum(count for _, count, _ in sums.values())),
            **named,
        }


# --- opening and preparing ------------------------------------------------------------------------------------


def shards_directory(cache: str | None, workdir, flag: str = "data.cache") -> str:
    """The folder for the tokens of a run. flag: the key of `cache`. InputError: a remote workdir, and no cache."""
    if cache is None and "://" in str(workdir):
        raise InputError(
            f"Token shards are memory-mapped and cannot be in {workdir}: give a local folder with --config.{flag}=DIR."
        )
    return cache or os.path.join(workdir, "data")


def load_corpus(c: DataConfig, workdir, seed: int, record: dict, known: bool) -> Text:
    """The text of pre-training: tokenizes it, or opens the shards if nothing has changed.

    record: from start_record. known: the run is resumed, and uses the tokens it started with even if the source has
    changed. InputError: no source, or as `prepare` and `open_shards`.
    """
    if c.source is None:
        raise InputError("No text to train on: give --config.data.source=PATH (or 'stdlib').")
    cache = shards_directory(c.cache, workdir)
    load = lambda text: _load(
        c, cache, seed, c.isolate_documents, text, earlier=known, owner=workdir if known else None
    )
    return _first_then_others(load, record.get("text"))


def _first_then_others(load: Callable, recorded: dict | None) -> Text:
    """load(recorded) on process 0, then load(its record) on the others: on shared storage they find what it made,
    otherwise each makes its own. If one host raises InputError, all do, because PPO continues without a text that it
    does not need."""
    made = problem = None

    def attempt(recorded):
        nonlocal made, problem
        try:
            made = load(recorded)
            return made.record
        except InputError as error:
            problem = error
            return str(error)

    record = hosts.from_first(lambda: attempt(recorded))
    if isinstance(record, str):
        raise problem or InputError(record)
    if made is None:
        attempt(record)
    if not hosts.all_true(problem is None):
        raise problem or InputError("Another host cannot read the text: look at its log.")
    return made


def _load(c: DataConfig, cache, seed: int, isolate: bool, recorded: dict | None, *, earlier=False, owner=None) -> Text:
    """Opens the tokens that `recorded` names, prepares missing ones, and verifies that they match the record.

    earlier: without a record, use the tokens that a run of an earlier version put into the cache itself. owner: workdir
    of the record, None = do not verify.
    """
    weights = {name: c.mixture[name] for name in sorted(c.mixture) if c.mixture[name] > 0} or {"": 1.0}
    tokenizer_of_all = functools.cache(lambda: _tokenizer_of(c, weights, cache))
    tokenizer, parts, record = None, [], {}
    for name, weight in weights.items():
        path = os.path.join(c.source, name) if name else c.source
        if recorded and name in recorded["parts"]:
            directory = os.path.join(cache, recorded["parts"][name]["directory"])
        else:
            directory = os.path.join(cache, name) if earlier else None
        exists = directory and os.path.exists(os.path.join(os.path.expanduser(directory), "manifest.json"))
        spec = None if exists else tokenizer_of_all()
        with _naming(name):
            if exists:
                opened, splits = tokens.open_shards(directory)
            else:
                opened, splits = prepare.prepare(
                    path, spec, cache, validation=_fraction(c.validation), text_field=c.text_field,
                    seed=seed if c.split_seed is None else c.split_seed,
                    split=c.split, document_separator=c.document_separator, by_content=True,
                )  # fmt: skip
        if tokenizer and opened.fingerprint != tokenizer.fingerprint:
            raise InputError(
                f"The parts of the mixture in {cache} have different tokenizers, because another run has replaced some "
                "of them: give another --config.data.cache."
            )
        tokenizer = opened
        parts.append(Part(name, weight / sum(weights.values()), splits["train"], splits["validation"]))
        record[name] = {
            "directory": os.path.relpath(splits["train"].directory, os.path.realpath(os.path.expanduser(cache))),
            "train": splits["train"].fingerprint,
            "validation": splits["validation"].fingerprint,
        }
    found = {"tokenizer": tokenizer.fingerprint, "isolate_documents": isolate, "parts": record}
    if recorded and owner is not None and _content(found) != _content(recorded):
        raise InputError(_changed(cache, owner))
    return Text(tokenizer, tuple(parts), isolate, found)


def _changed(cache, owner) -> str:
    return (
        f"The tokens in {cache} are not those that {owner} was trained on: restore them, or start in another "
        "--workdir."
    )


def _content(record: dict) -> tuple:
    """The entries of a text's record that identify its tokens."""
    parts = {name: (part["train"], part["validation"]) for name, part in record["parts"].items()}
    return record["tokenizer"], parts


def _tokenizer_of(c: DataConfig, names, cache) -> str:
    """The tokenizer for `prepare`; for a mixture the one that all parts share, given or trained on them together."""
    if list(names) == [""]:
        return c.tokenizer

    def read():
        for name in names:
            with _naming(name):
                path = os.path.join(c.source, name)
                for d in sources.documents(path, text_field=c.text_field, separator=c.document_separator):
                    yield d.text

    def stamp(name: str) -> str:
        with _naming(name):
            return sources.fingerprint(os.path.join(c.source, name))

    if c.tokenizer == "char":
        texts, read = read, lambda: itertools.chain(["\n"], texts())  # the document separator
    made = c.tokenizer == "char" or c.tokenizer.startswith("bpe:")
    about = {"sources": [stamp(name) for name in names], "text_field": c.text_field} if made else {}
    about |= {"document_separator": c.document_separator} if made and c.document_separator else {}
    return prepare.shared_tokenizer(c.tokenizer, read, about, cache)


@contextlib.contextmanager
def _naming(name: str):
    """Puts the name of a part of a mixture ('' = none) before InputErrors."""
    try:
        yield
    except InputError as error:
        if not name:
            raise
        raise InputError(f"mixture source {name!r}: {error}") from error


# --- the pre-training text, for later stages ------------------------------------------------


def pretraining_text(workdir, cache: str | None = None, flag: str = "data.cache") -> Text:
    """The pre-training text of a run's weights: the tokens recorded by that pre-training, prepared again if its cache
    is gone.

    cache: a local folder for them, None = that of the pre-training; flag: its key.
    InputError: no such run, or tokens that are missing or differ from those it was trained on.
    """
    directory, run = pretraining_run(workdir)
    c = build(DataConfig, run["data"], "data")
    cache, recorded = shards_directory(cache or c.cache, directory, flag), read_record(directory).get("text")
    try:
        text = _load(c, cache, run.get("seed", 0), c.isolate_documents, recorded, earlier=not recorded, owner=directory)
    except OSError as error:
        raise InputError(
            f"The tokens that {directory} was trained on cannot be read ({error}): check its source and cache."
        ) from error
    tokenizer = Tokenizer.load(paths.local(directory) / "tokenizer")
    trained_on = None if recorded else _checkpoint_data(directory)
    if text.tokenizer.fingerprint != tokenizer.fingerprint or trained_on not in (None, text.fingerprint):
        raise InputError(_changed(cache, directory))
    return text


def _checkpoint_data(workdir) -> str | None:
    """The fingerprint of the tokens in the newest checkpoint; None if there is no checkpoint."""
    directory = paths.local(workdir) / "checkpoints"
    steps = {int(p.name): p for p in directory.iterdir() if p.name.isdecimal()} if directory.is_dir() else {}
    for step in sorted(steps, reverse=True):
        path = steps[step] / "meta" / "metadata"
        if path.exists():
            return json.loads(path.read_text()).get("data")
    return None


def load_text(source: str | None, init_from, workdir, cache: str | None, flag: str, seed: int, record: dict,
              known: bool) -> Text:  # fmt: skip
    """Pre-training text for a later stage.

    Args:
        source: None = the text that `init_from` was pre-trained on; else any source, tokenized with the tokenizer saved
            in the workdir. Either way documents are separated, and isolated, as in that pre-training.
        cache: folder for the tokens of a source; None = `data` in the workdir. flag: its key.
        record, known: as in load_corpus; recorded tokens are verified.
    Raises:
        InputError: as pretraining_text and load_corpus; tokens that differ from the recorded ones.
    """
    if source is None:
        load = lambda _: pretraining_text(init_from, cache, flag)
    else:
        cache, of_base = shards_directory(cache, workdir, flag), record.get("documents")
        of_base = dict(pretraining_documents(init_from) if of_base is None else of_base)
        isolate = of_base.pop("isolate_documents")
        c = DataConfig(source=source, tokenizer=str(paths.local(workdir) / "tokenizer"), **of_base)
        load = functools.partial(_load, c, cache, seed, isolate, earlier=known, owner=workdir if known else None)
    text = _first_then_others(load, record.get("text"))
    if source is None and "text" in record and _content(text.record) != _content(record["text"]):
        raise InputError(_changed(pretraining_run(init_from)[0], workdir))
    if known and "text" not in record and text.isolate_documents:
        hosts.say("note: From here on documents of the pre-training text are isolated, as they were in pre-training.")
    return text


def _fraction(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text

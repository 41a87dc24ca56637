"""From a data config to a tokenizer, training examples and validation tokens: one source or a mixture.

A run writes down in its workdir's data.json which tokens it reads (a folder of the cache and their fingerprints), and
every reader after it checks that it has those:

    {"shuffle": 2, "text": {"tokenizer": sha256, "isolate_documents": false,
                            "parts": {"books1": {"directory": "0f5c…", "train": sha256, "validation": sha256}}}}

"shuffle" is the version of lm.shuffled. Stages after pre-training also have "documents", how their base was pre-trained
(pretraining_documents). A source that is no mixture has one part, "". Runs of earlier versions have no data.json: their
tokens are in the cache itself, and their checkpoints have the fingerprint.
"""

import dataclasses
import functools
import itertools
import json
import os
from collections.abc import Callable, Mapping

from gptjax import paths
from gptjax.config import build
from gptjax.data import lm, sources, tokens
from gptjax.data.lm import Mixture, Windows
from gptjax.data.splits import HOW
from gptjax.data.tokenizer import Tokenizer
from gptjax.distributed import hosts
from gptjax.errors import InputError
from gptjax.json_files import write_json
from gptjax.objectives.lm import bits_per_byte
from gptjax.run_config import read_config


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
    cache: str | None = paths.field()

    def __post_init__(self):
        if self.split not in (None, *HOW):
            raise InputError(f"data.split={self.split!r} is none of {', '.join(HOW)}")
        if self.document_separator == "":
            raise InputError("data.document_separator is empty; give the text that stands between documents")
        if self.mixture and (min(self.mixture.values()) < 0 or sum(self.mixture.values()) <= 0):
            raise InputError("data.mixture: weights are >= 0 and not all 0.")


@dataclasses.dataclass(frozen=True)
class Part:
    """One source of a text: its name in the mixture ('' where there is one source), its share of the text (they sum
    to 1), and its tokens."""

    name: str
    weight: float
    train: tokens.TokenShards
    validation: tokens.TokenShards


@dataclasses.dataclass(frozen=True)
class Text:
    """record: its entry in data.json. isolate_documents: how the run, or the base of a later stage, was trained."""

    tokenizer: Tokenizer
    parts: tuple[Part, ...]
    isolate_documents: bool
    record: dict

    @property
    def fingerprint(self) -> str:
        """Of the training tokens, as the checkpoints of pre-training have it."""
        return "+".join(part.train.fingerprint for part in self.parts)

    @property
    def train_tokens(self) -> int:
        return sum(len(part.train) for part in self.parts)

    @property
    def eot_id(self) -> int | None:
        """End-of-text where documents are isolated, else None."""
        return self.tokenizer.eot_id if self.isolate_documents else None

    @property
    def byte_lengths(self):
        """[vocab_size]: bytes of the text for each token, on average over the training tokens' normalization."""
        if self.tokenizer.lossless:
            return self.tokenizer.byte_lengths
        return self.tokenizer.byte_lengths * sum(part.weight * part.train.byte_ratio for part in self.parts)

    def examples(self, context_length: int, seed: int, shuffle: int) -> Windows | Mixture:
        windows = []
        for i, part in enumerate(self.parts):
            with _naming(part.name):
                windows.append(Windows(part.train, context_length, seed + i, shuffle))
        return windows[0] if len(windows) == 1 else Mixture(windows, [part.weight for part in self.parts], seed)

    def validation_batches(
        self, context_length: int, rows: int, most: int | None = None, *, documents: Callable | None = None, **options
    ) -> dict[str, lm.LmBatches]:
        """{name of a part: lm.validation_batches}. most: batches of each part. documents: validation tokens of a part
        -> where its documents lie (lm.Scored), None = joined. options: of lm.validation_batches."""
        batches = {}
        for part in self.parts:
            with _naming(part.name):
                batches[part.name] = lm.validation_batches(
                    part.validation, context_length, rows, most, byte_lengths=self.tokenizer.byte_lengths,
                    isolate_documents=self.eot_id is not None, documents=documents and documents(part.validation),
                    **options,
                )  # fmt: skip
        return batches

    def figures(self, sums: Mapping[str, tuple[float, float, dict]]) -> dict:
        """{'loss' in nats per token, 'bits_per_byte', 'tokens'} from loop.evaluation_sums of each part. Of a mixture
        the means under its weights, and 'loss/<name>' of each part."""
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


# --- data.json ----------------------------------------------------------------------------------------------


def read_record(workdir) -> dict:
    """A workdir's data.json; {} where there is none. InputError: damaged."""
    path = paths.local(workdir) / "data.json"
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is damaged ({error}): restore it or start a new workdir.") from error


def start_record(workdir, known: bool, base=None) -> dict:
    """What data.json of a run has, the same on every host: as it is where the run is resumed (known), else its
    beginning. base: the workdir that a stage after pre-training starts from."""
    if not known:
        return {"shuffle": lm.SHUFFLE} | ({"documents": pretraining_documents(base)} if base else {})
    return {"shuffle": 1, **hosts.from_first(lambda: read_record(workdir))}


def write_record(workdir, record: dict, text: Text | None = None):
    """Writes data.json of a new run, before config.json makes the workdir that run's."""

    def write():
        paths.local(workdir).mkdir(parents=True, exist_ok=True)
        write_json(paths.local(workdir) / "data.json", record | ({"text": text.record} if text else {}))

    hosts.only_first(write)


# --- opening and preparing ------------------------------------------------------------------------------------


def shards_directory(cache: str | None, workdir, flag: str = "data.cache") -> str:
    """Where the tokens of a run are. InputError: a workdir that is not on a local disk, and no cache."""
    if cache is None and "://" in str(workdir):
        raise InputError(
            f"Token shards are read by memory map and can't be in {workdir}: give a folder on a local disk, "
            f"--config.{flag}=DIR."
        )
    return cache or os.path.join(workdir, "data")


def load_corpus(c: DataConfig, workdir, seed: int, record: dict, known: bool) -> Text:
    """The text of pre-training: tokenizes, or reuses the shards when nothing changed. Raises InputError for anything
    amiss.

    record: start_record. known: the run has begun, and goes on with the tokens it began with whatever became of the
    source.
    """
    if c.source is None:
        raise InputError("No text to train on: give --config.data.source=PATH (or 'stdlib').")
    cache = shards_directory(c.cache, workdir)
    load = lambda text: _load(
        c, cache, seed, c.isolate_documents, text, earlier=known, owner=workdir if known else None
    )
    return _first_then_others(load, record.get("text"))


def _first_then_others(load: Callable, recorded: dict | None) -> Text:
    """load(recorded) on the first host, then on the others load(its record): where storage is shared they find what it
    made; where it isn't, each makes its own. InputError on every host where one of them has it: PPO goes on without a
    text that it does not need."""
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
        raise problem or InputError("another host can't read the text")
    return made


def _load(c: DataConfig, cache, seed: int, isolate: bool, recorded: dict | None, *, earlier=False, owner=None) -> Text:
    """Opens the tokens that `recorded` names, prepares those that are not there, and checks what it has.

    earlier: without a record, take what a run of an earlier version put into the cache itself. owner: of the record.
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
        there = directory and os.path.exists(os.path.join(os.path.expanduser(directory), "manifest.json"))
        spec = None if there else tokenizer_of_all()
        with _naming(name):
            if there:
                opened, splits = tokens.open_shards(directory)
            else:
                opened, splits = tokens.prepare(
                    path, spec, cache, validation=_fraction(c.validation), text_field=c.text_field, seed=seed,
                    split=c.split, document_separator=c.document_separator, by_content=True,
                )  # fmt: skip
        if tokenizer and opened.fingerprint != tokenizer.fingerprint:
            raise InputError(
                f"The parts of the mixture in {cache} have different tokenizers, for another run has replaced some of "
                "them: name another --config.data.cache."
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
        f"The tokens in {cache} are not those that {owner} was trained on: put them back, or start anew in another "
        "--workdir."
    )


def _content(record: dict) -> tuple:
    """What of a text's record tells whether two are the same tokens."""
    parts = {name: (part["train"], part["validation"]) for name, part in record["parts"].items()}
    return record["tokenizer"], parts


def _tokenizer_of(c: DataConfig, names, cache) -> str:
    """The tokenizer for `tokens.prepare`: of a mixture one for all parts, trained on them together or given."""
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
        texts, read = read, lambda: itertools.chain(["\n"], texts())  # stands between two documents
    made = c.tokenizer == "char" or c.tokenizer.startswith("bpe:")
    about = {"sources": [stamp(name) for name in names], "text_field": c.text_field} if made else {}
    about |= {"document_separator": c.document_separator} if made and c.document_separator else {}
    return tokens.shared_tokenizer(c.tokenizer, read, about, cache)


class _naming:
    """InputErrors within begin with the part of a mixture they are about."""

    def __init__(self, name: str):
        self._name = name

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _):
        if self._name and isinstance(error, InputError):
            raise InputError(f"mixture source {self._name!r}: {error}") from error


# --- the pre-training text of a run, for the stages after it ------------------------------------------------


def pretraining_run(workdir) -> tuple[str, dict]:
    """(workdir, config.json) of the pre-training that a run's weights began with, following init_from.

    Raises InputError where the chain ends without one (imported weights have no text here).
    """
    seen = []
    while workdir and str(workdir) not in seen:
        seen.append(str(workdir))
        run = read_config(workdir)
        if _is_of_text(run) and run["data"].get("source"):
            return str(workdir), run
        workdir = run.get("init_from") or run.get("policy")
    raise InputError(f"{' <- '.join(seen)}: no pre-training text is known of these weights; name a source of text")


def _is_of_text(run: dict) -> bool:
    """Whether the data of a run (its config.json) are a DataConfig's: plain text, as in pre-training."""
    return "tokenizer" in (run.get("data") or {})


def pretraining_documents(workdir) -> dict:
    """Where documents ended in the pre-training of a run's weights, as DataConfig has it: {'isolate_documents',
    'document_separator', 'split'}, split only where it makes each line a document.

    By the config of the pre-training, or data.json of a stage after it: the base's folder may be gone. Imported weights
    have the defaults; so has, with a warning, what can't be known."""
    data, seen = {}, set()
    while workdir and str(workdir) not in seen:
        seen.add(str(workdir))
        try:
            run, record = read_config(workdir), read_record(workdir)
        except InputError as error:
            _warn_once(f"{error} How documents were told apart in pre-training is not known: taken as by default.")
            break
        if _is_of_text(run):
            data = run["data"]
            break
        if "documents" in record:
            data = record["documents"]
            break
        workdir = run.get("init_from") or run.get("policy")
    return {
        "isolate_documents": bool(data.get("isolate_documents")),
        "document_separator": data.get("document_separator"),
        "split": "lines" if data.get("split") == "lines" else None,
    }


_warn_once = functools.cache(hosts.warn)


def isolates_documents(workdir) -> bool:
    """Whether the weights of a run were pre-trained with attention that stays within a document."""
    return pretraining_documents(workdir)["isolate_documents"]


def documents_within(workdir) -> dict:
    """Where documents ended inside a text in the pre-training of a run's weights: {'document_separator', 'split'}."""
    return {k: v for k, v in pretraining_documents(workdir).items() if k != "isolate_documents"}


def pretraining_text(workdir, cache: str | None = None, flag: str = "data.cache") -> Text:
    """The text of the pre-training a run began with: the tokens that run recorded, made again where its cache is gone.

    cache: a local folder to take and make them in, None = where the pre-training has them; flag: its key.
    InputError: no such run, tokens that are not to be had any more, or others than it was trained on.
    """
    directory, run = pretraining_run(workdir)
    c = build(DataConfig, run["data"], "data")
    cache, recorded = shards_directory(cache or c.cache, directory, flag), read_record(directory).get("text")
    try:
        text = _load(c, cache, run.get("seed", 0), c.isolate_documents, recorded, earlier=not recorded, owner=directory)
    except OSError as error:
        raise InputError(f"the tokens that {directory} was trained on can't be read ({error})") from error
    tokenizer = Tokenizer.load(paths.local(directory) / "tokenizer")
    trained_on = None if recorded else _checkpoint_data(directory)
    if text.tokenizer.fingerprint != tokenizer.fingerprint or trained_on not in (None, text.fingerprint):
        raise InputError(_changed(cache, directory))
    return text


def _checkpoint_data(workdir) -> str | None:
    """The fingerprint of the tokens in the newest checkpoint; None where there is no checkpoint."""
    directory = paths.local(workdir) / "checkpoints"
    steps = {int(p.name): p for p in directory.iterdir() if p.name.isdecimal()} if directory.is_dir() else {}
    for step in sorted(steps, reverse=True):
        path = steps[step] / "meta" / "metadata"
        if path.exists():
            return json.loads(path.read_text()).get("data")
    return None


def load_text(source: str | None, init_from, workdir, cache: str | None, flag: str, seed: int, record: dict,
              known: bool) -> Text:  # fmt: skip
    """Pre-training text as a later stage reads it.

    source: None = the text the run `init_from` was pre-trained on; else any source, tokenized into `cache` (None =
    `data` in the workdir; `flag` is its key) with the tokenizer saved in the workdir. Either way documents end where
    they did in that pre-training (documents_within), and are isolated if it isolated them. record, known: as
    load_corpus has them; what was recorded is checked.
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
        hosts.say("documents of the pre-training text are isolated from here on, as they were in pre-training")
    return text


def _fraction(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text

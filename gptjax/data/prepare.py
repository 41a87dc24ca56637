"""Preparing token shards: a source is split and tokenized once, into a directory that tokens.py reads.

The directory is written under a temporary name and renamed when it is complete. It is never replaced, because a run may
be reading it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from gptjax.data import sources
from gptjax.data.bpe import make_tokenizer
from gptjax.data.splits import SPLITS, splitter
from gptjax.data.tokenizer import Tokenizer
from gptjax.data.tokens import (
    FORMAT,
    MANIFEST,
    VERIFIED,
    TokenShards,
    around,
    checksum,
    open_shards,
    progress_bar,
    read_manifest,
    shard_stamp,
)
from gptjax.errors import InputError

try:
    import fcntl
except ImportError:  # Windows: nothing prevents two processes from preparing one directory at once
    fcntl = None

_BATCH = 1 << 21  # characters tokenized at a time


def prepare(
    source: str,
    tokenizer: str,
    directory: str | os.PathLike,
    *,
    validation: float | str = 0.1,
    text_field: str = "text",
    seed: int = 0,
    split: str | None = None,
    document_separator: str | None = None,
    shard_tokens: int = 2**27,
    token_dtype: str | None = None,
    by_content: bool = False,
    progress: bool = True,
) -> tuple[Tokenizer, dict[str, TokenShards]]:
    """Splits and tokenizes a source into `directory`, or opens the shards there if nothing has changed.

    Each document ends with end-of-text if the tokenizer has it; otherwise Tokenizer.separator_ids separate documents.
    Memory grows with the longest document, not with the source.

    Args:
        source, text_field: as `sources.documents`.
        tokenizer: as `make_tokenizer`; a BPE is trained on the train split, characters are collected from both.
        validation: fraction of the documents that is held out, chosen by a hash of seed and name, with at least one
            document in each split; for a single document, the last fraction of its characters; or another source.
        split, document_separator: as `splits.splitter`.
        shard_tokens: tokens of a shard.
        token_dtype: 'uint16' or 'uint32'; None = the smaller one that fits the vocabulary.
        by_content: `directory` is a cache shared by runs; the tokens are in a subfolder named by a hash of everything
            that they depend on, so that another source, tokenizer or seed has another folder.
        progress: show progress bars.
    Returns:
        (tokenizer, {'train', 'validation': shards}).
    Raises:
        InputError: as `documents`, `make_tokenizer` and `open_shards`; a vocabulary too large for token_dtype; a
        directory with other files, or with tokens of another request; a full disk.
    """
    _check_arguments(directory, validation, shard_tokens, token_dtype)
    directory = Path(directory).expanduser().resolve()
    made = tokenizer == "char" or tokenizer.startswith("bpe:")
    given = None if made else make_tokenizer(tokenizer, list)
    if given or tokenizer[4:].isdecimal():  # fail before any work if the size is known
        _token_dtype(token_dtype, given.vocab_size if given else int(tokenizer[4:]))
    request = {
        "source_fingerprint": sources.fingerprint(source),
        "text_field": text_field,
        "tokenizer": given.fingerprint if given else tokenizer,
        "validation": sources.fingerprint(validation) if isinstance(validation, str) else float(validation),
        "seed": int(seed),
        "shard_tokens": shard_tokens,
        "token_dtype": token_dtype,
    }
    # Only recorded if it is not the default, so that tokens of earlier versions still match.
    request |= {"split": split} if split else {}
    request |= {"document_separator": document_separator} if document_separator else {}
    if tokenizer == "char" or (given and given.eot_id is None):
        request["between_documents"] = "blank line"  # earlier versions wrote no separator
    if by_content:
        directory /= _short_hash({"format": FORMAT, **request})
    if _made_from(directory) == request:
        return open_shards(directory, progress=progress)
    with _locked(directory):
        existing = _made_from(directory)
        if existing is None:
            splitting = splitter(source, validation, text_field, seed, split=split, separator=document_separator)
            about = {"source": source, "tokenizer": tokenizer, "validation_source": str(validation)}
            with _made_atomically(directory) as partial:
                _write(partial, request, about, splitting, given, progress)
        elif existing != request:  # otherwise another process has just prepared it
            keys = sorted(request.keys() | existing.keys())
            different = ", ".join(k for k in keys if request.get(k) != existing.get(k))
            raise InputError(
                f"{directory} contains tokens that differ in {different} and may be in use by a run: give another "
                "directory, or delete it."
            )
    return open_shards(directory, progress=progress)


def _check_arguments(directory, validation: float | str, shard_tokens: int, token_dtype: str | None):
    """InputError: a remote directory, or a value out of range."""
    if "://" in str(directory):
        raise InputError(f"Token shards are memory-mapped, so {directory} must be a local directory: give another one.")
    if token_dtype not in (None, "uint16", "uint32"):
        raise InputError(f"The token dtype {token_dtype!r} is unknown: use 'uint16' or 'uint32'.")
    if not isinstance(validation, str) and not 0 < validation < 1:
        raise InputError(f"The validation fraction {validation} is not between 0 and 1: change it, or give a source.")
    if shard_tokens < 1:
        raise InputError(f"A shard of {shard_tokens} tokens is not possible: give a positive number.")


def shared_tokenizer(spec: str, texts: Callable[[], Iterator[str]], about: dict, cache: str | os.PathLike) -> str:
    """Directory of a tokenizer that several sources share: the one that `spec` names, or one made from all of `texts`
    and kept in a subfolder of `cache` whose name is a hash of `about`, the description of the texts."""
    if not (spec == "char" or spec.startswith("bpe:")):
        return spec
    directory = Path(cache).expanduser().resolve() / f"tokenizer-{_short_hash({'tokenizer': spec, **about})}"
    with _locked(directory):
        if not directory.exists():
            with _made_atomically(directory) as partial:
                make_tokenizer(spec, texts).save(partial)
    return str(directory)


def _short_hash(request: dict) -> str:
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:16]


def _made_from(directory: Path) -> dict | None:
    """The request that the tokens in a directory were made for; None if there are none. InputError: other files."""
    manifest = read_manifest(directory)
    if manifest is None and directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise InputError(f"{directory} contains other files than token shards: give another directory, or empty it.")
    return manifest and manifest["request"]


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Lets only one process at a time prepare a directory; the lock is released when the process ends."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with open(directory.with_name(f".{directory.name}.lock"), "w") as lock:
        if fcntl:
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def _made_atomically(directory: Path) -> Iterator[Path]:
    """Yields a temporary sibling to write to, which then replaces the (new or empty) directory. Needs the lock."""
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
    try:
        partial.mkdir()
        yield partial
        if directory.exists():
            directory.rmdir()
        partial.rename(directory)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise InputError(
            f"The disk is full while writing token shards to {directory}: free some space, or give another directory."
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _token_dtype(requested: str | None, vocab_size: int) -> np.dtype:
    dtype = np.dtype(requested or ("uint16" if vocab_size <= 2**16 else "uint32")).newbyteorder("<")
    if vocab_size - 1 > np.iinfo(dtype).max:
        raise InputError(
            f"A vocabulary of {vocab_size} does not fit into token dtype {requested}: use uint32, or leave it unset."
        )
    return dtype


class _Writer:
    """Writes the tokens of one split to shards of shard_tokens tokens, with their hashes."""

    def __init__(self, directory: Path, split: str, shard_tokens: int):
        self.shards: list[dict] = []
        self.tokens = self.bytes = self.token_bytes = self.documents = 0
        self._directory, self._split, self._shard_tokens = directory, split, shard_tokens
        self._stream = None

    def write(self, tokens: np.ndarray) -> None:
        while tokens.size:
            if self._stream is None:
                name = f"{self._split}-{len(self.shards):05d}.bin"
                self._stream, self._digest, self._filled = (
                    (self._directory / name).open("wb"),
                    hashlib.sha256(),
                    0,
                )
                self.shards.append({"file": name})
            part, tokens = np.split(tokens, [self._shard_tokens - self._filled])
            self._stream.write(part.tobytes())
            self._digest.update(part.tobytes())
            self._filled += part.size
            self.tokens += part.size
            if self._filled == self._shard_tokens:
                self.close()

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None
            self.shards[-1] |= {"tokens": self._filled, "sha256": self._digest.hexdigest()}


def _write(
    directory: Path,
    request: dict,
    about: dict,
    split: Callable[[], Iterator[tuple[str, str]]],
    tokenizer: Tokenizer | None,
    progress: bool,
) -> None:
    """Writes shards, tokenizer and manifest. tokenizer: None = make the one that `about` names."""
    total = 0
    if tokenizer is None:

        def texts() -> Iterator[str]:
            nonlocal total
            with progress_bar("making the tokenizer", None, progress) as bar:
                seen = set()
                for name, text in split():
                    if name in seen and about["tokenizer"] == "char":
                        yield "\n"  # the document separator
                    seen.add(name)
                    total += len(text.encode())
                    if name == "train" or about["tokenizer"] == "char":
                        bar.update(len(text.encode()))
                        yield text

        tokenizer = make_tokenizer(about["tokenizer"], texts)
    dtype = _token_dtype(request["token_dtype"], tokenizer.vocab_size)
    writers = {name: _Writer(directory, name, request["shard_tokens"]) for name in SPLITS}
    begins = True  # whether the next piece is the first of a document
    with progress_bar("tokenizing", total or None, progress) as bar:
        for batch in _batches(split(), tokenizer):
            encoded = tokenizer.encode_batch([piece for _, piece, _ in batch])
            for (name, piece, last), ids in zip(batch, encoded, strict=True):
                writer, size = writers[name], len(piece.encode())
                before, after = around(tokenizer, first=not writer.documents)
                ids = np.array((before if begins else []) + ids + (after if last else []), dtype)
                begins = last
                writer.write(ids)
                writer.bytes += size
                writer.token_bytes += int(tokenizer.byte_lengths[ids].sum(dtype=np.int64))
                writer.documents += last
                bar.update(size)
    for writer in writers.values():
        writer.close()
    tokenizer.save(directory / "tokenizer")
    manifest = {
        "format": FORMAT,
        **about,
        "request": request,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "dtype": dtype.str,
        "vocab_size": tokenizer.vocab_size,
        "eot_id": tokenizer.eot_id,
        "splits": {
            name: {"tokens": w.tokens, "bytes": w.bytes, "token_bytes": w.token_bytes, "documents": w.documents,
                   "shards": w.shards}
            for name, w in writers.items()
        },
    }  # fmt: skip
    manifest["checksum"] = checksum(manifest)
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    shards = [shard for writer in writers.values() for shard in writer.shards]
    verified = {shard["file"]: shard_stamp((directory / shard["file"]).stat(), shard) for shard in shards}
    (directory / VERIFIED).write_text(json.dumps(verified), encoding="utf-8")


def _batches(documents: Iterator[tuple[str, str]], tokenizer: Tokenizer) -> Iterator[list[tuple[str, str, bool]]]:
    """Groups of (split, piece of a document, whether it is the last), each of about _BATCH characters."""
    batch, size = [], 0
    for name, text in documents:
        pieces = list(tokenizer.pieces(text))
        for number, piece in enumerate(pieces, 1):
            batch.append((name, piece, number == len(pieces)))
            size += len(piece)
            if size >= _BATCH:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch

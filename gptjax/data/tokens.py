"""Token shards on disk: a source, split and tokenised once, then read by memory map.

A directory holds train-00000.bin …, validation-00000.bin …, manifest.json (what it was made from, counts
and sha256 of each shard) and tokenizer/. It is written beside its place and renamed into it whole.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from tqdm import tqdm

from gptjax import console
from gptjax.data import sources
from gptjax.data.splits import SPLITS, splitter
from gptjax.data.tokenizer import Tokenizer, make_tokenizer
from gptjax.errors import InputError

try:
    import fcntl
except ImportError:  # Windows: nobody stops two processes from preparing one directory at once
    fcntl = None

_FORMAT = 1
_MANIFEST = "manifest.json"
_BATCH = 1 << 21  # characters tokenised at a time
_OPEN_SHARDS = 512  # each memory map holds a file descriptor; 1,024 is the usual limit of a process


class TokenShards:
    """The tokens of one split, in shards, by memory map; len() is the number of tokens.

    dtype: of the files ('<u2' or '<u4'); vocab_size; eot_id (None: no end-of-text between documents);
    bytes: UTF-8 bytes of the text; documents: their number; fingerprint: of the tokens in their order.
    """

    def __init__(self, directory: Path, manifest: dict, split: str):
        record = manifest["splits"][split]
        self.dtype = np.dtype(manifest["dtype"])
        self.vocab_size: int = manifest["vocab_size"]
        self.eot_id: int | None = manifest["eot_id"]
        self.bytes: int = record["bytes"]
        self.documents: int = record["documents"]
        self.fingerprint = hashlib.sha256("".join(s["sha256"] for s in record["shards"]).encode()).hexdigest()
        self._paths = [directory / shard["file"] for shard in record["shards"]]
        self._ends = np.cumsum([0] + [shard["tokens"] for shard in record["shards"]])
        self._shard = functools.lru_cache(_OPEN_SHARDS)(self._map)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _map(self, index: int) -> np.ndarray:
        return np.asarray(np.memmap(self._paths[index], self.dtype, "r"))

    def read(self, starts: np.ndarray, length: int) -> np.ndarray:
        """int32 [n, length]: the `length` tokens from each of starts, int64 [n]. IndexError: out of range."""
        starts = np.asarray(starts, np.int64)
        if starts.size and (starts.min() < 0 or starts.max() + length > len(self)):
            raise IndexError(f"window of {length} tokens outside the {len(self)} tokens of this split")
        out = np.empty((starts.size, length), np.int32)
        shards = np.searchsorted(self._ends, starts, side="right") - 1
        offsets = starts - self._ends[shards]
        # Row by row: slices are contiguous copies, twice as quick as fancy indexing at [512, 1025].
        for row, shard, offset in zip(out, shards.tolist(), offsets.tolist(), strict=True):
            part = self._shard(shard)[offset : offset + length]
            row[: part.size] = part
            filled = part.size
            while filled < length:  # the window goes on in the next shard
                shard += 1
                part = self._shard(shard)[: length - filled]
                row[filled : filled + part.size] = part
                filled += part.size
        return out


def prepare(
    source: str,
    tokenizer: str,
    directory: str | os.PathLike,
    *,
    validation: float | str = 0.1,
    text_field: str = "text",
    seed: int = 0,
    shard_tokens: int = 2**27,
    token_dtype: str | None = None,
    progress: bool = True,
) -> tuple[Tokenizer, dict[str, TokenShards]]:
    """Splits and tokenises a source into `directory`, or reuses what is there when nothing changed.

    source, text_field: as `sources.documents`. tokenizer: as `make_tokenizer`; a BPE is trained on the
    train split, a character vocabulary is taken from both. validation: the fraction of documents held
    out, chosen by a hash of seed and name, at least one on each side; of a single document, the last
    fraction of its characters; or another source. token_dtype: 'uint16' or 'uint32'; None takes the
    smaller that holds the vocabulary. Each document ends with end-of-text where the tokenizer has one.
    Memory grows with the longest document, not with the source.

    Returns the tokenizer and the splits 'train' and 'validation'. InputError: whatever `documents`,
    `make_tokenizer` and `open_shards` refuse; a vocabulary larger than token_dtype; a directory with
    something else in it; a full disk.
    """
    if "://" in str(directory):
        raise InputError(f"token shards are read by memory map, so {directory} must be a local directory")
    if token_dtype not in (None, "uint16", "uint32"):
        raise InputError(f"token dtype {token_dtype!r} is neither 'uint16' nor 'uint32'")
    if not isinstance(validation, str) and not 0 < validation < 1:
        raise InputError(f"validation is {validation}; give a fraction between 0 and 1, or a source")
    if shard_tokens < 1:
        raise InputError(f"a shard of {shard_tokens} tokens can't be; give a positive number")
    directory = Path(directory).expanduser().resolve()
    made = tokenizer == "char" or tokenizer.startswith("bpe:")
    given = None if made else make_tokenizer(tokenizer, list)
    if given or tokenizer[4:].isdecimal():  # refused before any work, where the size is known
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
    if _made_from(directory) == request:
        return open_shards(directory, progress=progress)
    with _locked(directory):
        if _made_from(directory) != request:  # another process may have made it meanwhile
            split = splitter(source, validation, text_field, seed)
            about = {"source": source, "tokenizer": tokenizer, "validation_source": str(validation)}
            with _replacing(directory) as partial:
                _write(partial, request, about, split, given, progress)
    return open_shards(directory, progress=progress)


def open_shards(directory: str | os.PathLike, *, progress: bool = True) -> tuple[Tokenizer, dict[str, TokenShards]]:
    """Opens what `prepare` wrote. InputError: no manifest, or shards or tokenizer that don't match it.

    A shard's hash is checked when its size or time differ from the last check's (verified.json).
    """
    directory = Path(directory).expanduser().resolve()
    manifest = _read_manifest(directory)
    if manifest is None:
        raise InputError(f"{directory} has no {_MANIFEST}; name a directory that `prepare` wrote")
    _verify(directory, manifest, progress)
    tokenizer = Tokenizer.load(directory / "tokenizer")
    if tokenizer.fingerprint != manifest["tokenizer_fingerprint"]:
        raise InputError(f"the tokenizer in {directory} isn't the one its tokens were made with; {_rebuild(directory)}")
    return tokenizer, {split: TokenShards(directory, manifest, split) for split in SPLITS}


def _rebuild(directory: Path) -> str:
    return f"delete {directory} to have it built again"


def _read_manifest(directory: Path) -> dict | None:
    """The manifest, None where there is none. InputError: damaged or of another format version."""
    try:
        manifest = json.loads((directory / _MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != _FORMAT:
            raise ValueError(f"format {manifest['format']}, not {_FORMAT}")
        if manifest["checksum"] != _checksum(manifest):
            raise ValueError("its checksum differs")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{directory / _MANIFEST} is damaged ({error}); {_rebuild(directory)}") from None
    return manifest


def _checksum(manifest: dict) -> str:
    content = {key: value for key, value in manifest.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _made_from(directory: Path) -> dict | None:
    """The request that the directory answers, None where there is none. InputError: other files in it."""
    manifest = _read_manifest(directory)
    if manifest is None and directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise InputError(f"{directory} holds something else than token shards; name another or empty it")
    return manifest and manifest["request"]


def _seen(stat: os.stat_result, shard: dict) -> list:
    """What verified.json keeps of a shard whose content was hashed."""
    return [stat.st_size, stat.st_mtime_ns, shard["sha256"]]


def _verify(directory: Path, manifest: dict, progress: bool) -> None:
    item = np.dtype(manifest["dtype"]).itemsize
    record = directory / "verified.json"
    try:
        known = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    verified = {}
    shards = [shard for split in SPLITS for shard in manifest["splits"][split]["shards"]]
    with _bar("verifying shards", sum(s["tokens"] for s in shards) * item, progress) as bar:
        for shard in shards:
            path = directory / shard["file"]
            try:
                stat = path.stat()
            except FileNotFoundError:
                raise InputError(f"token shard {path} is missing; {_rebuild(directory)}") from None
            if stat.st_size != shard["tokens"] * item:
                raise InputError(
                    f"token shard {path} has {stat.st_size} bytes, not the {shard['tokens'] * item} of its "
                    f"manifest; {_rebuild(directory)}"
                )
            seen = _seen(stat, shard)
            if known.get(shard["file"]) != seen:
                digest = hashlib.sha256()
                with path.open("rb") as stream:
                    while block := stream.read(1 << 22):
                        digest.update(block)
                        bar.update(len(block))
                if digest.hexdigest() != shard["sha256"]:
                    raise InputError(f"token shard {path} doesn't match its manifest's sha256; {_rebuild(directory)}")
            verified[shard["file"]] = seen
    if verified != known:
        with suppress(OSError):  # a read-only copy is checked each time
            temporary = directory / f".verified.{os.getpid()}"
            temporary.write_text(json.dumps(verified), encoding="utf-8")
            temporary.replace(record)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """One process prepares a directory at a time; the lock ends with the process, however it ends."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with open(directory.with_name(f".{directory.name}.lock"), "w") as lock:
        if fcntl:
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def _replacing(directory: Path) -> Iterator[Path]:
    """Yields a sibling to write into, which then takes the directory's place; call it under the lock."""
    partial, replaced = (directory.with_name(f".{directory.name}.{end}") for end in ("partial", "replaced"))
    for leftover in (partial, replaced):  # of a process that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        partial.mkdir()
        yield partial
        if directory.exists():
            directory.rename(replaced)
        partial.rename(directory)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise InputError(
            f"the disk is full while writing token shards to {directory}; free some space or name another directory"
        ) from None
    finally:
        for leftover in (partial, replaced):
            shutil.rmtree(leftover, ignore_errors=True)


def _bar(label: str, total: int | None, progress: bool) -> tqdm:
    return console.progress(desc=label, total=total, unit="B", unit_scale=True, delay=1, disable=not progress)


def _token_dtype(asked: str | None, vocab_size: int) -> np.dtype:
    dtype = np.dtype(asked or ("uint16" if vocab_size <= 2**16 else "uint32")).newbyteorder("<")
    if vocab_size - 1 > np.iinfo(dtype).max:
        raise InputError(f"a vocabulary of {vocab_size} doesn't fit token dtype {asked}; use uint32 or leave it unset")
    return dtype


class _Writer:
    """Writes one split's tokens into shards of shard_tokens, with their hashes."""

    def __init__(self, directory: Path, split: str, shard_tokens: int):
        self.shards: list[dict] = []
        self.tokens = self.bytes = self.documents = 0
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
    """Writes shards, tokenizer and manifest; without a tokenizer, makes the one `about` names."""
    total = 0
    if tokenizer is None:

        def texts() -> Iterator[str]:
            nonlocal total
            with _bar("making the tokenizer", None, progress) as bar:
                for name, text in split():
                    total += len(text.encode())
                    if name == "train" or about["tokenizer"] == "char":
                        bar.update(len(text.encode()))
                        yield text

        tokenizer = make_tokenizer(about["tokenizer"], texts)
    dtype = _token_dtype(request["token_dtype"], tokenizer.vocab_size)
    writers = {name: _Writer(directory, name, request["shard_tokens"]) for name in SPLITS}
    with _bar("tokenising", total or None, progress) as bar:
        for batch in _batches(split(), tokenizer):
            encoded = tokenizer.encode_batch([piece for _, piece, _ in batch])
            for (name, piece, last), ids in zip(batch, encoded, strict=True):
                writer, size = writers[name], len(piece.encode())
                if last and tokenizer.eot_id is not None:
                    ids.append(tokenizer.eot_id)
                writer.write(np.array(ids, dtype))
                writer.bytes += size
                writer.documents += last
                bar.update(size)
    for writer in writers.values():
        writer.close()
    tokenizer.save(directory / "tokenizer")
    manifest = {
        "format": _FORMAT,
        **about,
        "request": request,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "dtype": dtype.str,
        "vocab_size": tokenizer.vocab_size,
        "eot_id": tokenizer.eot_id,
        "splits": {
            name: {"tokens": w.tokens, "bytes": w.bytes, "documents": w.documents, "shards": w.shards}
            for name, w in writers.items()
        },
    }
    manifest["checksum"] = _checksum(manifest)
    (directory / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    shards = [shard for writer in writers.values() for shard in writer.shards]
    verified = {shard["file"]: _seen((directory / shard["file"]).stat(), shard) for shard in shards}
    (directory / "verified.json").write_text(json.dumps(verified), encoding="utf-8")


def _batches(documents: Iterator[tuple[str, str]], tokenizer: Tokenizer) -> Iterator[list[tuple[str, str, bool]]]:
    """Groups of (split, piece of a document, whether its last), each of about _BATCH characters."""
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

"""Token shards on disk: a source, split and tokenized once, then read by memory map.

A directory holds train-00000.bin …, validation-00000.bin …, manifest.json (what it was made from, counts
and sha256 of each shard) and tokenizer/. It is written beside its place and renamed into it whole, and never
replaced: a run that has it open would read another's tokens.
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
from gptjax.data.bpe import make_tokenizer
from gptjax.data.splits import SPLITS, splitter
from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import InputError

try:
    import fcntl
except ImportError:  # Windows: nobody stops two processes from preparing one directory at once
    fcntl = None

_FORMAT = 1
_MANIFEST = "manifest.json"
_BATCH = 1 << 21  # characters tokenized at a time
_OPEN_SHARDS = 512  # each memory map holds a file descriptor; 1,024 is the usual limit of a process


class TokenShards:
    """The tokens of one split, in shards, by memory map; len() is the number of tokens.

    dtype: of the files ('<u2' or '<u4'); vocab_size; eot_id (None: no end-of-text between documents);
    bytes: UTF-8 bytes of the text; documents: their number; fingerprint: of the tokens in their order; name: of the
    split and its source, for messages; directory: where they are.
    """

    def __init__(self, directory: Path, manifest: dict, split: str, tokenizer: Tokenizer):
        record = manifest["splits"][split]
        self.name = f"the {split} split of {manifest['source']}"
        self.directory = directory
        self._tokenizer, self._token_bytes = tokenizer, record.get("token_bytes")
        self._separated = "between_documents" in manifest["request"]  # not by an earlier version
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

    @functools.cached_property
    def byte_ratio(self) -> float:
        """Bytes of the text itself for each byte that its tokens stand for (Tokenizer.byte_lengths): 1 but for a
        tokenizer that normalizes, as GPT-1's, whose tokens' bytes are not the text's. Separators count on both sides.
        """
        if self._tokenizer.lossless:
            return 1.0
        lengths = self._tokenizer.byte_lengths
        if self._token_bytes is None:  # of an earlier version
            blocks = (self._shard(i)[j : j + 2**22] for i in range(len(self._paths))
                      for j in range(0, int(self._ends[i + 1] - self._ends[i]), 2**22))  # fmt: skip
            self._token_bytes = sum(int(lengths[block].sum(dtype=np.int64)) for block in blocks)
        if self.eot_id is not None:
            separators = self.documents * int(lengths[self.eot_id])
        elif self.documents > 1 and self._separated:
            separators = (self.documents - 1) * int(lengths[self._tokenizer.separator_ids].sum())
        else:
            separators = 0
        return (self.bytes + separators) / max(self._token_bytes, 1)

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


def around(tokenizer: Tokenizer, first: bool) -> tuple[list[int], list[int]]:
    """Ids before and after a document's own: end-of-text ends each one; where the tokenizer has none,
    Tokenizer.separator_ids stand between two, so before each but the `first`."""
    if tokenizer.eot_id is not None:
        return [], [tokenizer.eot_id]
    return [] if first else tokenizer.separator_ids, []


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
    """Splits and tokenizes a source into `directory`, or reuses what is there when nothing changed.

    by_content: `directory` is a cache that many runs share; the tokens are in a folder of it that is named by all
    that they depend on, so that another source, tokenizer or seed gets another folder.

    source, text_field: as `sources.documents`. tokenizer: as `make_tokenizer`; a BPE is trained on the
    train split, a character vocabulary is taken from both. validation: the fraction of documents held
    out, chosen by a hash of seed and name, at least one on each side; of a single document, the last
    fraction of its characters; or another source. split, document_separator: as `splits.splitter`. token_dtype:
    'uint16' or 'uint32'; None takes the smaller that holds the vocabulary. Each document ends with end-of-text where
    the tokenizer has one; else Tokenizer.separator_ids stand between two documents.
    Memory grows with the longest document, not with the source.

    Returns the tokenizer and the splits 'train' and 'validation'. InputError: whatever `documents`,
    `make_tokenizer` and `open_shards` refuse; a vocabulary larger than token_dtype; a directory with
    something else in it, or with tokens of another request; a full disk.
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
    # Asked for only where it isn't the default, so that tokens made before there was a choice still answer.
    request |= {"split": split} if split else {}
    request |= {"document_separator": document_separator} if document_separator else {}
    if tokenizer == "char" or (given and given.eot_id is None):
        request["between_documents"] = "blank line"  # once there was nothing between them
    if by_content:
        directory /= _short_hash({"format": _FORMAT, **request})
    if _made_from(directory) == request:
        return open_shards(directory, progress=progress)
    with _locked(directory):
        there = _made_from(directory)
        if there is None:
            splitting = splitter(source, validation, text_field, seed, split=split, separator=document_separator)
            about = {"source": source, "tokenizer": tokenizer, "validation_source": str(validation)}
            with _made_in_place(directory) as partial:
                _write(partial, request, about, splitting, given, progress)
        elif there != request:  # else another process made it meanwhile
            different = ", ".join(k for k in sorted(request.keys() | there.keys()) if request.get(k) != there.get(k))
            raise InputError(
                f"{directory} holds tokens of another request ({different}), which a run may be reading; name another "
                "directory or delete it"
            )
    return open_shards(directory, progress=progress)


def shared_tokenizer(spec: str, texts: Callable[[], Iterator[str]], about: dict, cache: str | os.PathLike) -> str:
    """Directory of the tokenizer that several sources share: the one `spec` names, or one trained on all of `texts`
    and kept in `cache` in a folder that is named by `about`, what the texts are."""
    if not (spec == "char" or spec.startswith("bpe:")):
        return spec
    directory = Path(cache).expanduser().resolve() / f"tokenizer-{_short_hash({'tokenizer': spec, **about})}"
    with _locked(directory):
        if not directory.exists():
            with _made_in_place(directory) as partial:
                make_tokenizer(spec, texts).save(partial)
    return str(directory)


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
    return tokenizer, {split: TokenShards(directory, manifest, split, tokenizer) for split in SPLITS}


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


def _short_hash(request: dict) -> str:
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:16]


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
def _made_in_place(directory: Path) -> Iterator[Path]:
    """Yields a sibling to write into, which then becomes the directory (new or empty); call it under the lock."""
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
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
            f"the disk is full while writing token shards to {directory}; free some space or name another directory"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


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
    """Writes shards, tokenizer and manifest; without a tokenizer, makes the one `about` names."""
    total = 0
    if tokenizer is None:

        def texts() -> Iterator[str]:
            nonlocal total
            with _bar("making the tokenizer", None, progress) as bar:
                seen = set()
                for name, text in split():
                    if name in seen and about["tokenizer"] == "char":
                        yield "\n"  # stands between two documents
                    seen.add(name)
                    total += len(text.encode())
                    if name == "train" or about["tokenizer"] == "char":
                        bar.update(len(text.encode()))
                        yield text

        tokenizer = make_tokenizer(about["tokenizer"], texts)
    dtype = _token_dtype(request["token_dtype"], tokenizer.vocab_size)
    writers = {name: _Writer(directory, name, request["shard_tokens"]) for name in SPLITS}
    begins = True  # the next piece is a document's first
    with _bar("tokenizing", total or None, progress) as bar:
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
        "format": _FORMAT,
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

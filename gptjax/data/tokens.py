"""Token shards on disk, read by memory map. prepare.py writes them.

A directory contains train-00000.bin …, validation-00000.bin …, manifest.json (what they were made from, counts and the
SHA-256 of each shard) and tokenizer/.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path

import numpy as np
from tqdm import tqdm

from gptjax import console
from gptjax.data.splits import SPLITS
from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import InputError

FORMAT = 1  # version of the manifest
MANIFEST, VERIFIED = "manifest.json", "verified.json"
_OPEN_SHARDS = 512  # each memory map holds a file descriptor; 1,024 is the usual limit of a process


class TokenShards:
    """The memory-mapped token shards of one split; len() is the number of tokens.

    dtype: of the files ('<u2' or '<u4'); vocab_size: of the tokenizer; eot_id: None = no end-of-text between documents;
    bytes: UTF-8 bytes of the text; documents: their number; fingerprint: SHA-256 of the tokens in order; name: of the
    split and its source, for the beginning of messages; directory: of the shards.
    """

    def __init__(self, directory: Path, manifest: dict, split: str, tokenizer: Tokenizer):
        record = manifest["splits"][split]
        self.name = f"The {split} split of {manifest['source']}"
        self.directory = directory
        self._tokenizer, self._token_bytes = tokenizer, record.get("token_bytes")
        self._separated = "between_documents" in manifest["request"]  # False for shards of earlier versions
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
        """Bytes of the text per byte that its tokens stand for (Tokenizer.byte_lengths): 1 unless the tokenizer
        normalizes the text, like GPT-1's. Separators count on both sides.
        """
        if self._tokenizer.lossless:
            return 1.0
        lengths = self._tokenizer.byte_lengths
        if self._token_bytes is None:  # shards of earlier versions
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
        """int32 [n, length]: the `length` tokens from each position of starts, int64 [n]. IndexError: out of range."""
        starts = np.asarray(starts, np.int64)
        if starts.size and (starts.min() < 0 or starts.max() + length > len(self)):
            raise IndexError(f"window of {length} tokens outside the {len(self)} tokens of this split")
        out = np.empty((starts.size, length), np.int32)
        shards = np.searchsorted(self._ends, starts, side="right") - 1
        offsets = starts - self._ends[shards]
        # Row by row: contiguous slices are copied twice as fast as fancy indexing for [512, 1025].
        for row, shard, offset in zip(out, shards.tolist(), offsets.tolist(), strict=True):
            part = self._shard(shard)[offset : offset + length]
            row[: part.size] = part
            filled = part.size
            while filled < length:  # the window continues in the next shard
                shard += 1
                part = self._shard(shard)[: length - filled]
                row[filled : filled + part.size] = part
                filled += part.size
        return out


def around(tokenizer: Tokenizer, first: bool) -> tuple[list[int], list[int]]:
    """(ids before a document, ids after it): end-of-text after each or, if the tokenizer has none,
    Tokenizer.separator_ids before each but the `first`."""
    if tokenizer.eot_id is not None:
        return [], [tokenizer.eot_id]
    return [] if first else tokenizer.separator_ids, []


def open_shards(directory: str | os.PathLike, *, progress: bool = True) -> tuple[Tokenizer, dict[str, TokenShards]]:
    """Opens a directory written by `prepare`: (tokenizer, {'train', 'validation': shards}).

    The hash of a shard is verified if its size or modification time has changed since the last check (verified.json).
    InputError: no manifest, or shards or a tokenizer that do not match it.
    """
    directory = Path(directory).expanduser().resolve()
    manifest = read_manifest(directory)
    if manifest is None:
        raise InputError(f"{directory} has no {MANIFEST}: give a directory of token shards.")
    _verify(directory, manifest, progress)
    tokenizer = Tokenizer.load(directory / "tokenizer")
    if tokenizer.fingerprint != manifest["tokenizer_fingerprint"]:
        raise InputError(f"The tokenizer in {directory} is not that of its tokens: {_rebuild(directory)}")
    return tokenizer, {split: TokenShards(directory, manifest, split, tokenizer) for split in SPLITS}


def _rebuild(directory: Path) -> str:
    return f"delete {directory}, and it will be prepared again."


def read_manifest(directory: Path) -> dict | None:
    """The manifest; None if there is none. InputError: damaged, or another format version."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise ValueError(f"format {manifest['format']}, not {FORMAT}")
        if manifest["checksum"] != checksum(manifest):
            raise ValueError("its checksum differs")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{directory / MANIFEST} is damaged ({error}): {_rebuild(directory)}") from None
    return manifest


def checksum(manifest: dict) -> str:
    """SHA-256 (hex) of a manifest, without its own checksum."""
    content = {key: value for key, value in manifest.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def shard_stamp(stat: os.stat_result, shard: dict) -> list:
    """The entry in verified.json of a shard whose hash was checked."""
    return [stat.st_size, stat.st_mtime_ns, shard["sha256"]]


def _verify(directory: Path, manifest: dict, progress: bool) -> None:
    item = np.dtype(manifest["dtype"]).itemsize
    record = directory / VERIFIED
    try:
        known = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    verified = {}
    shards = [shard for split in SPLITS for shard in manifest["splits"][split]["shards"]]
    with progress_bar("verifying shards", sum(s["tokens"] for s in shards) * item, progress) as bar:
        for shard in shards:
            path = directory / shard["file"]
            try:
                stat = path.stat()
            except FileNotFoundError:
                raise InputError(f"The token shard {path} is missing: {_rebuild(directory)}") from None
            if stat.st_size != shard["tokens"] * item:
                raise InputError(
                    f"The token shard {path} has {stat.st_size} bytes, not the {shard['tokens'] * item} of its "
                    f"manifest: {_rebuild(directory)}"
                )
            stamp = shard_stamp(stat, shard)
            if known.get(shard["file"]) != stamp:
                digest = hashlib.sha256()
                with path.open("rb") as stream:
                    while block := stream.read(1 << 22):
                        digest.update(block)
                        bar.update(len(block))
                if digest.hexdigest() != shard["sha256"]:
                    raise InputError(f"The token shard {path} does not have its manifest's hash: {_rebuild(directory)}")
            verified[shard["file"]] = stamp
    if verified != known:
        with suppress(OSError):  # a read-only copy is verified each time
            temporary = directory / f".verified.{os.getpid()}"
            temporary.write_text(json.dumps(verified), encoding="utf-8")
            temporary.replace(record)


def progress_bar(label: str, total: int | None, progress: bool) -> tqdm:
    """A progress bar in bytes, shown after one second; progress: whether to show it at all."""
    return console.progress(desc=label, total=total, unit="B", unit_scale=True, delay=1, disable=not progress)

"""Compressed files, recognized by their first bytes: gzip, bzip2, xz, zstd, lz4, and zip archives.

Concatenated streams (from pigz, pbzip2, pzstd or `cat a.gz b.gz`) are read to the end.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zipfile
import zlib
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from gptjax.errors import InputError

SUFFIXES = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd", ".zstd": "zstd", ".lz4": "lz4", ".zip": "zip"}
_BUFFER = 1 << 20
_PIECE = 1 << 16  # bytes asked for at a time: of a file that is cut, what comes before is not lost
_DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, NotImplementedError, RuntimeError)


class Part(NamedTuple):
    """The content of a file, or of a member of a zip archive. name: without the compression suffix, to determine the
    format; label: its name, prefixed by that of the archive, for documents; path: for messages; size: bytes on disk."""

    name: str
    label: str
    path: str
    size: int
    stream: BinaryIO


def parts(stream: BinaryIO, label: str, path: str, size: int) -> Iterator[Part]:
    """The decompressed content of an open file: one part, or the members of a zip archive sorted by name.

    InputError: damaged, truncated, encrypted, or not compressed although its name has such a suffix.
    """
    kind = _kind(stream.read(16))
    stream.seek(0)
    name, expected = _split_suffix(label)
    if kind == "zip" and expected != "zip":
        kind = None  # .docx, .jar, .npz: other formats inside a zip container
    if kind is None and expected is not None:
        raise InputError(f"{path} is not a {expected} file, unlike its name: download it again, or rename it.")
    if kind == "zip":
        yield from _members(stream, label, path)
        return
    if kind is not None:
        stream = io.BufferedReader(_Decompressed(stream, kind, path), _BUFFER)
    yield Part(name if expected else label, label, path, size, stream)


def uncompressed_name(name: str) -> str:
    """The name without its compression suffix."""
    return _split_suffix(name)[0]


def _split_suffix(name: str) -> tuple[str, str | None]:
    suffix = next((s for s in SUFFIXES if name.lower().endswith(s)), None)
    return (name[: -len(suffix)], SUFFIXES[suffix]) if suffix else (name, None)


def _kind(head: bytes) -> str | None:
    """Compression of a file that begins with these bytes; None = not compressed."""
    if head.startswith(b"\x1f\x8b"):
        return "gzip"
    if head.startswith(b"BZh") and head[4:10] in (b"1AY&SY", b"\x17rE8P\x90"):  # a block, or the end of an empty stream
        return "bzip2"
    if head.startswith(b"\xfd7zXZ\0"):
        return "xz"
    if head.startswith(b"\x04\x22\x4d\x18"):
        return "lz4"
    # pzstd writes a skippable frame first.
    if head.startswith(b"\x28\xb5\x2f\xfd") or (head[1:4] == b"\x2a\x4d\x18" and head[0] & 0xF0 == 0x50):
        return "zstd"
    return "zip" if head.startswith((b"PK\x03\x04", b"PK\x05\x06")) else None


def _members(stream: BinaryIO, label: str, path: str) -> Iterator[Part]:
    try:
        archive = zipfile.ZipFile(stream)
    except zipfile.BadZipFile as error:
        raise InputError(f"{path} is a damaged zip file ({error}): download it again.") from None
    for member in sorted(archive.infolist(), key=lambda m: m.filename):
        folders = member.filename.split("/")
        if member.is_dir() or folders[0] == "__MACOSX" or any(f.startswith(".") for f in folders):
            continue
        where = f"{path}/{member.filename}"
        if member.flag_bits & 1:
            raise InputError(f"{where} is encrypted: extract {path} with its password.")
        checked = io.BufferedReader(_Decompressed(archive.open(member), "zip", path), _BUFFER)
        yield from parts(checked, f"{label}/{member.filename}", where, member.compress_size)


class _Decompressed(io.RawIOBase):
    """Stream of decompressed bytes that raises InputError for damaged and truncated data."""

    def __init__(self, stream: BinaryIO, kind: str, path: str):
        self._kind, self._path = kind, path
        self._stream = _open(stream, kind)
        self._read = getattr(self._stream, "read1", self._stream.read)  # read asks again, and loses what it has

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._kind == "zip"

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        return self._stream.tell()

    def readinto(self, buffer) -> int:
        try:
            data = self._read(min(len(buffer), _PIECE))
        except _DAMAGE as error:
            if getattr(error, "errno", None) is not None:  # a disk error
                raise
            if "too much memory" in str(error):
                raise InputError(
                    f"{self._path} was compressed with a window that is too large for this reader: decompress it with "
                    "`zstd -d --long=31`."
                ) from None
            raise InputError(f"{self._path} is a damaged {self._kind} file ({error}): download it again.") from None
        buffer[: len(data)] = data
        return len(data)


def _open(stream: BinaryIO, kind: str) -> BinaryIO:
    if kind == "gzip":
        return gzip.GzipFile(fileobj=stream, mode="rb")
    if kind == "bzip2":
        return bz2.BZ2File(stream)
    if kind == "xz":
        return lzma.LZMAFile(stream)
    if kind == "zip":
        return stream
    import pyarrow

    return pyarrow.CompressedInputStream(pyarrow.PythonFile(stream, mode="r"), kind)

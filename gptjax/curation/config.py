"""The config of a curation: what is read and how, and what its recipe may be given."""

import dataclasses
from typing import Annotated, Literal

from gptjax import paths
from gptjax.errors import InputError
from gptjax.ranges import Count, Range, Seed

Bytes = Annotated[int, Range(1, 2**40)]


@dataclasses.dataclass(frozen=True)
class CurateConfig:
    """A curation: its input, its output and the files that its steps need. A recipe leaves out the steps whose files
    are not given.

    input: what data/sources.py reads, but hf: a file, a folder, a glob pattern, gs:// paths, 'stdlib'.
    text_field: field of JSON and Parquet rows that holds the text.
    id_field: field with a row's own id; rows that repeat the id of an earlier one are dropped by `exact`.
    invalid_utf8: of a document with bytes that are not UTF-8: 'drop' it, or 'replace' each by U+FFFD.
    longest: bytes of a row or a text file; longer ones are skipped.
    format: of the output: 'parquet' or 'jsonl' (compressed, .jsonl.gz).
    shard_bytes: small files are read together, up to so many bytes on disk; a file is never divided.
    samples: documents of each reason that are kept in removed/ for reading.
    seed: of every draw.
    good: corpus that documents should resemble; with `bad` it trains the quality classifier.
    bad: corpus of what they should not resemble, as an unfiltered crawl.
    evaluation: folder of evaluation sets, each a file of rows, whose text is cut out of the corpus.
    """

    input: str | None = paths.field(paths.SOURCE)
    text_field: str = "text"
    id_field: str = "id"
    invalid_utf8: Literal["drop", "replace"] = "drop"
    longest: Bytes = 64 << 20
    format: Literal["parquet", "jsonl"] = "parquet"
    shard_bytes: Bytes = 64 << 20
    samples: Count = 10
    seed: Seed = 0
    good: str | None = paths.field(paths.SOURCE)
    bad: str | None = paths.field(paths.SOURCE)
    evaluation: str | None = paths.field()

    def __post_init__(self):
        if self.input and self.input.startswith("hf:"):
            raise InputError(f"{self.input} is not a file: download the data set, and give its folder.")
        for name, known in (("invalid_utf8", ("drop", "replace")), ("format", ("parquet", "jsonl"))):
            if getattr(self, name) not in known:
                raise InputError(f"config.{name}={getattr(self, name)!r} is unknown: use {' or '.join(known)}.")
        if (self.good is None) != (self.bad is None):
            raise InputError("The quality classifier learns from two corpora: give config.good and config.bad.")

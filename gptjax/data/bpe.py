"""Making tokenizers: training a byte-level BPE, reading GPT-1's and GPT-2's vocabulary files, collecting characters."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence

import tokenizers
from etils import epath
from tokenizers import decoders, models, pre_tokenizers, trainers

from gptjax.data.specials import END_OF_TEXT, named_eos
from gptjax.data.tokenizer import END_OF_WORD, FORMS, Tokenizer, check_unicode, from_published, split_text
from gptjax.errors import InputError

_SMALLEST_BPE = 257  # 256 bytes and end-of-text
_LONGEST_WORD = 400  # characters of one run of letters, digits, blanks or symbols; training time is quadratic in it
_LONG_RUN = re.compile(rf"\S{{{_LONGEST_WORD + 1}}}|\s{{{_LONGEST_WORD + 1}}}")


def make_tokenizer(spec: str, texts: Callable[[], Iterable[str]]) -> Tokenizer:
    """The tokenizer that a config names: 'bpe:SIZE', 'char' (both made from texts()) or a directory.

    InputError: any other spec, or a directory without a tokenizer.
    """
    if spec == "char":
        return character_tokenizer(texts())
    if spec.startswith("bpe:"):
        if not spec[4:].isdecimal():
            raise InputError(f"{spec!r} has no vocabulary size. {FORMS}")
        return train_bpe(texts(), int(spec[4:]))
    directory = epath.Path(spec or "?")
    if not directory.is_dir():
        raise InputError(f"{spec!r} is neither a known tokenizer nor an existing directory. {FORMS}")
    if (directory / "tokenizer.json").exists() or (directory / "tokenizer_meta.json").exists():
        return Tokenizer.load(directory)
    if (directory / "encoder_bpe_40000.json").exists():
        return load_gpt1(directory)
    if (directory / "encoder.json").exists():
        return load_gpt2(directory)
    if (directory / "vocab.json").exists():  # Hugging Face's file names for both
        vocabulary, *_ = _read_vocabulary(directory, ("vocab.json", "merges.txt"))
        return (load_gpt1 if f"the{END_OF_WORD}" in vocabulary else load_gpt2)(directory)
    raise InputError(f"{spec} contains no tokenizer files. {FORMS}")


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE on texts; `<|endoftext|>` has the last id, as in GPT-2.

    Returns a smaller vocabulary, with a warning, if the texts have too few distinct pairs for vocab_size.
    InputError: vocab_size below 257 (256 bytes and end-of-text).

    The library's training time is quadratic in the longest run of letters, digits, symbols or blanks, so for training
    runs of more than 400 characters are split, with a warning. Encoding is not quadratic.
    """
    if vocab_size < _SMALLEST_BPE:
        raise InputError(
            f"A byte-level BPE of {vocab_size} ids has no room for 256 bytes and end-of-text: use at least "
            f"bpe:{_SMALLEST_BPE}."
        )
    engine = tokenizers.Tokenizer(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    num_split = [0]
    engine.train_from_iterator(_training_pieces(texts, num_split), trainer)
    if num_split[0]:
        warnings.warn(
            f"To train the tokenizer, {num_split[0]} runs of more than {_LONGEST_WORD} letters, digits, symbols or "
            "blanks were split into pieces of that length. The texts themselves are encoded unchanged.",
            stacklevel=2,
        )
    model = json.loads(engine.to_str())["model"]
    vocabulary = model["vocab"]
    vocabulary[END_OF_TEXT] = len(vocabulary)
    if len(vocabulary) < vocab_size:
        warnings.warn(
            f"The text is too small for {vocab_size} tokens: the vocabulary has only {len(vocabulary)}.",
            stacklevel=2,
        )
    return _byte_level(vocabulary, [tuple(pair) for pair in model["merges"]])


def character_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """A tokenizer with one id per character of the texts, ordered by code point. InputError: no text at all."""
    characters = sorted(set().union(*map(set, texts)))
    if not characters:
        raise InputError("The source has no text to collect characters from: give a source that has some.")
    return character_tokenizer_of(characters)


def character_tokenizer_of(characters: Sequence[str]) -> Tokenizer:
    """A tokenizer whose id i is characters[i]; they are distinct. InputError: a lone surrogate."""
    check_unicode(["".join(characters)])
    engine = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(characters)}, merges=[]))
    engine.decoder = decoders.Fuse()
    return Tokenizer(engine, "char")


def load_gpt2(path: str | os.PathLike) -> Tokenizer:
    """Loads GPT-2's vocabulary from encoder.json + vocab.bpe or vocab.json + merges.txt in the directory `path`.

    InputError: missing or damaged files.
    """
    vocabulary, merges, names = _read_vocabulary(path, ("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))
    try:
        engine = _byte_level_engine(vocabulary, merges)
    except Exception as error:
        raise InputError(f"{names} in {path} do not match ({error}): download both again.") from None
    tokenizer = from_published(json.loads(engine.to_str()), "bpe", epath.Path(path))
    if tokenizer.eot_id is None and named_eos(epath.Path(path)) in (None, END_OF_TEXT):
        return tokenizer.with_specials([END_OF_TEXT])
    return tokenizer


def load_gpt1(path: str | os.PathLike) -> Tokenizer:
    """Loads GPT-1's vocabulary from encoder_bpe_40000.json + vocab_40000.bpe or vocab.json + merges.txt in `path`.

    InputError: missing or damaged files.
    """
    vocabulary, merges, names = _read_vocabulary(
        path, ("encoder_bpe_40000.json", "vocab_40000.bpe"), ("vocab.json", "merges.txt")
    )
    try:
        model = models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", end_of_word_suffix=END_OF_WORD)
    except Exception as error:
        raise InputError(f"{names} in {path} do not match ({error}): download both again.") from None
    engine = tokenizers.Tokenizer(model)
    engine.decoder = decoders.BPEDecoder(suffix=END_OF_WORD)
    return from_published(json.loads(engine.to_str()), "gpt1", epath.Path(path))


def _byte_level(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    engine = _byte_level_engine(vocabulary, merges)
    engine.add_special_tokens([END_OF_TEXT])
    return Tokenizer(engine, "bpe")


def _byte_level_engine(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> tokenizers.Tokenizer:
    engine = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    if END_OF_TEXT in vocabulary:
        engine.add_special_tokens([END_OF_TEXT])
    return engine


def _training_pieces(texts: Iterable[str], num_split: list[int]) -> Iterator[str]:
    """Pieces of the texts without words of more than _LONGEST_WORD characters; num_split[0] counts the words split."""
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for piece in (piece for text in texts for piece in split_text(text)):
        start = 0
        if _LONG_RUN.search(piece):  # a cheap test first: pre-tokenizing is slow
            for _, (begin, end) in words.pre_tokenize_str(piece):
                if end - begin > _LONGEST_WORD:
                    num_split[0] += 1
                    for stop in (*range(begin, end, _LONGEST_WORD), end):
                        yield piece[start:stop]
                        start = stop
        yield piece[start:]


def _read_vocabulary(
    path: str | os.PathLike, *pairs: tuple[str, str]
) -> tuple[dict[str, int], list[tuple[str, str]], str]:
    """(vocabulary, merges, file names) of the first pair of files that exists. InputError: none exists, or damaged."""
    directory = epath.Path(path)
    for names in pairs:
        files = [directory / name for name in names]
        if files[0].exists():
            break
    else:
        wanted = " or ".join(" + ".join(names) for names in pairs)
        raise InputError(f"{path} has no {wanted}: give the directory that contains them.")
    try:
        vocabulary = json.loads(files[0].read_text(encoding="utf-8"))
        lines = files[1].read_text(encoding="utf-8").split("\n")
        if not isinstance(vocabulary, dict):
            raise ValueError(f"{names[0]} is not a JSON object")
    except FileNotFoundError:
        raise InputError(f"{directory} has {names[0]} but no {names[1]}: add it.") from None
    except ValueError as error:
        raise InputError(f"{' + '.join(names)} in {directory} is damaged ({error}): download both again.") from None
    if lines[0].startswith("#version"):
        lines[0] = ""
    merges = [tuple(line.split()) for line in lines if line.strip()]
    for merge in merges:
        if len(merge) != 2:
            raise InputError(
                f"{files[1]} is damaged, because {' '.join(merge)!r} is not a pair of tokens: download the file again."
            )
    return vocabulary, merges, " + ".join(names)

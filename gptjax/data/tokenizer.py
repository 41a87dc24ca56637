"""Tokenizers: byte-level BPE (GPT-2, GPT-3), characters (nanoGPT) and GPT-1's lower-cased BPE.

All three are held as a Hugging Face `tokenizers` model, so a saved directory is readable elsewhere.
Sources: GPT-2 §2.2 and openai/gpt-2 encoder.py; openai/finetune-transformer-lm text_utils.py.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import tokenizers
from etils import epath
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from gptjax.data.gpt1_words import gpt1_words
from gptjax.data.specials import END_OF_TEXT, PAD, Specials, complete, named_eos
from gptjax.errors import InputError

END_OF_WORD = "</w>"  # GPT-1's mark on the last piece of a word
FORMS = (
    "a tokenizer is 'bpe:SIZE' (trained on the source, for example bpe:8192), 'char', or a directory with "
    "tokenizer.json, vocab.json + merges.txt, encoder.json + vocab.bpe, or encoder_bpe_40000.json + "
    "vocab_40000.bpe"
)
_SMALLEST_BPE = 257  # 256 bytes and end-of-text
_PIECE = 1 << 16  # characters; the library's time grows faster than the length of one string
# Where a text may be cut without changing GPT-2's ids: right before the blank that follows a
# non-blank. No alternative of the GPT-2 pattern reaches over such a place or looks behind it.
_CUT = re.compile(r"(?<=\S)[\n ]")
_LONGEST_WORD = 400  # characters of one run of letters, digits, blanks or signs; training is quadratic in it
_LONG_RUN = re.compile(rf"\S{{{_LONGEST_WORD + 1}}}|\s{{{_LONGEST_WORD + 1}}}")


class Tokenizer:
    """Text to ids and back.

    kind: 'bpe' (byte-level), 'char' or 'gpt1'.
    vocab_size: number of ids, int.
    eot_id: id of the token that ends a text: the one its files name, else `<|endoftext|>`; None where the vocabulary
        has none (char, GPT-1, until `with_specials`).
    unk_id: what a word with characters outside the vocabulary becomes (GPT-1); None where that can't be.
    specials: the roles of its special tokens (data/specials.py).
    byte_lengths: int32 [vocab_size], the UTF-8 bytes of text each token stands for. End-of-text counts
        1, as a separator, other special tokens 0; a GPT-1 token that ends a word counts its text and one space.
    lossless: whether ids give back the text to the byte; not where it is normalized first (GPT-1's lower case).
    fingerprint: sha256 (hex) of kind, vocabulary and merges; the same after save and load.
    """

    def __init__(self, engine: tokenizers.Tokenizer, kind: str, specials: Specials = Specials()):
        spec = json.loads(engine.to_str())
        if specials.in_text:
            spec = _marked(spec, specials.in_text, False)
            engine = tokenizers.Tokenizer.from_str(json.dumps(spec))
        engine.no_padding()
        engine.no_truncation()
        engine.encode_special_tokens = True  # "<|endoftext|>" inside a user's text is just text
        if kind == "gpt1":  # words come from spaCy; the saved file carries the library's approximation
            engine.normalizer = None
            engine.pre_tokenizer = None
        self.kind = kind
        self._engine = engine
        vocabulary = engine.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        special = {t["content"] for t in spec["added_tokens"] if t["special"]}
        self._specials = {token: vocabulary[token] for token in special}
        if kind == "bpe" and END_OF_TEXT in vocabulary:  # also where the files don't mark it
            self._specials[END_OF_TEXT] = vocabulary[END_OF_TEXT]
        self.specials = specials
        end = specials.eos or END_OF_TEXT
        self.eot_id: int | None = self._specials.get(end)
        added = {t["content"] for t in spec["added_tokens"]}
        self.unk_id: int | None = vocabulary.get(spec["model"].get("unk_token"))
        self._added = sorted(added - special, key=len, reverse=True)
        self.byte_lengths = np.zeros(self.vocab_size, np.int32)
        for token, index in vocabulary.items():
            self.byte_lengths[index] = _byte_length(token, kind, token in special, token in added, end)
        prefixed = (spec["pre_tokenizer"] or {}).get("add_prefix_space", False)
        self.lossless = kind == "char" or (kind == "bpe" and spec["normalizer"] is None and not prefixed)
        self.fingerprint = _fingerprint(kind, vocabulary, spec, specials)
        self._may_cut = kind == "bpe" and _is_gpt2_pattern(spec, added - special)
        if kind == "char":
            self._tokens = sorted(vocabulary, key=vocabulary.__getitem__)
            characters = self._tokens[: self.vocab_size - len(special)]
            codes = np.array([ord(c) for c in characters])
            self._id_of_code = np.full(int(codes.max()) + 2, -1, np.int32)  # the last entry: unknown
            self._id_of_code[codes] = np.arange(codes.size)

    def with_specials(self, names: Sequence[str]) -> Tokenizer:
        """A tokenizer with these special tokens too, at the ids from vocab_size on; those it has are kept.

        No text is encoded to one of them, also where it was before (an added token of that name). InputError: a name
        that is an ordinary token, or a vocabulary with unused ids.
        """
        engine = tokenizers.Tokenizer.from_str(json.dumps(_marked(json.loads(self._engine.to_str()), names, True)))
        new = [name for name in dict.fromkeys(names) if name not in self._specials and name not in self._added]
        for number, name in enumerate(new, self.vocab_size):
            if not name or engine.token_to_id(name) is not None:
                raise InputError(f"{name!r} can't be a special token: text may hold it as a token; take another name")
            engine.add_special_tokens([name])
            if engine.token_to_id(name) != number:  # the library counts the tokens, whatever their ids
                raise InputError(
                    f"{name!r} can't be added: some ids under {number} have no token; take a tokenizer without gaps"
                )
        in_text = tuple(name for name in self.specials.in_text if name not in names)
        return Tokenizer(engine, self.kind, dataclasses.replace(self.specials, in_text=in_text))

    def for_model(self, eos: Sequence[int] = (), bos: int | None = None, pad: int | None = None) -> Tokenizer:
        """With the ids that a model's own files give. Each of `eos` ends a sampled text; a role that the tokenizer's
        files don't name goes to the (first) id of it that is an added token. Ids outside the vocabulary have no token
        and are left out."""
        added = {t["id"]: t["content"] for t in json.loads(self._engine.to_str())["added_tokens"]}
        roles = {
            "eos": None if self.eot_id is not None else next((added[i] for i in eos if i in added), None),
            "bos": None if self.specials.bos else added.get(bos),
            "pad": None if self.specials.pad else added.get(pad),
        }
        roles = {role: content for role, content in roles.items() if content}
        grown = self.with_specials(list(roles.values()))
        ids = tuple(dict.fromkeys(i for i in eos if 0 <= i < self.vocab_size))
        return Tokenizer(grown._engine, self.kind, dataclasses.replace(grown.specials, **roles, stop_ids=ids))

    def special_id(self, name: str | None) -> int | None:
        """Id of a special token, None where the vocabulary has no special token of that name."""
        return self._specials.get(name)

    def token(self, index: int | None) -> str | None:
        """The token of an id as the vocabulary has it; None for None."""
        return None if index is None else self._engine.id_to_token(index)

    @property
    def pad_id(self) -> int | None:
        """Id of the padding token, `<|pad|>` where the files name none of its own; None where there is neither."""
        named = self.specials
        own = named.pad is not None and named.pad not in (named.bos, named.unk)
        index = self.special_id(named.pad) if own else None
        return self.special_id(PAD) if index in (None, self.eot_id) else index

    @property
    def bos_id(self) -> int | None:
        """Id of the token that begins a text: the one its files name, else end-of-text as in GPT-2."""
        index = self.special_id(self.specials.bos) if self.specials.bos else None
        return self.eot_id if index is None else index

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a sampled text, end-of-text the first; () where there is none."""
        ids = (self.eot_id, *self.specials.stop_ids)
        return tuple(dict.fromkeys(i for i in ids if i is not None))

    @property
    def separator_ids(self) -> list[int]:
        """Ids between two documents: end-of-text, or a line break (GPT-1's vocabulary) or blank line (characters) where
        the vocabulary has none. InputError: it has none of them."""
        if self.eot_id is not None:
            return [self.eot_id]
        line_break = self._engine.token_to_id("\n" + END_OF_WORD if self.kind == "gpt1" else "\n")
        if line_break is None:
            raise InputError(
                "the source has several documents, but the tokenizer has neither end-of-text nor a line break to "
                "stand between them: take a bpe tokenizer, or join the documents in one file"
            )
        return [line_break] * (1 if self.kind == "gpt1" else 2)  # GPT-1's text preparation leaves one of several

    def encode(self, text: str) -> list[int]:
        """Ids of one text. InputError: a character the vocabulary lacks (char), text that isn't Unicode."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, in parallel where the library can. Errors as `encode`."""
        if self.kind == "char":
            return [self._encode_characters(text) for text in texts]
        if self.kind == "gpt1":
            _refuse_surrogates(texts)
            words = [self._words(text) for text in texts]
            encoded = self._engine.encode_batch_fast(words, is_pretokenized=True, add_special_tokens=False)
            return [e.ids for e in encoded]
        parts = [list(self.pieces(text)) for text in texts]
        flat = [piece for pieces in parts for piece in pieces]
        try:
            encoded = iter(self._engine.encode_batch_fast(flat, add_special_tokens=False))
        except TypeError:  # how the library says that a string has no UTF-8 form
            _refuse_surrogates(texts)
            raise
        return [[i for _ in pieces for i in next(encoded).ids] for pieces in parts]

    def _words(self, text: str) -> list[str]:
        """GPT-1's words, its added tokens whole."""
        if not self._added:
            return gpt1_words(text)
        parts = re.split(f"({'|'.join(map(re.escape, self._added))})", text)
        return [word for i, part in enumerate(parts) for word in ([part] if i % 2 else gpt1_words(part))]

    def pieces(self, text: str) -> Iterator[str]:
        """Cuts a long text where that can't change its ids, so that it needn't be encoded in one go."""
        if self.kind == "char":
            return (text[i : i + _PIECE] for i in range(0, max(len(text), 1), _PIECE))
        return _pieces(text) if self._may_cut else iter([text])

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; bytes that aren't UTF-8 become U+FFFD. InputError: an id outside the vocabulary."""
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise InputError(
                    f"token id {i} is outside the tokenizer's vocabulary of {self.vocab_size}; use the "
                    "tokenizer the ids were made with"
                )
        if self.kind == "char":
            return "".join(self._tokens[i] for i in ids)
        return self._engine.decode(ids, skip_special_tokens=False)

    def save(self, directory: str | os.PathLike) -> None:
        """Writes tokenizer.json (Hugging Face format) and tokenizer_meta.json, each atomically."""
        directory = epath.Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        engine = self._engine
        if self.specials.in_text:
            spec = _marked(json.loads(engine.to_str()), self.specials.in_text, True)
            engine = tokenizers.Tokenizer.from_str(json.dumps(spec))
        if self.specials.adds_bos:  # for other readers; `encode` leaves it to who continues a text
            bos = self.specials.bos
            engine.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, self.bos_id)])
        if self.kind == "gpt1":  # the pre-tokenizer that Hugging Face's OpenAIGPTTokenizerFast uses
            engine = tokenizers.Tokenizer.from_str(engine.to_str())
            engine.normalizer = normalizers.BertNormalizer(lowercase=True)
            engine.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        meta = {
            "kind": self.kind,
            "vocab_size": self.vocab_size,
            "eot_id": self.eot_id,
            "fingerprint": self.fingerprint,
            "specials": self.specials.to_json(),
        }
        # The meta file first: a directory that has it without its tokenizer.json is refused.
        for name, text in (
            ("tokenizer_meta.json", json.dumps(meta, indent=1)),
            ("tokenizer.json", engine.to_str(pretty=True)),
        ):
            temporary = directory / f".{name}.{os.getpid()}"
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(directory / name)

    @classmethod
    def load(cls, directory: str | os.PathLike) -> Tokenizer:
        """Reads what `save` or Hugging Face wrote. InputError: missing, corrupt or not byte-level."""
        directory = epath.Path(directory)
        path = directory / "tokenizer.json"
        try:
            text = path.read_text(encoding="utf-8")
            spec = json.loads(text)
            engine = tokenizers.Tokenizer.from_str(text)
        except FileNotFoundError:
            raise InputError(f"no tokenizer.json in {directory}; name the directory of a saved one") from None
        except Exception as error:  # the library raises bare Exception for a file it can't parse
            raise InputError(
                f"{path} is damaged or not in Hugging Face tokenizers format ({error}); write it again"
            ) from None
        meta_path = directory / "tokenizer_meta.json"
        if not meta_path.exists():
            return _published(spec, _kind(spec, path), directory)
        try:
            meta = json.loads(meta_path.read_text(encoding="utf-8"))
            tokenizer = cls(engine, meta["kind"], Specials.from_json(meta.get("specials", {})))
            same = tokenizer.fingerprint == meta["fingerprint"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{meta_path} is damaged ({error}); remove it, or save the tokenizer again") from None
        if not same:
            raise InputError(
                f"{path} isn't the tokenizer that {meta_path.name} beside it describes (fingerprints "
                "differ); save the tokenizer again"
            )
        return tokenizer

    def _encode_characters(self, text: str) -> list[int]:
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        ids = self._id_of_code[np.minimum(codes, self._id_of_code.size - 1)]
        unknown = ids < 0
        if unknown.any():
            character, known = text[int(unknown.argmax())], (self._id_of_code >= 0).sum()
            raise InputError(
                f"character {character!r} (U+{ord(character):04X}, {unicodedata.name(character, 'unnamed')}) "
                f"isn't in the tokenizer's {known} characters; remove it, or use a bpe tokenizer"
            )
        return ids.tolist()


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE trained on texts; `<|endoftext|>` has the last id, as in GPT-2.

    Warns and returns a smaller vocabulary where the text has too few different pairs for vocab_size.
    InputError: vocab_size under 257 (256 bytes and end-of-text).

    The library's time is quadratic in the longest run of letters, digits, signs or blanks, so a run of more than
    400 characters is cut, with a warning. Encoding is not quadratic.
    """
    if vocab_size < _SMALLEST_BPE:
        raise InputError(
            f"a byte-level BPE of {vocab_size} ids has no room for 256 bytes and end-of-text; ask for at "
            f"least bpe:{_SMALLEST_BPE}"
        )
    engine = tokenizers.Tokenizer(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    cut = [0]
    engine.train_from_iterator(_training_pieces(texts, cut), trainer)
    if cut[0]:
        warnings.warn(
            f"to train the tokenizer, {cut[0]} runs of more than {_LONGEST_WORD} letters, digits, signs or blanks "
            "were cut into pieces of that length; what is trained on and encoded is not",
            stacklevel=2,
        )
    model = json.loads(engine.to_str())["model"]
    vocabulary = model["vocab"]
    vocabulary[END_OF_TEXT] = len(vocabulary)
    if len(vocabulary) < vocab_size:
        warnings.warn(
            f"the text is too small for {vocab_size} tokens; it gives a vocabulary of {len(vocabulary)}",
            stacklevel=2,
        )
    return _byte_level(vocabulary, [tuple(pair) for pair in model["merges"]])


def character_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """One id per character, in the order of code points. InputError: no text at all."""
    characters = sorted(set().union(*map(set, texts)))
    if not characters:
        raise InputError("there is no text to take characters from; name a source that has some")
    _refuse_surrogates(["".join(characters)])
    engine = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(characters)}, merges=[]))
    engine.decoder = decoders.Fuse()
    return Tokenizer(engine, "char")


def load_gpt2(path: str | os.PathLike) -> Tokenizer:
    """GPT-2's vocabulary from encoder.json + vocab.bpe or vocab.json + merges.txt in directory `path`."""
    vocabulary, merges, names = _read_vocabulary(path, ("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))
    try:
        engine = _byte_level_engine(vocabulary, merges)
    except Exception as error:
        raise InputError(f"{names} in {path} don't fit each other ({error}); download both again") from None
    tokenizer = _published(json.loads(engine.to_str()), "bpe", epath.Path(path))
    if tokenizer.eot_id is None and named_eos(epath.Path(path)) in (None, END_OF_TEXT):
        return tokenizer.with_specials([END_OF_TEXT])
    return tokenizer


def load_gpt1(path: str | os.PathLike) -> Tokenizer:
    """GPT-1's vocabulary from encoder_bpe_40000.json + vocab_40000.bpe (or vocab.json + merges.txt)."""
    vocabulary, merges, names = _read_vocabulary(
        path, ("encoder_bpe_40000.json", "vocab_40000.bpe"), ("vocab.json", "merges.txt")
    )
    try:
        model = models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", end_of_word_suffix=END_OF_WORD)
    except Exception as error:
        raise InputError(f"{names} in {path} don't fit each other ({error}); download both again") from None
    engine = tokenizers.Tokenizer(model)
    engine.decoder = decoders.BPEDecoder(suffix=END_OF_WORD)
    return _published(json.loads(engine.to_str()), "gpt1", epath.Path(path))


def make_tokenizer(spec: str, texts: Callable[[], Iterable[str]]) -> Tokenizer:
    """The tokenizer a config names: 'bpe:SIZE', 'char' (both made from texts()) or a directory.

    InputError: any other spec, or a directory without a tokenizer in it.
    """
    if spec == "char":
        return character_tokenizer(texts())
    if spec.startswith("bpe:"):
        if not spec[4:].isdecimal():
            raise InputError(f"{spec!r} has no vocabulary size; {FORMS}")
        return train_bpe(texts(), int(spec[4:]))
    directory = epath.Path(spec or "?")
    if not directory.is_dir():
        raise InputError(f"{spec!r} is neither a known tokenizer nor an existing directory; {FORMS}")
    if (directory / "tokenizer.json").exists() or (directory / "tokenizer_meta.json").exists():
        return Tokenizer.load(directory)
    if (directory / "encoder_bpe_40000.json").exists():
        return load_gpt1(directory)
    if (directory / "encoder.json").exists():
        return load_gpt2(directory)
    if (directory / "vocab.json").exists():  # Hugging Face uses these names for both
        vocabulary, *_ = _read_vocabulary(directory, ("vocab.json", "merges.txt"))
        return (load_gpt1 if f"the{END_OF_WORD}" in vocabulary else load_gpt2)(directory)
    raise InputError(f"{spec} holds no tokenizer files; {FORMS}")


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


def _published(spec: dict, kind: str, directory: epath.Path) -> Tokenizer:
    """A tokenizer with what the files beside it say of added and special tokens."""
    spec, specials = complete(spec, directory)
    engine = tokenizers.Tokenizer.from_str(json.dumps(spec))
    wrong = [t for t in spec["added_tokens"] if engine.token_to_id(t["content"]) != t["id"]]
    if wrong:
        raise InputError(
            f"{directory}: the added token {wrong[0]['content']!r} has the id {wrong[0]['id']}, but the ids before it "
            "are not all in use or it is in the vocabulary too; save the tokenizer again with transformers"
        )
    return Tokenizer(engine, kind, specials)


def _marked(spec: dict, names: Sequence[str], special: bool) -> dict:
    """spec with the added tokens of these names marked as special or not."""
    added = [{**t, "special": special if t["content"] in names else t["special"]} for t in spec["added_tokens"]]
    return {**spec, "added_tokens": added}


def _pieces(text: str, length: int = _PIECE) -> Iterator[str]:
    """Cuts text into pieces of a little over `length` characters whose ids, joined, are the text's ids."""
    start = 0
    while cut := _CUT.search(text, start + length):
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]


def _training_pieces(texts: Iterable[str], cut: list[int]) -> Iterator[str]:
    """Texts in pieces without a word of more than _LONGEST_WORD characters; cut[0] grows by the words that were cut."""
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for piece in (piece for text in texts for piece in _pieces(text)):
        start = 0
        if _LONG_RUN.search(piece):  # the library's own words are costly to ask for
            for _, (begin, end) in words.pre_tokenize_str(piece):
                if end - begin > _LONGEST_WORD:
                    cut[0] += 1
                    for place in (*range(begin, end, _LONGEST_WORD), end):
                        yield piece[start:place]
                        start = place
        yield piece[start:]


def _is_gpt2_pattern(spec: dict, plain_added: set[str]) -> bool:
    """Whether `_pieces` is exact: GPT-2's pattern alone decides where a merge may reach."""
    before = spec["pre_tokenizer"] or {}
    if before.get("type") != "ByteLevel" or before["add_prefix_space"] or not before.get("use_regex", True):
        return False
    return spec["normalizer"] is None and not plain_added


def _kind(spec: dict, path: epath.Path) -> str:
    if spec["model"].get("end_of_word_suffix") == END_OF_WORD:
        return "gpt1"
    decoder = spec.get("decoder") or {}
    if "ByteLevel" in [decoder.get("type"), *(d["type"] for d in decoder.get("decoders", []))]:
        return "bpe"
    raise InputError(f"{path} is not a byte-level BPE, so bytes per token are unknown; {FORMS}")


def _byte_length(token: str, kind: str, special: bool, added: bool, end: str) -> int:
    if token == end or (kind == "gpt1" and token == "<unk>"):
        return 1
    if special:
        return 0
    if kind == "bpe" and not added:
        return len(token)  # each character of a byte-level token stands for one byte
    if token.endswith(END_OF_WORD) and kind == "gpt1":
        return len(token[: -len(END_OF_WORD)].encode()) + 1
    return len(token.encode())


def _fingerprint(kind: str, vocabulary: dict[str, int], spec: dict, specials: Specials) -> str:
    content: list = [kind, sorted(vocabulary.items(), key=lambda item: item[1])]
    content.append([m if isinstance(m, str) else " ".join(m) for m in spec["model"].get("merges", [])])
    if kind == "bpe":
        content += [spec["normalizer"], spec["pre_tokenizer"]]
    if specials.in_text or specials.eos not in (None, END_OF_TEXT):
        content.append([specials.eos, specials.in_text])
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read_vocabulary(
    path: str | os.PathLike, *pairs: tuple[str, str]
) -> tuple[dict[str, int], list[tuple[str, str]], str]:
    """Reads the first (vocabulary, merges) pair of files that is there. InputError: none, or damaged."""
    directory = epath.Path(path)
    for names in pairs:
        files = [directory / name for name in names]
        if files[0].exists():
            break
    else:
        wanted = " or ".join(" + ".join(names) for names in pairs)
        raise InputError(f"{path} has no {wanted}; name the directory that holds them")
    try:
        vocabulary = json.loads(files[0].read_text(encoding="utf-8"))
        lines = files[1].read_text(encoding="utf-8").split("\n")
        if not isinstance(vocabulary, dict):
            raise ValueError(f"{names[0]} is not one JSON object")
    except FileNotFoundError:
        raise InputError(f"{directory} has {names[0]} but no {names[1]}; put both there") from None
    except ValueError as error:
        raise InputError(f"the vocabulary {' + '.join(names)} in {directory} is damaged ({error})") from None
    if lines[0].startswith("#version"):
        lines[0] = ""
    merges = [tuple(line.split()) for line in lines if line.strip()]
    for merge in merges:
        if len(merge) != 2:
            raise InputError(f"{files[1]} is damaged: {' '.join(merge)!r} isn't a pair of tokens; get the file again")
    return vocabulary, merges, " + ".join(names)


def _refuse_surrogates(texts: Iterable[str]) -> None:
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"the text has a lone surrogate {text[error.start]!r} at character {error.start}, which "
                "isn't Unicode text; remove it"
            ) from None

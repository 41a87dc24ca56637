"""The Tokenizer: text to ids and back, for byte-level BPE (GPT-2, GPT-3), characters (nanoGPT) and GPT-1's BPE.

All three are stored as a Hugging Face `tokenizers` model, so other libraries can read a saved directory. bpe.py makes
them. Sources: GPT-2 §2.2 and openai/gpt-2 encoder.py; openai/finetune-transformer-lm text_utils.py.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import tokenizers
from etils import epath
from tokenizers import normalizers, pre_tokenizers, processors

from gptjax.data.gpt1_words import gpt1_words
from gptjax.data.specials import END_OF_TEXT, PAD, Specials, complete
from gptjax.errors import InputError

END_OF_WORD = "</w>"  # GPT-1's suffix of the last piece of a word
FORMS = (
    "Use 'bpe:SIZE' (trained on the source, for example bpe:8192), 'char', or a directory with tokenizer.json, "
    "vocab.json + merges.txt, encoder.json + vocab.bpe, or encoder_bpe_40000.json + vocab_40000.bpe."
)
_PIECE = 1 << 16  # characters; the library's time grows faster than linearly in the length of one string
# Where a text can be split without changing GPT-2's ids: before a blank that follows a non-blank. No alternative of
# GPT-2's pattern matches across such a place or looks behind it.
_SPLIT = re.compile(r"(?<=\S)[\n ]")


class Tokenizer:
    """Text to ids and back.

    kind: 'bpe' (byte-level), 'char' or 'gpt1'.
    vocab_size: number of ids, int.
    eot_id: id of the end-of-text token: the one named by its files, else `<|endoftext|>`; None if the vocabulary has
        none (char and GPT-1, until `with_specials`).
    unk_id: id of words with characters outside the vocabulary (GPT-1); None if there are no such words.
    specials: the roles of its special tokens (data/specials.py).
    byte_lengths: int32 [vocab_size], UTF-8 bytes of text that each token stands for. End-of-text counts 1, as a
        separator, other special tokens 0; a GPT-1 token that ends a word counts its text and one space.
    lossless: whether decoding returns exactly the encoded text; False if text is normalized first (GPT-1 lower-cases).
    fingerprint: SHA-256 (hex) of kind, vocabulary and merges; unchanged by save and load.
    """

    def __init__(self, engine: tokenizers.Tokenizer, kind: str, specials: Specials = Specials()):
        spec = json.loads(engine.to_str())
        if specials.in_text:
            spec = _marked(spec, specials.in_text, False)
            engine = tokenizers.Tokenizer.from_str(json.dumps(spec))
        engine.no_padding()
        engine.no_truncation()
        engine.encode_special_tokens = True  # "<|endoftext|>" in a text is encoded as text
        if kind == "gpt1":  # spaCy splits words; the saved file has the library's approximation
            engine.normalizer = None
            engine.pre_tokenizer = None
        self.kind = kind
        self._engine = engine
        vocabulary = engine.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        special = {t["content"] for t in spec["added_tokens"] if t["special"]}
        self._specials = {token: vocabulary[token] for token in special}
        if kind == "bpe" and END_OF_TEXT in vocabulary:  # even if the files do not mark it as special
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
        self._may_split = kind == "bpe" and _is_gpt2_pattern(spec, added - special)
        if kind == "char":
            self._tokens = sorted(vocabulary, key=vocabulary.__getitem__)
            characters = self._tokens[: self.vocab_size - len(special)]
            codes = np.array([ord(c) for c in characters])
            self._id_of_code = np.full(int(codes.max()) + 2, -1, np.int32)  # the last entry is for unknown characters
            self._id_of_code[codes] = np.arange(codes.size)

    def with_specials(self, names: Sequence[str]) -> Tokenizer:
        """The tokenizer with these special tokens; new ones get the ids from vocab_size on.

        No text is encoded to one of them, even if it was before (as an added token of that name).
        InputError: a name that is an ordinary token, or a vocabulary with unused ids.
        """
        engine = tokenizers.Tokenizer.from_str(json.dumps(_marked(json.loads(self._engine.to_str()), names, True)))
        new = [name for name in dict.fromkeys(names) if name not in self._specials and name not in self._added]
        for number, name in enumerate(new, self.vocab_size):
            if not name or engine.token_to_id(name) is not None:
                raise InputError(
                    f"{name!r} cannot be a special token, because it is an ordinary token of the vocabulary: choose "
                    "another name."
                )
            engine.add_special_tokens([name])
            if engine.token_to_id(name) != number:  # the library assigns the number of tokens, not the next free id
                raise InputError(
                    f"The special token {name!r} cannot be added, because some ids below {number} have no token: use a "
                    "tokenizer without gaps."
                )
        in_text = tuple(name for name in self.specials.in_text if name not in names)
        return Tokenizer(engine, self.kind, dataclasses.replace(self.specials, in_text=in_text))

    def for_model(self, eos: Sequence[int] = (), bos: int | None = None, pad: int | None = None) -> Tokenizer:
        """The tokenizer with the special ids of a model's own config files.

        Each of `eos` ends a sampled text. A role that the tokenizer's files do not name goes to the (first) of its ids
        that is an added token. Ids outside the vocabulary have no token and are ignored.
        """
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
        """Id of a special token; None if the vocabulary has no special token of that name."""
        return self._specials.get(name)

    def token(self, index: int | None) -> str | None:
        """The token of an id, as written in the vocabulary; None for None."""
        return None if index is None else self._engine.id_to_token(index)

    @property
    def pad_id(self) -> int | None:
        """Id of the padding token: the one named by its files if that has no other role, else `<|pad|>`, else None."""
        named = self.specials
        own = named.pad is not None and named.pad not in (named.bos, named.unk)
        index = self.special_id(named.pad) if own else None
        return self.special_id(PAD) if index in (None, self.eot_id) else index

    @property
    def bos_id(self) -> int | None:
        """Id of the beginning-of-text token: the one named by its files, else end-of-text, as in GPT-2."""
        index = self.special_id(self.specials.bos) if self.specials.bos else None
        return self.eot_id if index is None else index

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a sampled text, end-of-text first; () if there are none."""
        ids = (self.eot_id, *self.specials.stop_ids)
        return tuple(dict.fromkeys(i for i in ids if i is not None))

    @property
    def separator_ids(self) -> list[int]:
        """Ids between two documents: end-of-text or, if the vocabulary has none, a line break (GPT-1) or a blank line
        (characters). InputError: it has none of them."""
        if self.eot_id is not None:
            return [self.eot_id]
        line_break = self._engine.token_to_id("\n" + END_OF_WORD if self.kind == "gpt1" else "\n")
        if line_break is None:
            raise InputError(
                "The source has several documents, but the tokenizer has neither end-of-text nor a line break to "
                "separate them: use a bpe tokenizer, or join the documents in one file."
            )
        return [line_break] * (1 if self.kind == "gpt1" else 2)  # GPT-1's text normalization merges several into one

    def encode(self, text: str) -> list[int]:
        """Ids of one text. InputError: a character outside the vocabulary (char), or a lone surrogate."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, computed in parallel where the library supports it. Errors as `encode`."""
        if self.kind == "char":
            return [self._encode_characters(text) for text in texts]
        if self.kind == "gpt1":
            check_unicode(texts)
            words = [self._words(text) for text in texts]
            encoded = self._engine.encode_batch_fast(words, is_pretokenized=True, add_special_tokens=False)
            return [e.ids for e in encoded]
        parts = [list(self.pieces(text)) for text in texts]
        flat = [piece for pieces in parts for piece in pieces]
        try:
            encoded = iter(self._engine.encode_batch_fast(flat, add_special_tokens=False))
        except TypeError:  # raised by the library for a string without a UTF-8 form
            check_unicode(texts)
            raise
        return [[i for _ in pieces for i in next(encoded).ids] for pieces in parts]

    def _words(self, text: str) -> list[str]:
        """GPT-1's words, with added tokens kept intact."""
        if not self._added:
            return gpt1_words(text)
        parts = re.split(f"({'|'.join(map(re.escape, self._added))})", text)
        return [word for i, part in enumerate(parts) for word in ([part] if i % 2 else gpt1_words(part))]

    def pieces(self, text: str) -> Iterator[str]:
        """Splits a long text where that does not change its ids, so that it can be encoded piece by piece."""
        if self.kind == "char":
            return (text[i : i + _PIECE] for i in range(0, max(len(text), 1), _PIECE))
        return split_text(text) if self._may_split else iter([text])

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; bytes that are not UTF-8 become U+FFFD. InputError: an id outside the vocabulary."""
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise InputError(
                    f"Token id {i} is outside the tokenizer's vocabulary of {self.vocab_size}: use the tokenizer that "
                    "the ids were made with."
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
        if self.specials.adds_bos:  # for other libraries; here the caller of `encode` adds it
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
        # The metadata first: `load` rejects a directory that has it without tokenizer.json.
        for name, text in (
            ("tokenizer_meta.json", json.dumps(meta, indent=1)),
            ("tokenizer.json", engine.to_str(pretty=True)),
        ):
            temporary = directory / f".{name}.{os.getpid()}"
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(directory / name)

    @classmethod
    def load(cls, directory: str | os.PathLike) -> Tokenizer:
        """Loads a directory written by `save` or by Hugging Face. InputError: missing, damaged or not byte-level."""
        directory = epath.Path(directory)
        path = directory / "tokenizer.json"
        try:
            text = path.read_text(encoding="utf-8")
            spec = json.loads(text)
            engine = tokenizers.Tokenizer.from_str(text)
        except FileNotFoundError:
            raise InputError(f"{directory} has no tokenizer.json: give the directory of a saved tokenizer.") from None
        except Exception as error:  # the library raises bare Exception for a file that it cannot parse
            raise InputError(
                f"{path} is damaged or not in the format of Hugging Face tokenizers ({error}): save it again."
            ) from None
        meta_path = directory / "tokenizer_meta.json"
        if not meta_path.exists():
            return from_published(spec, _kind(spec, path), directory)
        try:
            meta = json.loads(meta_path.read_text(encoding="utf-8"))
            tokenizer = cls(engine, meta["kind"], Specials.from_json(meta.get("specials", {})))
            same = tokenizer.fingerprint == meta["fingerprint"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{meta_path} is damaged ({error}): remove it, or save the tokenizer again.") from None
        if not same:
            raise InputError(
                f"{path} is not the tokenizer that {meta_path.name} in the same directory describes (the fingerprints "
                "differ): save the tokenizer again."
            )
        return tokenizer

    def _encode_characters(self, text: str) -> list[int]:
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        ids = self._id_of_code[np.minimum(codes, self._id_of_code.size - 1)]
        unknown = ids < 0
        if unknown.any():
            character, known = text[int(unknown.argmax())], (self._id_of_code >= 0).sum()
            raise InputError(
                f"The character {character!r} (U+{ord(character):04X}, {unicodedata.name(character, 'unnamed')}) "
                f"is not one of the tokenizer's {known} characters: remove it, or use a bpe tokenizer."
            )
        return ids.tolist()


def from_published(spec: dict, kind: str, directory: epath.Path) -> Tokenizer:
    """A published tokenizer, with the added and special tokens that the files in its directory name.

    spec: contents of tokenizer.json. InputError: damaged files, or an added token whose id is not the next free one.
    """
    spec, specials = complete(spec, directory)
    engine = tokenizers.Tokenizer.from_str(json.dumps(spec))
    wrong = [t for t in spec["added_tokens"] if engine.token_to_id(t["content"]) != t["id"]]
    if wrong:
        raise InputError(
            f"{directory}: The added token {wrong[0]['content']!r} has the id {wrong[0]['id']}, but some ids below are "
            "unused or the token is also in the vocabulary. Save the tokenizer again with transformers."
        )
    return Tokenizer(engine, kind, specials)


def _marked(spec: dict, names: Sequence[str], special: bool) -> dict:
    """spec with the added tokens of these names marked as special, or as not special."""
    added = [{**t, "special": special if t["content"] in names else t["special"]} for t in spec["added_tokens"]]
    return {**spec, "added_tokens": added}


def split_text(text: str, length: int = _PIECE) -> Iterator[str]:
    """Splits a text into pieces of a little over `length` characters whose concatenated ids are those of the text.

    Exact for GPT-2's pre-tokenization pattern.
    """
    start = 0
    while match := _SPLIT.search(text, start + length):
        yield text[start : match.start()]
        start = match.start()
    yield text[start:]


def _is_gpt2_pattern(spec: dict, plain_added: set[str]) -> bool:
    """Whether `split_text` is exact: only GPT-2's pattern limits the merges."""
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
    raise InputError(f"{path} is not a byte-level BPE, so its bytes per token are unknown. {FORMS}")


def _byte_length(token: str, kind: str, special: bool, added: bool, end: str) -> int:
    if token == end or (kind == "gpt1" and token == "<unk>"):
        return 1
    if special:
        return 0
    if kind == "bpe" and not added:
        return len(token)  # each character of a byte-level token is one byte
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


def check_unicode(texts: Iterable[str]) -> None:
    """InputError: a text with a lone surrogate, which has no UTF-8 form."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"The text has a lone surrogate {text[error.start]!r} at character {error.start}, which is not valid "
                "Unicode: remove it."
            ) from None

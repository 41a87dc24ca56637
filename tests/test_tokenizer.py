"""Tokenizers: golden ids of GPT-1 and GPT-2, exact round trips, saving and loading, every error."""

import functools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from gptjax.data import bpe as bpe_module
from gptjax.data.bpe import character_tokenizer, load_gpt1, load_gpt2, make_tokenizer, train_bpe
from gptjax.data.gpt1_words import _spacy_english, gpt1_words
from gptjax.data.tokenizer import Tokenizer, split_text
from gptjax.errors import InputError

VOCABULARIES = Path(__file__).parents[2] / "shared" / "data" / "tokenizers"
needs_vocabularies = pytest.mark.skipif(
    not VOCABULARIES.is_dir(), reason="OpenAI's vocabulary files are not on this machine"
)
TEXT = "The quick brown fox, the lazy dog's den: naïve café 日本語 🙂\n\n\tdef f(x):  return x\r\n" * 20
TRICKY = st.text(alphabet=" \n\t\r\u00a0\u2003\u0085\u2028\x1c\u200bab1,'sé日", max_size=80)


def no_texts():
    raise AssertionError("a tokenizer from files must not read the source")


@functools.cache
def small_bpe():
    return train_bpe([TEXT], 320)


@pytest.fixture
def bpe():
    return small_bpe()


@pytest.fixture(scope="module")
def gpt2():
    return load_gpt2(VOCABULARIES / "gpt2")


@needs_vocabularies
@pytest.mark.parametrize(
    "text, ids",
    [  # tiktoken's ids
        ("Hello world", [15496, 995]),
        ("Hello, my dog is cute", [15496, 11, 616, 3290, 318, 13779]),
        (" hello  world\n\n", [23748, 220, 995, 628]),
        (
            "The quick brown fox jumps over the lazy dog.",
            [464, 2068, 7586, 21831, 18045, 625, 262, 16931, 3290, 13],
        ),
        ("I'm we'll they've I'LL", [40, 1101, 356, 1183, 484, 1053, 314, 6, 3069]),
        ("12345 67", [10163, 2231, 8275]),
        ("naïve café 日本語 🙂", [2616, 38776, 40304, 10545, 245, 98, 17312, 105, 45739, 252, 32485]),
        ("tabs\tand   spaces  end  ", [8658, 82, 197, 392, 220, 220, 9029, 220, 886, 220, 220]),
        ("TL;DR:", [14990, 26, 7707, 25]),
    ],
)
def test_gpt2_golden_ids(gpt2, text, ids):
    assert gpt2.encode(text) == ids
    assert gpt2.decode(ids) == text


@needs_vocabularies
def test_gpt2_vocabulary(gpt2):
    assert (gpt2.kind, gpt2.vocab_size, gpt2.eot_id) == ("bpe", 50257, 50256)
    assert gpt2.byte_lengths[[0, 50256, 995]].tolist() == [1, 1, len(" world")]


@needs_vocabularies
@pytest.mark.parametrize(
    "text, ids",
    [  # computed from openai/finetune-transformer-lm's encoder_bpe_40000.json
        ("The quick brown fox", [481, 2279, 2507, 8573]),
        ("very positive negative", [963, 6353, 9503]),
        ("Hello world!", [3570, 1276, 267]),
        ("unbelievable transformers", [11706, 2973, 1858, 650]),
        ("the\n \n the", [481, 40477, 481]),
        ("the 日", [481, 0]),
    ],
)
def test_gpt1_golden_ids(text, ids):
    pytest.importorskip("spacy", reason="GPT-1's words need spaCy")
    gpt1 = load_gpt1(VOCABULARIES / "gpt1")
    assert gpt1.encode(text) == ids
    assert (gpt1.kind, gpt1.vocab_size, gpt1.eot_id) == ("gpt1", 40478, None)


@needs_vocabularies
def test_gpt1_saved_loaded_and_its_bytes(tmp_path):
    pytest.importorskip("spacy", reason="GPT-1's words need spaCy")
    gpt1 = load_gpt1(VOCABULARIES / "gpt1")
    gpt1.save(tmp_path)
    again = make_tokenizer(str(tmp_path), no_texts)
    ids = again.encode("Hello, transformers!\nBye don't")
    assert ids == gpt1.encode("Hello, transformers!\nBye don't")
    assert again.fingerprint == gpt1.fingerprint
    assert again.byte_lengths[[481, 40477, 1858, 0]].tolist() == [4, 2, 4, 1]  # "the ", "\n ", "form", <unk>
    assert again.decode([481, 2279]) == "the quick"
    (tmp_path / "tokenizer_meta.json").unlink()  # as a plain Hugging Face directory
    assert Tokenizer.load(tmp_path).encode("unbelievable transformers") == [11706, 2973, 1858, 650]


def test_gpt1_words():
    pytest.importorskip("spacy", reason="GPT-1's words need spaCy")
    # by openai/finetune-transformer-lm's text_utils.py: dashes, ellipsis, spacing, clitics, mojibake
    assert gpt1_words("The—END… don't") == ["the", "-", "end", "...", "do", "n't"]
    assert gpt1_words(" a \n\n  b,,c(d)\t e ") == ["a", "\n", "b", ",", ",", "c", "(", "d", ")", "e"]
    assert gpt1_words("schÃ¶n") == ["schön"]


def test_gpt1_without_spacy(monkeypatch):
    _spacy_english.cache_clear()
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(InputError, match="needs spaCy: run `pip install spacy`"):
        gpt1_words("text")


@settings(max_examples=200, deadline=None)
@given(st.text())
@example("<|endoftext|> inside")
@example("\x00\r\n\ufeff")
def test_bpe_round_trip(text):
    bpe = small_bpe()
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text
    assert bpe.byte_lengths[ids].sum() == len(text.encode())
    assert bpe.eot_id not in ids


def test_every_byte_has_a_token(bpe):
    data = bytes(range(256))
    text = data.decode("latin-1")
    assert bpe.decode(bpe.encode(text)) == text
    vocabulary = bpe._engine.get_vocab()
    assert set(pre_tokenizers.ByteLevel.alphabet()) <= set(vocabulary)


def test_bpe_layout_and_determinism(bpe):
    assert bpe.vocab_size == 320
    assert bpe.eot_id == 319
    assert bpe.decode([319]) == "<|endoftext|>"
    assert bpe.byte_lengths[319] == 1
    assert train_bpe([TEXT], 320).fingerprint == bpe.fingerprint
    assert train_bpe([TEXT], 319).fingerprint != bpe.fingerprint
    assert len(bpe.encode(TEXT)) < len(TEXT.encode())  # it merges


@settings(max_examples=300, deadline=None)
@given(TRICKY, st.integers(1, 12))
@example("a \n b", 1)
@example("a\n\nb\n\n  c", 1)
@example("a  \nb's  's", 2)
def test_splitting_a_text_does_not_change_its_ids(text, length):
    bpe = small_bpe()
    pieces = list(split_text(text, length))
    assert "".join(pieces) == text
    whole = bpe._engine.encode(text, add_special_tokens=False).ids
    assert [i for piece in pieces for i in bpe._engine.encode(piece).ids] == whole


def test_long_text_is_split(bpe):
    text = TEXT * 200
    assert max(map(len, bpe.pieces(text))) < 2 * 65536
    assert bpe.encode(text) == bpe._engine.encode(text).ids
    assert bpe.encode_batch([text, "", "a"]) == [bpe.encode(text), [], bpe.encode("a")]


def test_small_text_gives_a_smaller_vocabulary_with_a_warning():
    with pytest.warns(UserWarning, match="The text is too small for 5000 tokens: the vocabulary has only"):
        small = train_bpe(["hello hello"], 5000)
    assert 257 < small.vocab_size < 300
    assert small.eot_id == small.vocab_size - 1


@pytest.mark.parametrize("size", [0, 256])
def test_bpe_needs_257(size):
    with pytest.raises(InputError, match="has no room for 256 bytes.*: use at least bpe:257"):
        make_tokenizer(f"bpe:{size}", lambda: [TEXT])


def test_characters():
    characters = make_tokenizer("char", lambda: ["hello\n", "é🙂"])
    assert (characters.kind, characters.vocab_size, characters.eot_id) == ("char", 7, None)
    assert characters.encode("\nehloé🙂") == list(range(7))
    assert characters.byte_lengths.tolist() == [1, 1, 1, 1, 1, 2, 4]
    assert characters.decode(characters.encode("lé🙂l\n")) == "lé🙂l\n"
    assert "".join(characters.pieces("hello\n" * 30000)) == "hello\n" * 30000


@pytest.mark.parametrize("character, name", [("z", "U\\+007A"), ("日", "U\\+65E5"), ("🙃", "U\\+1F643")])
def test_unknown_character(character, name):
    with pytest.raises(InputError, match=f"The character '{character}'.*{name}.*: remove it, or use a bpe"):
        character_tokenizer(["hé🙂"]).encode(f"hh{character}")


def test_no_characters():
    with pytest.raises(InputError, match="has no text to collect characters from: give a source"):
        character_tokenizer([])


@pytest.mark.parametrize("spec", ["bpe:300", "char"])
def test_save_and_load(spec, tmp_path):
    made = make_tokenizer(spec, lambda: [TEXT])
    for directory in (tmp_path / "a" / "b", str(tmp_path / "c")):
        made.save(directory)
        again = Tokenizer.load(directory)
        assert again.encode(TEXT) == made.encode(TEXT)
        assert again.decode(again.encode(TEXT)) == TEXT
        assert (again.kind, again.vocab_size, again.eot_id) == (made.kind, made.vocab_size, made.eot_id)
        assert again.fingerprint == made.fingerprint
        np.testing.assert_array_equal(again.byte_lengths, made.byte_lengths)
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["tokenizer.json", "tokenizer_meta.json"]
    hugging_face = tokenizers.Tokenizer.from_file(str(tmp_path / "c" / "tokenizer.json"))
    assert hugging_face.encode(TEXT).ids == made.encode(TEXT)


def test_plain_hugging_face_directory(bpe, tmp_path):
    bpe.save(tmp_path)
    (tmp_path / "tokenizer_meta.json").unlink()
    again = make_tokenizer(str(tmp_path), no_texts)
    assert again.fingerprint == bpe.fingerprint
    assert again.encode("a<|endoftext|>") == bpe.encode("a<|endoftext|>")


@pytest.mark.parametrize("names", [("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")])
def test_gpt2_layouts(bpe, names, tmp_path):
    model = json.loads(bpe._engine.to_str())["model"]
    (tmp_path / names[0]).write_text(json.dumps(model["vocab"]))
    merges = "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in model["merges"])
    (tmp_path / names[1]).write_text(merges, encoding="utf-8")
    assert make_tokenizer(str(tmp_path), no_texts).fingerprint == bpe.fingerprint
    (tmp_path / names[1]).write_text(merges + "one two three\n", encoding="utf-8")
    with pytest.raises(InputError, match="one two three' is not a pair of tokens: download"):
        load_gpt2(tmp_path)
    (tmp_path / names[1]).write_text(merges + "notthere neither\n", encoding="utf-8")
    with pytest.raises(InputError, match="do not match .*: download both again"):
        load_gpt2(tmp_path)
    (tmp_path / names[1]).unlink()
    with pytest.raises(InputError, match=f"but no {names[1]}: add it"):
        load_gpt2(tmp_path)
    (tmp_path / names[0]).write_text("{")
    with pytest.raises(InputError, match=f"no {names[1]}|damaged .*: download"):
        load_gpt2(tmp_path)


def test_load_refuses_missing_and_damaged(bpe, tmp_path):
    with pytest.raises(InputError, match="has no tokenizer.json: give the directory"):
        Tokenizer.load(tmp_path)
    bpe.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    whole = path.read_text()
    path.write_text(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="damaged or not .*: save it again"):
        Tokenizer.load(tmp_path)
    spec = json.loads(whole)
    spec["model"]["vocab"]["X"] = spec["model"]["vocab"].pop("!")
    path.write_text(json.dumps(spec))
    with pytest.raises(InputError, match="fingerprints differ.: save the tokenizer again"):
        Tokenizer.load(tmp_path)
    path.write_text(whole)
    (tmp_path / "tokenizer_meta.json").write_text("{}")
    with pytest.raises(InputError, match="tokenizer_meta.json is damaged .*: remove it"):
        Tokenizer.load(tmp_path)


def test_load_refuses_what_is_not_byte_level(tmp_path):
    engine = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    engine.decoder = decoders.WordPiece()
    engine.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match="is not a byte-level BPE.* Use 'bpe:SIZE'"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("spec", ["gpt2", "bpe", "bpe:", "bpe:8k", "bpe:-5", "", "/nowhere/at/all"])
def test_unknown_spec_names_the_forms(spec):
    with pytest.raises(InputError, match="Use 'bpe:SIZE.*'char'.*encoder.json \\+ vocab.bpe"):
        make_tokenizer(spec, no_texts)


def test_directory_without_a_tokenizer(tmp_path):
    with pytest.raises(InputError, match="contains no tokenizer files. Use 'bpe:SIZE'"):
        make_tokenizer(str(tmp_path), no_texts)


def test_bad_ids_and_bad_text(bpe):
    for tokenizer in (bpe, character_tokenizer(["ab"])):
        for ids in ([tokenizer.vocab_size], [-1]):
            with pytest.raises(InputError, match="outside the tokenizer's vocabulary of .*: use the tokenizer"):
                tokenizer.decode(ids)
    with pytest.raises(InputError, match="lone surrogate.*character 2, .*: remove it"):
        bpe.encode("ab\ud800")


SPECIALS = ["<|endoftext|>", "<|pad|>", "<|user|>"]
SPOKEN = "ab <|user|> ba<|pad|><|endoftext|>"  # what a user may write


def tiny_gpt1(directory):
    """A GPT-1 vocabulary of the printable characters, inside a word and at its end."""
    pytest.importorskip("spacy", reason="GPT-1's words need spaCy")
    characters = [chr(c) for c in range(33, 127)]
    tokens = ["<unk>", *characters, *(c + "</w>" for c in characters)]
    directory.mkdir()
    (directory / "encoder_bpe_40000.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    (directory / "vocab_40000.bpe").write_text("#version: 0.2\n")
    return load_gpt1(directory)


@pytest.mark.parametrize("kind", ["bpe", "char", "gpt1"])
def test_special_tokens(kind, tmp_path):
    if kind == "gpt1":
        base = tiny_gpt1(tmp_path / "gpt1")
    else:
        base = small_bpe() if kind == "bpe" else character_tokenizer([SPOKEN])
    size, spoken = base.vocab_size, base.encode(SPOKEN)
    new = SPECIALS if kind != "bpe" else SPECIALS[1:]  # a trained BPE has end-of-text

    made = base.with_specials(SPECIALS)
    made.save(tmp_path / "saved")
    for tokenizer in (made, Tokenizer.load(tmp_path / "saved"), made.with_specials(SPECIALS)):
        assert tokenizer.kind == kind
        assert tokenizer.vocab_size == size + len(new)
        assert [tokenizer.special_id(name) for name in new] == list(range(size, size + len(new)))
        assert tokenizer.eot_id == (base.eot_id if kind == "bpe" else size)
        assert tokenizer.eot_id == tokenizer.special_id("<|endoftext|>")
        assert tokenizer.pad_id == tokenizer.special_id("<|pad|>") is not None
        assert [tokenizer.decode([tokenizer.special_id(name)]) for name in SPECIALS] == SPECIALS
        assert [tokenizer.byte_lengths[tokenizer.special_id(name)] for name in SPECIALS] == [1, 0, 0]
        np.testing.assert_array_equal(tokenizer.byte_lengths[:size], base.byte_lengths)
        assert tokenizer.encode(SPOKEN) == spoken and max(spoken) < size
        assert tokenizer.decode(spoken) == base.decode(spoken)
        assert tokenizer.fingerprint == made.fingerprint != base.fingerprint
    assert made.decode([size, *base.encode("ab")]).startswith(new[0])

    assert (base.vocab_size, base.pad_id, base.special_id("<|user|>")) == (size, None, None)  # left as it was
    assert base.eot_id == (319 if kind == "bpe" else None)
    hugging_face = tokenizers.Tokenizer.from_file(str(tmp_path / "saved" / "tokenizer.json"))
    assert [hugging_face.token_to_id(name) for name in SPECIALS] == [made.special_id(name) for name in SPECIALS]


def test_special_tokens_are_added_in_their_order(bpe):
    once = bpe.with_specials(["<|b|>", "<|a|>", "<|b|>"])
    assert (once.special_id("<|b|>"), once.special_id("<|a|>"), once.vocab_size) == (320, 321, 322)
    twice = once.with_specials(["<|c|>", "<|a|>"])
    assert (twice.special_id("<|a|>"), twice.special_id("<|c|>"), twice.vocab_size) == (321, 322, 323)
    assert bpe.with_specials([]).fingerprint == bpe.fingerprint


def test_an_ordinary_token_is_no_special(bpe):
    assert bpe.special_id("a") is None
    for name in ("a", ""):
        with pytest.raises(InputError, match="cannot be a special token, .*: choose another name"):
            bpe.with_specials([name])


def test_special_tokens_need_a_vocabulary_without_gaps(bpe, tmp_path):
    model = json.loads(bpe._engine.to_str())["model"]
    (tmp_path / "encoder.json").write_text(json.dumps(model["vocab"] | {"e": 400}))
    (tmp_path / "vocab.bpe").write_text("\n".join(f"{a} {b}" for a, b in model["merges"]), encoding="utf-8")
    with pytest.raises(InputError, match="some ids below 401 have no token: use a tokenizer without gaps"):
        load_gpt2(tmp_path).with_specials(["<|pad|>"])


def test_unknown_character_with_specials():
    characters = character_tokenizer(["ab"]).with_specials(["<|pad|>"])
    with pytest.raises(InputError, match="'<'.*is not one of the tokenizer's 2 characters"):
        characters.encode("a<|pad|>")


@pytest.mark.parametrize("run", ["x" * 5000, "日本語" * 2000, " " * 5000, "\n" * 5000, "7" * 5000, "=" * 5000])
def test_long_runs_are_split_for_training_only(run, monkeypatch):
    """The library's training is quadratic in the longest word; its encoding is not."""
    given, pieces = [], bpe_module._training_pieces
    monkeypatch.setattr(bpe_module, "_training_pieces", lambda *a: (given.append(p) or p for p in pieces(*a)))
    text = f"Some words, then {run} and some more.\n"
    with pytest.warns(UserWarning, match="1 runs of more than 400"):
        made = train_bpe([TEXT, text], 300)
    assert "".join(given) == TEXT + text
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    spans = [end - begin for piece in given for _, (begin, end) in words.pre_tokenize_str(piece)]
    assert max(spans) == 400
    assert made.decode(made.encode(text)) == text
    assert made.encode(text) == made._engine.encode(text, add_special_tokens=False).ids


def test_ordinary_text_is_not_split_for_training():
    long_lines = TEXT.replace("\n", "") + "a1" * 3000  # long runs without blanks, of short words
    assert list(bpe_module._training_pieces([TEXT, long_lines], [0])) == [TEXT, long_lines]


def test_document_separator(bpe, tmp_path):
    assert bpe.separator_ids == [bpe.eot_id]
    characters = character_tokenizer(["ab\n"])
    assert characters.decode(characters.separator_ids) == "\n\n"
    assert characters.with_specials(["<|endoftext|>"]).separator_ids == [3]
    with pytest.raises(InputError, match="neither end-of-text nor a line break.*: use a bpe tokenizer"):
        character_tokenizer(["ab"]).separator_ids  # noqa: B018


def test_document_separator_of_gpt1(tmp_path):
    pytest.importorskip("spacy", reason="GPT-1's words need spaCy")
    tokens = ["<unk>", "a", "a</w>", "\n</w>"]
    (tmp_path / "encoder_bpe_40000.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    (tmp_path / "vocab_40000.bpe").write_text("#version: 0.2\n")
    gpt1 = load_gpt1(tmp_path)
    assert gpt1.separator_ids == [3] == gpt1.encode("a\n\na")[1:2]

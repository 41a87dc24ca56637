"""Special and added tokens of published tokenizers: the files that name them, encoding, saving.

That transformers gives the same ids is shown in tests/peers/test_huggingface.py.
"""

import dataclasses
import json

import numpy as np
import pytest
import tokenizers
from tokenizer_files import END, ROLES, write_legacy

from gptjax.data.bpe import load_gpt1, make_tokenizer, train_bpe
from gptjax.data.chat import ASSISTANT, PAD, USER, Template, chat_tokenizer
from gptjax.data.specials import END_OF_TEXT, Specials
from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import InputError


def load(directory) -> Tokenizer:
    return make_tokenizer(str(directory), list)


def write_fast(directory, added, **config):
    """tokenizer.json with AddedTokens, and tokenizer_config.json."""
    ids = write_legacy(directory)
    engine = tokenizers.Tokenizer.from_str(load(directory).with_specials([])._engine.to_str())
    engine.add_tokens(list(added))
    engine.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return ids


def test_roles_come_from_the_files_and_added_tokens_are_found_in_text(tmp_path):
    ids = write_legacy(tmp_path, [END, "[NAME]", "<pad>", "<x>"], ROLES | {"additional_special_tokens": ["<x>"]})
    tokenizer = load(tmp_path)
    assert tokenizer.eot_id == tokenizer.bos_id == ids[END] and tokenizer.pad_id == ids["<pad>"]
    assert tokenizer.vocab_size == max(ids.values()) + 1  # no <|endoftext|> was put behind them
    got = tokenizer.encode("hello [NAME]<x></s>")
    assert [i for i in got if i >= ids[END]] == [ids["[NAME]"], ids["<x>"]]  # no text ends a text
    assert tokenizer.decode(got) == "hello [NAME]<x></s>"
    lengths = tokenizer.byte_lengths
    assert lengths[[ids[END], ids["[NAME]"], ids["<pad>"], ids["<x>"]]].tolist() == [1, 6, 0, 3]
    assert lengths[got].sum() == len("hello [NAME]<x></s>")


@pytest.mark.parametrize("decoder", [False, True])
def test_precedence_of_the_files(tmp_path, decoder):
    """As in transformers: special_tokens_map.json, unless tokenizer_config.json has added_tokens_decoder."""
    ids = write_legacy(tmp_path, [END, "<e>"], ROLES | {"pad_token": END})
    config = {"eos_token": {"content": "<e>"}}
    if decoder:
        config["added_tokens_decoder"] = {
            str(i): {"content": token, "special": token == "<e>", "lstrip": token == END} for token, i in ids.items()
        }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load(tmp_path)
    assert tokenizer.eot_id == ids["<e>" if decoder else END]
    if decoder:  # </s> is an ordinary added token now, which takes the blanks before it
        assert tokenizer.encode("a  </s>") == [*tokenizer.encode("a"), ids[END]]


@pytest.mark.parametrize("name", ["special_tokens_map.json", "tokenizer_config.json"])
def test_the_end_of_a_tokenizer_json_is_named_beside_it(tmp_path, name):
    """And `<|endoftext|>`, which the file marks as an ordinary token, is still none of any text."""
    write_fast(tmp_path, [tokenizers.AddedToken("<e>", special=False), tokenizers.AddedToken("[N]", special=True)])
    (tmp_path / name).write_text(json.dumps({"eos_token": "<e>"}))
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    for token in spec["added_tokens"]:
        token["special"] = token["special"] and token["content"] != END_OF_TEXT
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = load(tmp_path)
    end = tokenizer.special_id(END_OF_TEXT)
    assert tokenizer.eot_id == end + 1 and tokenizer.specials.in_text == ("[N]",)
    assert [i for i in tokenizer.encode(f"[N]{END_OF_TEXT}<e>") if i >= end] == [end + 2]


def test_tokens_without_an_id_are_ignored(tmp_path):
    write_legacy(tmp_path, [END], ROLES)
    with pytest.warns(UserWarning, match="'<pad>' without an id: it is ignored"):
        tokenizer = load(tmp_path)
    assert tokenizer.pad_id is None and tokenizer.specials.pad is None


def test_bad_files(tmp_path):
    ids = write_legacy(tmp_path, [END], ROLES | {"pad_token": END})
    (tmp_path / "added_tokens.json").write_text(json.dumps({END: ids[END] + 5}))
    with pytest.raises(InputError, match=rf"The added token '</s>' has the id {ids[END] + 5}, but .* Save"):
        load(tmp_path)
    (tmp_path / "added_tokens.json").write_text("[1]")
    with pytest.raises(InputError, match="added_tokens.json is not a JSON object: download"):
        load(tmp_path)
    (tmp_path / "added_tokens.json").write_text("{")
    with pytest.raises(InputError, match="added_tokens.json is not JSON .*: download"):
        load(tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({END: "one"}))
    with pytest.raises(InputError, match="The added tokens in .* cannot be read .*: download"):
        load(tmp_path)


def test_a_published_gpt2_is_as_before(tmp_path):
    """Its files name what is the default: same ids, same fingerprint as without them."""
    train_bpe(["the cat sat " * 9], 262).save(tmp_path)
    (tmp_path / "tokenizer_meta.json").unlink()
    plain = load(tmp_path)
    special = {f"{role}_token": END_OF_TEXT for role in ("bos", "eos", "unk")}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(special))
    assert load(tmp_path).fingerprint == plain.fingerprint
    assert load(tmp_path).eot_id == plain.eot_id == plain.vocab_size - 1


def test_saved_and_loaded(tmp_path):
    write_legacy(tmp_path / "a", [END, "<x>"], {"eos_token": END, "additional_special_tokens": ["<x>"]})
    tokenizer = load(tmp_path / "a").for_model(eos=[7, 9999])
    tokenizer.save(tmp_path / "b")
    again = Tokenizer.load(tmp_path / "b")
    assert (again.specials, again.fingerprint) == (tokenizer.specials, tokenizer.fingerprint)
    assert again.stop_ids == (tokenizer.eot_id, 7)
    assert again.encode("a<x>") == tokenizer.encode("a<x>")
    written = json.loads((tmp_path / "b/tokenizer.json").read_text())["added_tokens"]
    assert {t["content"]: t["special"] for t in written} == {END: True, "<x>": True}  # other readers find them special
    meta = json.loads((tmp_path / "b/tokenizer_meta.json").read_text())
    (tmp_path / "b/tokenizer_meta.json").write_text(json.dumps(meta | {"specials": {"sep": "x"}}))
    with pytest.raises(InputError, match="tokenizer_meta.json is damaged"):
        Tokenizer.load(tmp_path / "b")


def test_a_tokenizer_saved_before_roles_is_the_same(tmp_path):
    """Runs of before have no `specials` in tokenizer_meta.json."""
    tokenizer = chat_tokenizer(train_bpe(["the cat sat " * 9], 262))
    tokenizer.save(tmp_path)
    meta = json.loads((tmp_path / "tokenizer_meta.json").read_text())
    del meta["specials"]
    (tmp_path / "tokenizer_meta.json").write_text(json.dumps(meta))
    again = Tokenizer.load(tmp_path)
    assert again.fingerprint == tokenizer.fingerprint and again.specials == Specials()
    assert (again.eot_id, again.pad_id) == (tokenizer.eot_id, tokenizer.pad_id)


def test_ids_of_a_model(tmp_path):
    """The tokenizer's files come first; an ordinary token is no separator, though sampling stops at it."""
    ids = write_legacy(tmp_path, [END, "<b>", "<p>"])
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": None, "tokenizer_class": "X"}))
    write_fast(tmp_path / "f", [])
    spec = json.loads((tmp_path / "f/tokenizer.json").read_text())
    flags = {**spec["added_tokens"][0], "special": False}
    spec["added_tokens"] = [{**flags, "content": token, "id": i} for token, i in ids.items()]
    (tmp_path / "f/tokenizer.json").write_text(json.dumps(spec))
    bare = Tokenizer.load(tmp_path / "f")
    assert bare.eot_id is None and bare.bos_id is None and ids[END] in bare.encode("a</s>")
    assert bare.for_model(eos=[5]).eot_id is None and bare.for_model(eos=[5]).stop_ids == (5,)
    whole = bare.for_model(eos=[ids[END], 5], bos=ids["<b>"], pad=ids["<p>"])
    assert (whole.eot_id, whole.bos_id, whole.pad_id) == tuple(ids.values())
    assert whole.stop_ids == (ids[END], 5) and ids[END] not in whole.encode("a</s>")
    assert whole.for_model(eos=[ids["<b>"]]).eot_id == ids[END]


def test_a_chat_template_takes_the_tokenizers_own_end_and_padding(tmp_path):
    ids = write_legacy(tmp_path, [END, "<pad>", USER], ROLES | {"additional_special_tokens": [USER]})
    tokenizer = chat_tokenizer(load(tmp_path))
    template = Template(tokenizer, "chat")
    assert (template.eos_id, template.pad_id) == (ids[END], ids["<pad>"])
    assert tokenizer.special_id(END_OF_TEXT) is None and tokenizer.special_id(PAD) is None
    assert template.prompt("a<|user|>")[0] == ids[USER] and ids[USER] not in template.prompt("a<|user|>")[1:]
    assert template.response("a")[-1] == ids[END]


def test_padding_that_is_another_special_token_gets_its_own(tmp_path):
    write_legacy(tmp_path, [END], ROLES | {"pad_token": END})
    tokenizer = chat_tokenizer(load(tmp_path))
    assert tokenizer.pad_id == tokenizer.special_id(PAD) != tokenizer.eot_id


def test_an_added_token_becomes_one_of_the_template(tmp_path):
    """An ordinary added `<|assistant|>` is found in text, until it is a mark of the template."""
    write_fast(tmp_path, [tokenizers.AddedToken("[N]", special=True)], eos_token=END_OF_TEXT)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    spec["added_tokens"][-1].update(content=ASSISTANT, special=False)
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = load(tmp_path)
    assert tokenizer.special_id(ASSISTANT) == tokenizer.vocab_size - 1 not in tokenizer.encode(f"a{ASSISTANT}")
    grown = load_named(tokenizer, "[M]").with_specials(["[M]"])
    assert grown.special_id("[M]") == tokenizer.vocab_size and grown.special_id("[M]") not in grown.encode("a[M]")


def load_named(tokenizer, name):
    """The tokenizer with an ordinary added token more."""
    engine = tokenizers.Tokenizer.from_str(tokenizer._engine.to_str())
    engine.add_tokens([name])
    more = Tokenizer(engine, tokenizer.kind, tokenizer.specials)
    assert more.vocab_size - 1 in more.encode(f"a{name}")
    return more


def test_gpt1_keeps_its_added_tokens_whole(tmp_path):
    pytest.importorskip("spacy", reason="GPT-1's words need spaCy")
    tokens = ["<unk>", "a</w>", "b</w>", "the</w>", "t", "h", "e</w>", "th"]
    (tmp_path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nt h\nth e</w>\n")
    (tmp_path / "added_tokens.json").write_text(json.dumps({"[NAME]": 8, "<e>": 9}))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<e>", "unk_token": "<unk>"}))
    tokenizer = load(tmp_path)
    assert (tokenizer.kind, tokenizer.eot_id, tokenizer.unk_id) == ("gpt1", 9, 0)
    assert tokenizer.encode("The [NAME] a[NAME]b") == [3, 8, 1, 8, 2]
    assert 9 not in tokenizer.encode("a <e>")
    with pytest.raises(InputError, match="lone surrogate .*: remove it"):
        load_gpt1(tmp_path).encode("a\udcff")


def test_a_blank_before_the_first_word_as_the_config_says(tmp_path):
    write_legacy(tmp_path, [], None, add_prefix_space=True)
    assert load(tmp_path).encode("the cat") == load(tmp_path).encode(" the cat")


@pytest.mark.parametrize("where", ["config", "tokenizer.json"])
def test_a_text_that_begins_with_bos(tmp_path, where):
    config = {"eos_token": END_OF_TEXT, "bos_token": END_OF_TEXT}
    write_fast(tmp_path, [], **config, **({"add_bos_token": True} if where == "config" else {}))
    if where != "config":
        engine = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        end = (END_OF_TEXT, engine.token_to_id(END_OF_TEXT))
        engine.post_processor = tokenizers.processors.TemplateProcessing(f"{END_OF_TEXT} $A", special_tokens=[end])
        engine.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load(tmp_path)
    assert tokenizer.specials.adds_bos and tokenizer.bos_id not in tokenizer.encode("a")
    tokenizer.save(tmp_path / "again")
    assert Tokenizer.load(tmp_path / "again").specials.adds_bos


def test_specials_that_are_none_leave_no_trace():
    assert Specials().to_json() == {}
    specials = Specials(eos="<e>", in_text=("a",), stop_ids=(1, 2), adds_bos=True)
    assert Specials.from_json(json.loads(json.dumps(specials.to_json()))) == specials
    assert np.all([f.default in (None, (), False) for f in dataclasses.fields(Specials)])

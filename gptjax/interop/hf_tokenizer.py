"""The tokenizer files of an exported Hugging Face directory, and the token ids of a model's own files."""

import json
from pathlib import Path

from gptjax.data.specials import ASSISTANT, END_OF_TEXT, SYSTEM, USER
from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import InputError

# data/chat.py's template in Jinja: the same ids for one turn and for several, the same refusals.
CHAT_TEMPLATE = (
    "{%- set names = {'system': '" + SYSTEM + "', 'user': '" + USER + "', 'assistant': '" + ASSISTANT + "'} -%}"
    "{%- set turn = namespace(expected='user') -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' and loop.first -%}"
    "{%- elif message['role'] != turn.expected -%}"
    "{{- raise_exception('a system turn may come first, then user and assistant alternate') -}}"
    "{%- elif turn.expected == 'user' -%}{%- set turn.expected = 'assistant' -%}"
    "{%- else -%}{%- set turn.expected = 'user' -%}"
    "{%- endif -%}"
    "{{- names[message['role']] + message['content'] -}}"
    "{%- if message['role'] == 'assistant' -%}{{- eos_token -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- names['assistant'] -}}{%- endif -%}"
)


def write_tokenizer(directory, context_length: int, tokenizer: Tokenizer, template: str | None = None):
    """tokenizer.json and what transformers wants beside it: its class, its special tokens, its chat template."""
    tokenizer.save(directory)
    spec = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    special = special_tokens(tokenizer)
    name = _tokenizer_class(tokenizer, spec, special)
    if tokenizer.specials.in_text:
        special["additional_special_tokens"] = list(tokenizer.specials.in_text)
    settings = {
        "tokenizer_class": name,
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,  # would take out blanks that the model wrote
        **special,
    }
    if name == "GPT2Tokenizer":
        settings["add_prefix_space"] = False
    if tokenizer.specials.adds_bos:
        settings["add_bos_token"] = True
    if template == "chat":
        settings["chat_template"] = CHAT_TEMPLATE
    dump(directory / "tokenizer_config.json", settings)
    dump(directory / "special_tokens_map.json", special)
    if tokenizer.kind != "char":  # the files of older readers: openai's own layout
        vocabulary = spec["model"]["vocab"]
        merges = (pair if isinstance(pair, str) else " ".join(pair) for pair in spec["model"]["merges"])
        dump(directory / "vocab.json", vocabulary)
        (directory / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
        added = {t["content"]: t["id"] for t in spec["added_tokens"] if t["content"] not in vocabulary}
        if added:
            dump(directory / "added_tokens.json", added)


def special_tokens(tokenizer: Tokenizer) -> dict[str, str]:
    """{'eos_token', 'bos_token', 'pad_token', 'unk_token': token}, without those that there are not."""
    named = tokenizer.specials
    eos = tokenizer.token(tokenizer.eot_id)
    special = {"bos": named.bos, "eos": eos, "unk": named.unk, "pad": tokenizer.token(tokenizer.pad_id) or named.pad}
    if tokenizer.kind == "gpt1":
        special["unk"] = "<unk>"
    elif named.eos in (None, END_OF_TEXT):  # one token for all, as GPT-2 has it
        special |= {role: special[role] or eos for role in ("bos", "unk")}
    return {f"{role}_token": content for role, content in special.items() if content is not None}


def token_ids(tokenizer: Tokenizer | None) -> tuple[dict, dict]:
    """(of config.json, of generation_config.json): bos_token_id, eos_token_id and, where there is one, pad_token_id."""
    if tokenizer is None:
        return {"bos_token_id": None, "eos_token_id": None}, {}
    special, stops = special_tokens(tokenizer), tokenizer.stop_ids
    bos, pad = (tokenizer.special_id(special.get(f"{role}_token")) for role in ("bos", "pad"))
    config = {"bos_token_id": bos, "eos_token_id": stops[0] if stops else None}
    if pad is not None:
        config["pad_token_id"] = pad
    generation = config | {
        "eos_token_id": list(stops) if len(stops) > 1 else config["eos_token_id"],
        "pad_token_id": config["eos_token_id"] if pad is None else pad,
    }
    return config, {key: value for key, value in generation.items() if value is not None}


def read_token_ids(directory: Path) -> dict:
    """Tokenizer.for_model's arguments, from generation_config.json and, for what that leaves out, config.json."""
    settings: dict = {}
    for name in ("config.json", "generation_config.json"):
        if (directory / name).exists():
            found = read_json(directory / name)
            settings |= {key: value for key, value in found.items() if value is not None}
    ids = {role: settings.get(f"{role}_token_id") for role in ("eos", "bos", "pad")}
    ids["eos"] = ids["eos"] if isinstance(ids["eos"], list) else [] if ids["eos"] is None else [ids["eos"]]
    for value in (*ids["eos"], ids["bos"], ids["pad"]):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise InputError(f"{directory}: config.json or generation_config.json has a token id that is {value!r}.")
    return ids


def _tokenizer_class(tokenizer, spec, special) -> str:
    """The class in transformers that turns text to the same ids."""
    if tokenizer.kind == "gpt1":
        return "OpenAIGPTTokenizer"
    before = spec["pre_tokenizer"] or {}
    plain = before.get("type") == "ByteLevel" and before.get("use_regex", True)
    plain = plain and not before["add_prefix_space"] and spec["normalizer"] is None
    alone = {token["content"] for token in spec["added_tokens"]} == {tokenizer.token(tokenizer.eot_id)}
    # That class has defaults for these three.
    if tokenizer.kind == "bpe" and plain and alone and {"bos_token", "eos_token", "unk_token"} <= special.keys():
        return "GPT2Tokenizer"
    return "PreTrainedTokenizerFast"  # takes tokenizer.json as it is; GPT-2's class rebuilds it


def dump(path, value):
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error}): get the file again.") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} is not one JSON object: get the file again.")
    return value

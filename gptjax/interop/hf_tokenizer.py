"""Tokenizer files of an exported Hugging Face directory, and the token ids in a model's config files."""

import json
from pathlib import Path

from gptjax.data.specials import ASSISTANT, END_OF_TEXT, SYSTEM, USER
from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import InputError

# The template of data/chat.py in Jinja: same ids, same errors. Imports compare it: a change would break them.
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
    """Writes tokenizer.json and the files that transformers needs with it: class, special tokens, chat template.

    context_length: becomes model_max_length. template: kind of the model's Template, 'chat' adds a chat_template.
    """
    tokenizer.save(directory)
    spec = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    special = special_tokens(tokenizer)
    name = _tokenizer_class(tokenizer, spec, special)
    if tokenizer.specials.in_text:
        special["additional_special_tokens"] = list(tokenizer.specials.in_text)
    settings = {
        "tokenizer_class": name,
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,  # True would remove spaces that the model wrote
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
    if tokenizer.kind != "char":  # OpenAI's own layout, for older readers
        vocabulary = spec["model"]["vocab"]
        merges = (pair if isinstance(pair, str) else " ".join(pair) for pair in spec["model"]["merges"])
        dump(directory / "vocab.json", vocabulary)
        (directory / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
        added = {t["content"]: t["id"] for t in spec["added_tokens"] if t["content"] not in vocabulary}
        if added:
            dump(directory / "added_tokens.json", added)


def special_tokens(tokenizer: Tokenizer) -> dict[str, str]:
    """{'eos_token', 'bos_token', 'pad_token', 'unk_token': token}, without the roles that have no token."""
    named = tokenizer.specials
    eos = tokenizer.token(tokenizer.eot_id)
    special = {"bos": named.bos, "eos": eos, "unk": named.unk, "pad": tokenizer.token(tokenizer.pad_id) or named.pad}
    if tokenizer.kind == "gpt1":
        special["unk"] = "<unk>"
    elif named.eos in (None, END_OF_TEXT):  # one token for all roles, as in GPT-2
        special |= {role: special[role] or eos for role in ("bos", "unk")}
    return {f"{role}_token": content for role, content in special.items() if content is not None}


def token_ids(tokenizer: Tokenizer | None) -> tuple[dict, dict]:
    """bos_token_id, eos_token_id and, if there is one, pad_token_id: (for config.json, for generation_config.json)."""
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
    """Arguments for Tokenizer.for_model, from generation_config.json or, where that has none, config.json.

    InputError: a file that is damaged, or an id that is not an integer.
    """
    settings: dict = {}
    for name in ("config.json", "generation_config.json"):
        if (directory / name).exists():
            found = read_json(directory / name)
            settings |= {key: value for key, value in found.items() if value is not None}
    ids = {role: settings.get(f"{role}_token_id") for role in ("eos", "bos", "pad")}
    ids["eos"] = ids["eos"] if isinstance(ids["eos"], list) else [] if ids["eos"] is None else [ids["eos"]]
    for value in (*ids["eos"], ids["bos"], ids["pad"]):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise InputError(
                f"{directory}: config.json or generation_config.json has the token id {value!r}, which is "
                "not an integer: correct it."
            )
    return ids


def _tokenizer_class(tokenizer, spec, special) -> str:
    """The transformers class that encodes text to the same ids."""
    if tokenizer.kind == "gpt1":
        return "OpenAIGPTTokenizer"
    before = spec["pre_tokenizer"] or {}
    plain = before.get("type") == "ByteLevel" and before.get("use_regex", True)
    plain = plain and not before["add_prefix_space"] and spec["normalizer"] is None
    only_eot = {token["content"] for token in spec["added_tokens"]} == {tokenizer.token(tokenizer.eot_id)}
    # GPT2Tokenizer has defaults for these three.
    if tokenizer.kind == "bpe" and plain and only_eot and {"bos_token", "eos_token", "unk_token"} <= special.keys():
        return "GPT2Tokenizer"
    return "PreTrainedTokenizerFast"  # uses tokenizer.json as it is; GPT2Tokenizer rebuilds it


def dump(path, value):
    """Writes a value as indented JSON."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path) -> dict:
    """Reads one JSON object. InputError: unreadable, or not an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error}): download the file again.") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} is not a JSON object: download the file again.")
    return value

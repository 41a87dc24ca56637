"""The tokenizer files of an exported Hugging Face directory."""

import json


def write_tokenizer(directory, context_length: int, tokenizer):
    """tokenizer.json and what transformers wants beside it: its class and its special tokens."""
    tokenizer.save(directory)
    spec = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    name, special = _tokenizer_class(tokenizer, spec)
    settings = {
        "tokenizer_class": name,
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,  # would take out blanks that the model wrote
        **special,
    }
    if name == "GPT2Tokenizer":
        settings["add_prefix_space"] = False
    dump(directory / "tokenizer_config.json", settings)
    dump(directory / "special_tokens_map.json", special)
    if tokenizer.kind != "char":  # the files of older readers: openai's own layout
        merges = (pair if isinstance(pair, str) else " ".join(pair) for pair in spec["model"]["merges"])
        dump(directory / "vocab.json", spec["model"]["vocab"])
        (directory / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")


def _tokenizer_class(tokenizer, spec) -> tuple[str, dict]:
    """The class in transformers that turns text to the same ids, and its special tokens."""
    tokens = {token["id"]: token["content"] for token in spec["added_tokens"]}
    if tokenizer.kind == "gpt1":
        named = {"eos_token": tokens.get(tokenizer.eot_id), "pad_token": tokens.get(tokenizer.pad_id)}
        return "OpenAIGPTTokenizer", {"unk_token": "<unk>", **{k: v for k, v in named.items() if v is not None}}
    end = tokens.get(tokenizer.eot_id)
    special = {} if end is None else {"bos_token": end, "eos_token": end, "unk_token": end}
    if tokenizer.pad_id is not None:
        special["pad_token"] = tokens[tokenizer.pad_id]
    before = spec["pre_tokenizer"] or {}
    plain = before.get("type") == "ByteLevel" and before.get("use_regex", True)
    plain = plain and not before["add_prefix_space"] and spec["normalizer"] is None
    if tokenizer.kind == "bpe" and plain and list(tokens.values()) == [end]:
        return "GPT2Tokenizer", special
    return "PreTrainedTokenizerFast", special  # takes tokenizer.json as it is; GPT-2's class rebuilds it


def dump(path, value):
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

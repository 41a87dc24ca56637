"""A tokenizer's files as they are published: a small byte-level BPE with added tokens."""

import json

from gptjax.data.bpe import train_bpe
from gptjax.data.specials import END_OF_TEXT

TEXT = ["the cat sat on the mat, and the cat ran. hello world\n"] * 3
END = "</s>"
ROLES = {"eos_token": END, "bos_token": END, "unk_token": END, "pad_token": "<pad>"}


def write_legacy(directory, added=(), special=None, **config):
    """vocab.json, merges.txt, added_tokens.json, special_tokens_map.json, tokenizer_config.json; no end-of-text in the
    vocabulary. added: tokens at the ids after it. Returns {added token: id}."""
    directory.mkdir(parents=True, exist_ok=True)
    model = json.loads(train_bpe(TEXT, 280)._engine.to_str())["model"]
    vocabulary = {token: i for token, i in model["vocab"].items() if token != END_OF_TEXT}
    ids = {token: len(vocabulary) + i for i, token in enumerate(added)}
    files = {"vocab": vocabulary, "added_tokens": ids, "special_tokens_map": special, "tokenizer_config": config}
    for name, value in files.items():
        if value:
            (directory / f"{name}.json").write_text(json.dumps(value))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (directory / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    return ids

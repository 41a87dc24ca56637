"""Special and added tokens: their roles, and how the files of a published tokenizer define them.

transformers stores them in tokenizer.json, tokenizer_config.json, special_tokens_map.json and added_tokens.json; their
precedence is that of `PreTrainedTokenizerBase._from_pretrained` (5.x).
"""

import dataclasses
import json
import warnings
from typing import Any

from etils import epath

from gptjax.errors import InputError

END_OF_TEXT, PAD = "<|endoftext|>", "<|pad|>"
SYSTEM, USER, ASSISTANT = "<|system|>", "<|user|>", "<|assistant|>"
_NEVER_IN_TEXT = frozenset({END_OF_TEXT, PAD, SYSTEM, USER, ASSISTANT})
_ROLES = ("eos", "bos", "pad", "unk")
_EXTRA = ("additional_special_tokens", "extra_special_tokens")  # the names of transformers 4 and 5
_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False}


@dataclasses.dataclass(frozen=True)
class Specials:
    """eos, bos, pad, unk: the token of each role; None = not named (for eos that means `<|endoftext|>` if it exists).

    in_text: special tokens that are recognized in text, as in transformers. The tokens of the roles above and of the
    chat template are not among them: text is never encoded to those.
    stop_ids: further ids that end a sampled text, from a model's generation_config.json.
    adds_bos: a prompt begins with bos.
    """

    eos: str | None = None
    bos: str | None = None
    pad: str | None = None
    unk: str | None = None
    in_text: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    adds_bos: bool = False

    def to_json(self) -> dict:
        """The values that differ from the defaults, for tokenizer_meta.json."""
        return {k: v for k, v in dataclasses.asdict(self).items() if v not in (None, (), False)}

    @classmethod
    def from_json(cls, value: dict) -> "Specials":
        """The inverse of to_json. TypeError: an unknown key."""
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in value.items()})


def complete(spec: dict, directory: epath.Path) -> tuple[dict, Specials]:
    """(tokenizer.json completed with the added tokens that the other files of the directory name, their roles).

    spec: as from tokenizers.Tokenizer.to_str(). A named token without an id is ignored with a warning, since the model
    has no row for it. InputError: a damaged file.
    """
    settings, own = _read(directory / "tokenizer_config.json"), _by_content(spec["added_tokens"])
    try:
        if "added_tokens_decoder" in settings:
            later = [{"id": int(i), **token} for i, token in settings["added_tokens_decoder"].items()]
            added = own | {token["content"]: _added(**token) for token in later}
        else:  # written by transformers before 4.34
            settings = settings | _read(directory / "special_tokens_map.json")
            ids = _read(directory / "added_tokens.json")
            added = {content: _added(content, int(i)) for content, i in ids.items()} | own
        roles = {role: _content(settings.get(f"{role}_token")) for role in _ROLES}
        extra = [_content(token) for key in _EXTRA for token in _listed(settings.get(key))]
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise InputError(
            f"The added tokens in {directory} cannot be read ({error}): download its files again."
        ) from None
    for content in [content for content in [*roles.values(), *extra] if content]:
        if content not in added and content in spec["model"]["vocab"]:
            added[content] = _added(content, spec["model"]["vocab"][content])
        if content in added:
            added[content] = {**added[content], "special": True}
        elif content != END_OF_TEXT:  # the default of GPT-2's class, often written without being used
            warnings.warn(
                f"{directory} names the special token {content!r} without an id: it is ignored.", stacklevel=2
            )
    for content in _NEVER_IN_TEXT & set(added):
        added[content] = {**added[content], "special": True}
    roles = {role: content if content in added else None for role, content in roles.items()}
    before = spec["pre_tokenizer"] or {}
    if before.get("type") == "ByteLevel" and isinstance(settings.get("add_prefix_space"), bool):
        spec = spec | {"pre_tokenizer": before | {"add_prefix_space": settings["add_prefix_space"]}}
    spec = spec | {"added_tokens": sorted(added.values(), key=lambda token: token["id"])}
    special = [token["content"] for token in spec["added_tokens"] if token["special"]]
    in_text = tuple(content for content in special if content not in _NEVER_IN_TEXT | set(roles.values()))
    return spec, Specials(**roles, in_text=in_text, adds_bos=_adds_bos(settings, spec, roles["bos"]))


def named_eos(directory: epath.Path) -> str | None:
    """The end-of-sequence token that the files of a directory name; None if they name none."""
    settings = _read(directory / "tokenizer_config.json")
    if "added_tokens_decoder" not in settings:
        settings = settings | _read(directory / "special_tokens_map.json")
    return _content(settings.get("eos_token"))


def _adds_bos(settings: dict, spec: dict, bos: str | None) -> bool:
    if "add_bos_token" in settings:
        return bool(settings["add_bos_token"]) and bos is not None
    after = spec.get("post_processor") or {}
    steps = [after, *after.get("processors", [])]
    first = next((step["single"][0] for step in steps if step.get("type") == "TemplateProcessing"), {})
    return bos is not None and first.get("SpecialToken", {}).get("id") == bos


def _by_content(tokens: list[dict]) -> dict[str, dict]:
    return {token["content"]: token for token in tokens}


def _added(content: str, id: int, special: bool = False, normalized: bool | None = None, **flags) -> dict:
    flags = _FLAGS | {key: bool(value) for key, value in flags.items() if key in _FLAGS}
    normalized = not special if normalized is None else normalized
    return {"id": id, "content": content, **flags, "normalized": normalized, "special": special}


def _content(token: Any) -> str | None:
    """The text of a token, which is a string or an object."""
    return token["content"] if isinstance(token, dict) else token


def _listed(tokens: Any) -> list:
    return list(tokens.values()) if isinstance(tokens, dict) else list(tokens or ())


def _read(path: epath.Path) -> dict:
    """The JSON object in a file; {} if there is no file."""
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}): download the file again.") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} is not a JSON object: download the file again.")
    return value

"""Configs: frozen dataclasses that validate themselves, made from a config file's ConfigDict or a dict.

A config file's `get_config(arg)` returns a ConfigDict; flags override it (command_line.py); `build` turns it at once
into dataclasses. Nothing below the mains ever sees a ConfigDict. The defaults live in the dataclasses alone:
`config_dict` makes the ConfigDict from them.
"""

import dataclasses
import difflib
import functools
import inspect
import json
import re
import typing
from collections.abc import Iterator, Mapping

from ml_collections import config_dict as mlc

from gptjax import console, paths, ranges
from gptjax.errors import InputError
from gptjax.parallel import sharding

# Config keys that earlier versions had under another name.
RENAMED = {
    "model.pipeline_rounds": "model.pipeline_virtual_stages",
    "normalise": "normalize",
    "ppo.normalise": "ppo.normalize",
    "ppo.ptx_normalise": "ppo.ptx_normalize",
}


def config_dict(cls, **overrides) -> mlc.ConfigDict:
    """A ConfigDict with the fields and defaults of a dataclass; `X | None` fields become placeholders."""
    result = _config_dict(cls, None)
    result.update(overrides)
    return result


def _config_dict(cls, instance) -> mlc.ConfigDict:
    """instance: what gives the defaults, as a section that its stage has a default of its own for; None = the class."""
    result = mlc.ConfigDict()
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind, default = hints[field.name], field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        default = default if instance is None else getattr(instance, field.name)
        optional = type(None) in typing.get_args(kind)
        if dataclasses.is_dataclass(kind):
            value = _config_dict(kind, None if default is dataclasses.MISSING else default)
        elif default is dataclasses.MISSING or (optional and default is None):
            value = mlc.config_dict.placeholder(kind.__args__[0] if optional else kind)
        else:
            value = mlc.ConfigDict(dict(default)) if isinstance(default, Mapping) else default
        result[field.name] = value
    return result


def build(cls, section, path="config"):
    """The dataclass that a ConfigDict or dict describes. Unknown and missing keys, values of another type and numbers
    outside their range (ranges.py) are InputErrors."""
    hints, fields = typing.get_type_hints(cls, include_extras=True), {f.name: f for f in dataclasses.fields(cls)}
    if not isinstance(section, mlc.ConfigDict | Mapping):
        raise InputError(f"{path}={section!r} must be a section with the keys {', '.join(fields)}.")
    section = section.to_dict() if isinstance(section, mlc.ConfigDict) else dict(section)
    for key in section:
        if key not in fields:
            raise InputError(f"Unknown key {path}.{key}{nearest(key, fields)}.")
    values = {}
    for name, value in section.items():
        kind = hints[name]
        if dataclasses.is_dataclass(kind):
            value = build(kind, value, f"{path}.{name}")
        else:
            ranges.check(value, kind, f"{path}.{name}")
            if isinstance(value, list):
                value = tuple(value)
            elif isinstance(value, dict):
                value = dict(value)
            elif "path" in fields[name].metadata and paths.is_path(value, fields[name].metadata["path"]):
                value = paths.expand(value)
        values[name] = value
    try:
        return cls(**values)
    except TypeError as error:
        raise InputError(f"{path}: {error}.") from error


def with_sharding_rules(stage):
    """Of a stage, whose first argument is a config: called with that config's mesh.rules active, and with an output
    whose failing does not end it (console.lenient_output)."""

    @functools.wraps(stage)
    def under_rules(config, *args, **kwargs):
        section = (config.get("mesh") or {}).get("rules") or {}  # a config may leave out what it takes as it is
        with console.lenient_output(), sharding.use_rules(build(sharding.Rules, section, "config.mesh.rules")):
            return stage(config, *args, **kwargs)

    return under_rules


def nearest(name, names) -> str:
    """' (did you mean x?)', or the list of what there is."""
    close = difflib.get_close_matches(str(name), [str(n) for n in names], n=1)
    return f": did you mean {close[0]!r}?" if close else f": there are {', '.join(sorted(map(str, names)))}"


def choose(presets: dict, name: str, what: str):
    """presets[name], or an InputError that names the nearest."""
    if name not in presets:
        raise InputError(f"Unknown {what} {name!r}{nearest(name, presets)}")
    return presets[name]


# --- what a config's keys mean ----------------------------------------------------------------------------

_LINE = re.compile(r"(\w+): +(.*)")


def documentation(cls) -> tuple[str, dict[str, str]]:
    """(what a config dataclass is, {key: its explanation}), from its docstring and those of the classes it extends.

    A key has a line `key: explanation`, which goes on in indented lines; the text before the first is about the whole.
    """
    about, explained = "", {}
    for base in reversed(cls.__mro__):
        docstring = base.__dict__.get("__doc__") or ""
        if not dataclasses.is_dataclass(base) or docstring.startswith(f"{base.__name__}("):  # made by dataclass()
            continue
        prose, key = [], None
        for line in inspect.cleandoc(docstring).splitlines():
            if match := _LINE.fullmatch(line):
                key, explained[match[1]] = match[1], match[2]
            elif key and line.startswith(" "):
                explained[key] += f" {line.strip()}"
            elif key is None:
                prose.append(line)
        about = " ".join(" ".join(prose).split()) or about
    return about, explained


class Section(typing.NamedTuple):
    """A dataclass within a config. path: 'mesh.rules', '' of the whole; about: what it is; keys: its own values, as
    {name: (type with annotations, its dataclass field, explanation)}."""

    path: str
    about: str
    keys: dict[str, tuple[typing.Any, dataclasses.Field, str]]


def sections(cls, path: str = "", about: str = "") -> Iterator[Section]:
    """Every section of a config, the whole first. about: what the field says that holds it, if anything."""
    hints = typing.get_type_hints(cls, include_extras=True)
    whole, explained = documentation(cls)
    fields = [(f, hints[f.name], explained.get(f.name, "")) for f in dataclasses.fields(cls)]
    keys = {f.name: (hint, f, text) for f, hint, text in fields if not dataclasses.is_dataclass(hint)}
    yield Section(path, about or whole, keys)
    for field, hint, text in fields:
        if dataclasses.is_dataclass(hint):
            yield from sections(hint, f"{path}.{field.name}".lstrip("."), text)


def flatten(config) -> dict:
    """{dotted key: value} of a config, its mappings key by key; as --config.KEY=VALUE has them."""
    flat = {}
    for section in sections(type(config)):
        within = functools.reduce(getattr, section.path.split(".") if section.path else (), config)
        for name in section.keys:
            key, value = f"{section.path}.{name}".lstrip("."), getattr(within, name)
            flat |= {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, Mapping) else {key: value}
    return flat


def to_json(config) -> dict:
    """A nested dataclass (or a plain value) as JSON types."""
    config = dataclasses.asdict(config) if dataclasses.is_dataclass(config) else config
    return json.loads(json.dumps(config, default=dict))

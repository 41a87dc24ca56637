"""Configs: frozen dataclasses that validate themselves, made from a config file's ConfigDict or a dict.

A config file's `get_config(arg)` returns a ConfigDict; flags override it (command_line.py); `build` turns it at once
into dataclasses. Nothing below the mains ever sees a ConfigDict. The defaults live in the dataclasses alone:
`config_dict` makes the ConfigDict from them.
"""

import dataclasses
import difflib
import functools
import importlib.util
import inspect
import json
import re
import sys
import types
import typing
from collections.abc import Iterator, Mapping

from ml_collections import config_dict as mlc

from gptjax import console, paths, ranges
from gptjax.errors import InputError

# Config keys that earlier versions had under another name.
RENAMED = {
    "model.pipeline_rounds": "model.pipeline_virtual_stages",
    "normalise": "normalize",
    "ppo.normalise": "ppo.normalize",
    "ppo.ptx_normalise": "ppo.ptx_normalize",
}


def section_class(hint, value=None):
    """The dataclass of a field that is a section of its config; None of a field that is a value. Of several
    (`GPTConfig | LSTMConfig`) the one that has most of the keys of `value` (a mapping, an instance of one of them, or
    None), the first by default."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    kinds = typing.get_args(hint) if union else (hint,)
    if not all(isinstance(kind, type) and dataclasses.is_dataclass(kind) for kind in kinds):
        return None
    if dataclasses.is_dataclass(value):
        return type(value)
    return max(kinds, key=lambda kind: len(set(value or ()) & {f.name for f in dataclasses.fields(kind)}))


def config_dict(cls, **overrides) -> mlc.ConfigDict:
    """A ConfigDict with the fields and defaults of a dataclass; `X | None` fields become placeholders."""
    result = _config_dict(cls, None)
    result.update(overrides)
    return result


def defaults(config) -> dict:
    """The defaults of a config's keys, as a nested dict; a section that may be one of several is as the config's."""
    return _config_dict(type(config), None, config).to_dict()


def _config_dict(cls, instance, like=None) -> mlc.ConfigDict:
    """instance: what gives the defaults, as a section that its stage has a default of its own for; None = the class.
    like: an instance that says which class its sections are of."""
    result = mlc.ConfigDict()
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind, default = hints[field.name], field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        default = default if instance is None else getattr(instance, field.name)
        optional = type(None) in typing.get_args(kind)
        of_like = getattr(like, field.name, None)
        if section := section_class(kind, of_like):
            value = _config_dict(section, default if isinstance(default, section) else None, of_like)
        elif default is dataclasses.MISSING or (optional and default is None):
            value = mlc.config_dict.placeholder(kind.__args__[0] if optional else kind)
        else:
            value = mlc.ConfigDict(dict(default)) if isinstance(default, Mapping) else default
        result[field.name] = value
    return result


def build(cls, section, path="config"):
    """The dataclass that a ConfigDict or dict describes. Unknown and missing keys, values of another type and numbers
    outside their range (ranges.py) are InputErrors. cls: one, or several to choose from (`section_class`)."""
    cls = section_class(cls, section if isinstance(section, mlc.ConfigDict | Mapping) else None)
    hints, fields = typing.get_type_hints(cls, include_extras=True), {f.name: f for f in dataclasses.fields(cls)}
    if not isinstance(section, mlc.ConfigDict | Mapping):
        raise InputError(f"{path}={section!r} must be a section with the keys {', '.join(fields)}.")
    section = section.to_dict() if isinstance(section, mlc.ConfigDict) else dict(section)
    for key in section:
        if key not in fields:
            raise InputError(f"Unknown key {path}.{key}{nearest(key, fields)}")
    values = {}
    for name, value in section.items():
        kind = hints[name]
        if section_class(kind):
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


def sharding_rules(config):
    """The mesh.rules (sharding.Rules) of a config, a ConfigDict or dict; the default ones if it leaves them out."""
    from gptjax.parallel import sharding  # imports JAX, which configs without a device need not wait for

    return build(sharding.Rules, (config.get("mesh") or {}).get("rules") or {}, "config.mesh.rules")


def with_sharding_rules(stage):
    """Decorates a function whose first argument is a config: it runs with that config's mesh.rules active, and printing
    does not raise in it (console.lenient_output)."""

    @functools.wraps(stage)
    def under_rules(config, *args, **kwargs):
        from gptjax.parallel import sharding

        with console.lenient_output(), sharding.use_rules(sharding_rules(config)):
            return stage(config, *args, **kwargs)

    return under_rules


def function_of(file: str, name: str):
    """A function of a config file, beside its get_config; None if it has none of that name."""
    spec = importlib.util.spec_from_file_location("config_file", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return getattr(module, name, None)


def nearest(name, names) -> str:
    """The end of a sentence about an unknown name: ": did you mean 'x'?", or ": there are x, y."."""
    close = difflib.get_close_matches(str(name), [str(n) for n in names], n=1)
    return f": did you mean {close[0]!r}?" if close else f": there are {', '.join(sorted(map(str, names)))}."


def choose(presets: dict, name: str, what: str):
    """presets[name], or an InputError that names the nearest."""
    if name not in presets:
        raise InputError(f"Unknown {what} {name!r}{nearest(name, presets)}")
    return presets[name]


# --- what a config's keys mean ----------------------------------------------------------------------------

_LINE = re.compile(r"(\w+): +(.*)")


def documentation(cls) -> tuple[str, dict[str, str]]:
    """(what a config dataclass is, {key: its explanation}), from its docstring and those of the classes it extends.

    A key has a line `key: explanation`, continued in indented lines; the text before the first key is about the whole.
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


def sections(cls, path: str = "", about: str = "", values=None) -> Iterator[Section]:
    """Every section of a config, the whole first. about: what the field says that holds it, if anything. values: the
    config, as a mapping or an instance; None = a default one."""
    cls = section_class(cls, values)
    hints = typing.get_type_hints(cls, include_extras=True)
    whole, explained = documentation(cls)
    fields = [(f, hints[f.name], explained.get(f.name, "")) for f in dataclasses.fields(cls)]
    keys = {f.name: (hint, f, text) for f, hint, text in fields if not section_class(hint)}
    yield Section(path, about or whole, keys)
    for field, hint, text in fields:
        if section_class(hint):
            of_field = values.get(field.name) if hasattr(values, "get") else getattr(values, field.name, None)
            yield from sections(hint, f"{path}.{field.name}".lstrip("."), text, of_field)


def flatten(config) -> dict:
    """{dotted key: value} of a config, its mappings key by key; as --config.KEY=VALUE has them."""
    flat = {}
    for section in sections(type(config), values=config):
        within = functools.reduce(getattr, section.path.split(".") if section.path else (), config)
        for name in section.keys:
            key, value = f"{section.path}.{name}".lstrip("."), getattr(within, name)
            flat |= {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, Mapping) else {key: value}
    return flat


def to_json(config) -> dict:
    """A nested dataclass (or a plain value) as JSON types."""
    config = dataclasses.asdict(config) if dataclasses.is_dataclass(config) else config
    return json.loads(json.dumps(config, default=dict))

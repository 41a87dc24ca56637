"""JSON that every parser reads, without NaN, and files that are written atomically."""

import json
import math
import os

from etils import epath


def json_safe(value):
    """A value in JSON's types, at any depth: None for NaN and infinities, numbers and lists for numpy's and JAX's
    arrays."""
    if isinstance(value, dict):
        return {k: json_safe(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [json_safe(v) for v in value]
    if hasattr(value, "tolist"):  # a scalar or an array of numpy or JAX
        return json_safe(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def dumps(value, **options) -> str:
    """json.dumps of what json_safe makes of a value."""
    return json.dumps(json_safe(value), allow_nan=False, **options)


def write_json(path, value):
    """Atomic: a reader sees the old file or the new one. Values that are not finite become null (json_safe)."""
    path = epath.Path(path)
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    text = dumps(value, indent=2) + "\n"
    try:
        temporary.write_text(text)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise

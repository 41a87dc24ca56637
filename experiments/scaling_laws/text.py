"""The text: the Python files of the standard library, its tests too, a document each."""

import json
import sysconfig
from pathlib import Path

_NOT = ("site-packages", "dist-packages", "__pycache__")


def write(path: Path) -> Path:
    """Writes the documents to a JSONL file, if it is not there. Returns its path."""
    if not path.exists():
        root = Path(sysconfig.get_paths()["stdlib"])
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        with open(partial, "w") as file:
            for source in sorted(root.rglob("*.py")):
                if not set(_NOT) & set(source.relative_to(root).parts) and (text := _text(source)):
                    file.write(json.dumps({"text": text}) + "\n")
        partial.replace(path)
    return path


def _text(path: Path) -> str | None:
    """None of the few tests that are in another encoding on purpose."""
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError:
        return None

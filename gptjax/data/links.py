"""Local folders with symbolic links in them: followed, without loops and without reading a file twice."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any

from fsspec.implementations.local import LocalFileSystem


class FollowingLinks(LocalFileSystem):
    """Local files, where find() and glob() take a link for what it points to: fsspec's own leave links out."""

    def find(self, path, maxdepth=None, withdirs=False, detail=False, **kwargs):
        """As fsspec's, with the types 'broken' (a link to nothing) and 'loop' (to a folder above, not followed), and
        in each info whether a link led there ('linked') and the file's 'identity', whatever its name."""
        path = self._strip_protocol(path)
        out: dict[str, dict] = {}
        if os.path.isdir(path):
            if withdirs:
                out[path] = self._described(path, os.stat(path), "directory", False)
            above, parent = set(), os.path.realpath(path)
            while parent != (parent := os.path.dirname(parent)):
                with suppress(OSError):
                    above.add(_identity(os.stat(parent)))
            self._walk(path, maxdepth, withdirs, False, above, out)
        elif os.path.isfile(path):
            out[path] = self._described(path, os.stat(path), "file", False)
        return dict(sorted(out.items())) if detail else sorted(out)

    def _walk(self, folder, depth, withdirs, linked, above, out):
        above = above | {_identity(os.stat(folder))}
        with os.scandir(folder) as entries:
            for entry in entries:
                path = f"{folder.rstrip('/')}/{entry.name}"
                link = linked or entry.is_symlink()
                try:
                    stat = os.stat(path)
                except OSError:
                    if entry.is_symlink():
                        out[path] = {"name": path, "size": 0, "type": "broken"}
                    continue  # else removed meanwhile
                if not entry.is_dir():
                    out[path] = self._described(path, stat, "file" if entry.is_file() else "other", link)
                elif _identity(stat) in above:
                    out[path] = {"name": path, "size": 0, "type": "loop"}
                else:
                    if withdirs:
                        out[path] = self._described(path, stat, "directory", link)
                    if depth is None or depth > 1:
                        self._walk(path, depth and depth - 1, withdirs, link, above, out)

    def _described(self, path, stat, kind, linked):
        return {
            "name": path, "size": stat.st_size, "type": kind, "mtime": stat.st_mtime, "linked": linked,
            "identity": _identity(stat),
        }  # fmt: skip


def _identity(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_dev, stat.st_ino


def once(paths: list[str], found: dict[str, dict]) -> tuple[list[str], list[str]]:
    """(paths without those that only show a file again through a link, those).

    Else a document could be trained on and held out at once. Of several names, one with a suffix stays (the Hub's cache
    keeps data in blobs/ under hashes and links to it under names), and the file's own rather than a link's.
    """
    names: dict[Any, list[str]] = {}
    for path in paths:
        names.setdefault(found[path].get("identity", path), []).append(path)
    repeated = set()
    for same in names.values():
        if len(same) > 1 and any(found[path]["linked"] for path in same):
            same.sort(key=lambda p: ("." not in os.path.basename(p), found[p]["linked"], p))
            repeated.update(same[1:])
    return [path for path in paths if path not in repeated], sorted(repeated)

"""Symbolic links in local folders are followed, without loops and without reading a file twice."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any

from fsspec.implementations.local import LocalFileSystem


class FollowingLinks(LocalFileSystem):
    """Local file system whose find() and glob() follow symbolic links, which fsspec's own ignore."""

    def find(self, path, maxdepth=None, withdirs=False, detail=False, **kwargs):
        """Like fsspec's, with two more types, 'broken' (a link without a target) and 'loop' (a link to a folder above,
        which is not followed), and two more fields: 'linked' (reached through a link) and 'identity' of the file."""
        path = self._strip_protocol(path)
        out: dict[str, dict] = {}
        if os.path.isdir(path):
            if withdirs:
                out[path] = self._info(path, os.stat(path), "directory", False)
            above, parent = set(), os.path.realpath(path)
            while parent != (parent := os.path.dirname(parent)):
                with suppress(OSError):
                    above.add(_identity(os.stat(parent)))
            self._walk(path, maxdepth, withdirs, False, above, out)
        elif os.path.isfile(path):
            out[path] = self._info(path, os.stat(path), "file", False)
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
                    continue  # otherwise it has just been removed
                if not entry.is_dir():
                    out[path] = self._info(path, stat, "file" if entry.is_file() else "other", link)
                elif _identity(stat) in above:
                    out[path] = {"name": path, "size": 0, "type": "loop"}
                else:
                    if withdirs:
                        out[path] = self._info(path, stat, "directory", link)
                    if depth is None or depth > 1:
                        self._walk(path, depth and depth - 1, withdirs, link, above, out)

    def _info(self, path, stat, kind, linked):
        return {
            "name": path, "size": stat.st_size, "type": kind, "mtime": stat.st_mtime, "linked": linked,
            "identity": _identity(stat),
        }  # fmt: skip


def _identity(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_dev, stat.st_ino


def once(paths: list[str], found: dict[str, dict]) -> tuple[list[str], list[str]]:
    """(paths without second names of a file through links, those second names).

    Otherwise a document could be in both splits. Of several names of a file one with a suffix is kept (the cache of the
    Hugging Face Hub stores blobs under hashes and links to them by name), preferably the file's own.
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

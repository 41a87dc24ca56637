"""The files of a queue, on a disk or in an object store: each is whole or not there, and is created by one process.

That a file can be created only once, by whoever comes first, is all that the queue needs of the storage: on a disk it
is a hard link to a complete file (which NFS has too), in a bucket a write on the condition that there is no such object
(gs://: ifGenerationMatch=0; s3://: If-None-Match).
"""

import os
import uuid

import fsspec

from gptjax import paths
from gptjax.errors import InputError


class Folder:
    """A folder of small files: `create` and `write` are atomic. path: local, or a URL whose fsspec driver is there."""

    def __init__(self, path):
        self.path = os.fspath(paths.expand(os.fspath(path)))
        self.remote = paths.is_remote(self.path)
        if self.remote:
            try:
                # no cache: `exists` would answer from a listing that is older than another worker's claim
                self._fs, self._root = fsspec.core.url_to_fs(self.path, use_listings_cache=False)
            except (ImportError, ValueError) as error:
                raise InputError(
                    f"{self.path} cannot be opened ({error}): install its driver (`pip install gcsfs` for gs://)."
                ) from error

    def _at(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}" if self.remote else os.path.join(self.path, name)

    def create(self, name: str, data: bytes) -> bool:
        """Whether this call created the file; False if it exists. Of any number of calls one returns True, if no two
        have the same data."""
        try:
            if self.remote:
                self._fs.pipe_file(self._at(name), data, mode="create")
            else:
                self._linked(name, data)
            return True
        except FileExistsError:
            # ours all the same if the storage did it, its answer was lost and a library asked again
            return self.read(name) == data

    def _linked(self, name: str, data: bytes):
        temporary = self._temporary(name, data)
        try:
            os.link(temporary, self._at(name))
        except FileExistsError:
            raise
        except OSError as error:
            raise InputError(
                f"The storage of {self.path} has no hard links ({error.strerror}), which workers need to share "
                "a queue: give a --workdir on another disk, or gs://..."
            ) from error
        finally:
            os.unlink(temporary)

    def _temporary(self, name: str, data: bytes) -> str:
        path = self._at(name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        temporary = os.path.join(os.path.dirname(path), f".{os.path.basename(name)}.{uuid.uuid4().hex}.tmp")
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return temporary

    def write(self, name: str, data: bytes):
        """Creates or replaces the file."""
        if self.remote:
            self._fs.pipe_file(self._at(name), data)
        else:
            os.replace(self._temporary(name, data), self._at(name))

    def read(self, name: str) -> bytes | None:
        """None if there is no such file."""
        try:
            if self.remote:
                return self._fs.cat_file(self._at(name))
            with open(self._at(name), "rb") as file:
                return file.read()
        except FileNotFoundError:
            return None

    def tail(self, name: str, size: int) -> bytes:
        """The last `size` bytes of a file that may be written to; b'' if there is no such file."""
        try:
            if self.remote:
                return self._fs.tail(self._at(name), size)
            with open(self._at(name), "rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - size))
                return file.read()
        except FileNotFoundError:
            return b""

    def exists(self, name: str) -> bool:
        return self._fs.exists(self._at(name)) if self.remote else os.path.exists(self._at(name))

    def names(self, folder: str) -> list[str]:
        """The files of a folder, sorted; [] if there is no such folder."""
        try:
            if self.remote:
                found = [path.rpartition("/")[2] for path in self._fs.ls(self._at(folder), detail=False)]
            else:
                found = os.listdir(self._at(folder))
        except FileNotFoundError:
            return []
        return sorted(name for name in found if name and not name.startswith("."))

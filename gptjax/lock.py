"""One start at a time in a workdir: a second one would replace the metrics and checkpoints of the first.

The lock is the operating system's (flock) on workdir/lock, so it ends with the process that has it, however that ends;
what is written in the file only says who it is. Of many hosts the first one has it for the job. Not locked are gs://
workdirs and storage without flock (some NFS mounts): there it is for whoever starts the job to start it once.
"""

import contextlib
import errno
import json
import os
import socket
import time

from gptjax import paths
from gptjax.distributed import hosts
from gptjax.errors import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)


@contextlib.contextmanager
def held(workdir):
    """The workdir is this process's to write in; yields its local path. Makes it, and removes it if it is left empty.

    Raises InputError if another process has it, or if it is no folder that can be written in.
    """
    workdir = paths.local(workdir)
    paths.check_workdir(workdir)
    taken = []

    def take() -> str | None:
        try:
            taken.append(_take(workdir))
        except InputError as error:
            return str(error)

    refused = None if paths.is_remote(workdir) else hosts.from_first(take)
    if refused:
        raise InputError(refused)
    try:
        yield workdir
    finally:
        for release in taken:
            release()


def _take(workdir):
    """Locks it; returns what releases it."""
    path, new, locks = os.path.join(workdir, "lock"), not os.path.exists(workdir), True
    try:
        os.makedirs(workdir, exist_ok=True)
        while True:
            file = open(path, "a+")
            try:
                if fcntl is None:
                    raise OSError(errno.ENOSYS, "no flock")
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(
                    f"{workdir} is in use by {_owner(file)}: wait for it, stop it, or give another --workdir."
                ) from None
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                locks = False
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                    break
            file.close()  # its owner has just ended and removed it
        if not locks:
            print(f"note: the storage of {workdir} has no locks: make sure that nothing else is training in it")
        elif os.fstat(file.fileno()).st_size:
            print(f"note: {workdir} was in use by {_owner(file)}, which was killed: its lock is released")
        file.truncate(0)
        file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%F %T %z")}))
        file.flush()
    except OSError as error:
        what = "is not a folder" if os.path.isfile(workdir) else f"cannot be written in ({error.strerror or error})"
        raise InputError(f"{workdir} {what}: give another --workdir, or make it writable.") from error

    def release():
        with contextlib.suppress(OSError):
            os.unlink(path)
        file.close()
        if new:
            with contextlib.suppress(OSError):  # it has something in it
                os.rmdir(workdir)

    return release


def _owner(file) -> str:
    file.seek(0)
    try:
        about = json.loads(file.read())
        return f"process {about['pid']} on {about['host']} since {about['since']}"
    except (ValueError, KeyError, TypeError):
        return "another process"

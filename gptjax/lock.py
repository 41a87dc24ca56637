"""A lock on the workdir: a second run in it would overwrite the metrics and checkpoints of the first.

The lock is an flock of the operating system on workdir/lock, so it is released when its process ends, for whatever
reason; the file's contents only identify the owner. In a multi-host job process 0 holds it. Workdirs on gs:// and on
storage without flock (some NFS mounts) are not locked: there the user must make sure to start the job only once.
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
    """Context manager that locks the workdir for this process and yields its local path. Creates it, and removes it if
    it is left empty.

    Raises InputError if another process holds the lock, or if the workdir is not a writable folder.
    """
    workdir = paths.local(workdir)
    paths.check_workdir(workdir)
    releases = []

    def acquire() -> str | None:
        try:
            releases.append(_acquire(workdir))
        except InputError as error:
            return str(error)

    error = None if paths.is_remote(workdir) else hosts.from_first(acquire)
    if error:
        raise InputError(error)
    try:
        yield workdir
    finally:
        for release in releases:
            release()


def _acquire(workdir):
    """Locks the workdir; returns the function that releases the lock."""
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
            file.close()  # the owner has just ended and removed the file
        if not locks:
            print(f"note: The storage of {workdir} has no locks: make sure that no other run is using it.")
        elif os.fstat(file.fileno()).st_size:
            print(f"note: {workdir} was in use by {_owner(file)}, which was killed: its lock has been released.")
        file.truncate(0)
        file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%F %T %z")}))
        file.flush()
    except OSError as error:
        what = "is not a folder" if os.path.isfile(workdir) else f"is not writable ({error.strerror or error})"
        raise InputError(f"{workdir} {what}: give another --workdir, or make it writable.") from error

    def release():
        with contextlib.suppress(OSError):
            os.unlink(path)
        file.close()
        if new:
            with contextlib.suppress(OSError):  # not empty
                os.rmdir(workdir)

    return release


def _owner(file) -> str:
    file.seek(0)
    try:
        about = json.loads(file.read())
        return f"process {about['pid']} on {about['host']} since {about['since']}"
    except (ValueError, KeyError, TypeError):
        return "another process"

"""The other side of a benchmark: a process in an environment of its own that works only when asked."""

import json
import subprocess


class Peer:
    """Starts `python script` and waits until it is ready; it sleeps until iterate() asks for one iteration.

    The script prints {"ready": true}, then one JSON line for every line "go" that it reads, and ends with its
    stdin. Its stderr goes to this process's, or to `stderr` (a file, or subprocess.DEVNULL).
    """

    def __init__(self, python, script, stderr=None):
        self._process = subprocess.Popen(
            [python, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True
        )
        self._read()

    def _read(self):
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the peer died with status {self._process.wait()}: see its messages")
        return json.loads(line)

    def iterate(self):
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return self._read()

    def close(self):
        self._process.stdin.close()
        status = self._process.wait()
        self._process.stdout.close()
        if status:
            raise RuntimeError(f"the peer ended with status {status}: see its messages")

"""A worker process of a curation, which the command starts: python -c '...; main()' WORKDIR LEASE."""

import sys

from gptjax.curation.engine import work
from gptjax.curation.plan import opened
from gptjax.errors import INTERRUPTED

COMMAND = [sys.executable, "-c", "from gptjax.curation.worker import main; main()"]


def main():
    try:
        work(opened(sys.argv[1]), lease=float(sys.argv[2]))
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)

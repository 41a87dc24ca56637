"""The one exception for bad input that the user can fix.

Every message names the cause and the fix. The command-line mains print it without a traceback and
exit with code 2; library callers catch it as a ValueError.
"""


INTERRUPTED = 130  # exit code of a command that Ctrl-C ended: 128 + SIGINT


class InputError(ValueError):
    """Bad input: a config, a file, a checkpoint or a prompt that the user can change."""

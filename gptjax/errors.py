"""The one exception for user-correctable input errors.

The command-line mains print its message without a traceback and exit with code 2; library callers can catch it as a
ValueError. Messages, warnings and notes follow one form: full sentences, with a capital letter and a period and without
contractions, that name the cause and the fix. A message may begin with the place that it is about, as `rows.jsonl:3: `
or `--prompt='q': `; what follows is again a full sentence. A key, path or value at the beginning keeps its own case.
"""

INTERRUPTED = 130  # exit code of a command that Ctrl-C ended: 128 + SIGINT


class InputError(ValueError):
    """User-correctable input: a config, file, checkpoint or prompt that the user can change."""

"""The commands there are.

    python -m gptjax            # lists them
    python -m gptjax --version

Nothing but their source is read, so that it takes no time.
"""

import sys

import gptjax
from gptjax import usage

HELP, VERSION = ("-h", "--help", "-help"), ("--version", "-version", "-V")


def overview(columns: int) -> str:
    """The package and its commands in a line each."""
    commands = usage.commands()
    how = "python -m COMMAND --help lists the options of a command, and of a stage every config key and preset."
    parts = [usage.wrapped(gptjax.__doc__, columns), usage.wrapped(how, columns)]
    for title, stage in (("training stages", True), ("tools", False)):
        rows = [(command.name, command.about) for command in commands if command.stage == stage]
        parts.append(f"{title}:\n{usage.table(rows, columns)}")
    return "\n\n".join(parts)


def main(arguments: list[str]) -> int:
    """The exit code."""
    if arguments and arguments[0] in VERSION:
        print(f"gptjax {gptjax.__version__}")
    elif arguments and arguments[0] not in HELP:
        name = arguments[0].removeprefix("gptjax.")
        known = f"gptjax.{name}" in [command.name for command in usage.commands()]
        hint = f"run python -m gptjax.{name}" if known else "python -m gptjax lists the commands"
        print(f"error: Unexpected argument {arguments[0]!r}: {hint}.", file=sys.stderr)
        return 2
    else:
        print(overview(usage.width()))
    return 0


if __name__ == "__main__":
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough
        from gptjax import console

        code = console.reader_is_gone()
    sys.exit(code)

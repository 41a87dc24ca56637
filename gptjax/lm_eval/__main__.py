"""EleutherAI's lm-evaluation-harness on a workdir: its own command, with gptjax as the model.

    python -m gptjax.lm_eval --model_args=workdir=runs/x --tasks=hellaswag,lambada_openai --num_fewshot=5
    python -m gptjax.lm_eval --model_args=workdir=runs/x,step=best,dtype=float32 --tasks=mine --include_path=DIR

Every flag is the harness's (pip install 'gptjax[eval]'), --help too, and so are its tasks, which it downloads.
--model_args: workdir; step, a checkpoint's or 'best'; dtype, float32 or bfloat16, in place of the run's own.
--batch_size is how many packed rows are scored, or prompts continued, at a time. Tasks that come with gptjax:
python -m gptjax.evaluate --tasks.
"""

import sys

from gptjax import console, usage
from gptjax.errors import INTERRUPTED, InputError

_SUBCOMMANDS = ("run", "ls", "validate")
_HELP = ("-h", "--help")


def harness_arguments(given: list[str]) -> list[str]:
    """The command line of the harness: with its subcommand, our model, and a batch size that the adapter chooses."""
    subcommand, options = ("run", given) if not given or given[0] not in _SUBCOMMANDS else (given[0], given[1:])
    names = {option.partition("=")[0] for option in options}
    ours = []
    if subcommand == "run":
        ours += [] if names & {"--model", "-M"} else ["--model", "gptjax"]
        ours += [] if names & {"--batch_size", "-b"} else ["--batch_size", "auto"]
    return [subcommand, *ours, *options]


def main(given: list[str]) -> int:
    """The exit code."""
    try:
        if set(given[:2]) & set(_HELP) or not given:
            print(usage.paragraphs(__doc__, usage.width()), end="\n\n", flush=True)
        from gptjax.lm_eval import adapter  # registers the model

        sys.argv = ["lm-eval", *(harness_arguments(given) if given else ["run", "--help"])]
        adapter.cli_evaluate()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    console.escape_unprintable()
    sys.exit(main(sys.argv[1:]))

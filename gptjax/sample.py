"""Text from a trained model.

    python -m gptjax.sample --workdir=runs/x --prompt="Once upon" --max_new_tokens=64 --temperature=0.8 \
        --top_p=0.95 --seed=0

--temperature=0 is greedy. --prompt may be given several times: the prompts are decoded as one batch. A model from SFT
or PPO answers the prompt, in the template it was tuned with; with --raw it continues the text instead. --speed prints
tokens per second and the upper bound that memory bandwidth sets.
"""

import sys
import time

import jax
from absl import flags

from gptjax import command_line
from gptjax.data.chat import Template
from gptjax.errors import InputError
from gptjax.generation.decode import Stop, generate
from gptjax.generation.sampling import Sampling
from gptjax.generation.speed import describe_speed
from gptjax.trained import Model, load_model
from gptjax.training.precision import frozen


def continue_texts(
    model: Model, prompts: list[str], *, max_new_tokens: int, sampling: Sampling, seed: int, raw: bool = False,
    speed: bool = False,
) -> list[str]:  # fmt: skip
    """New text for each prompt, up to end-of-text or another id that ends a text (`stop_ids`).

    An empty prompt starts from end-of-text, as GPT-2 is sampled unconditionally, or from the tokenizer's own
    beginning-of-text. A model with a template answers in it unless raw. speed: decode a second time, without compiling,
    and print the speed on stderr. InputError: a prompt that cannot be encoded or that fills the context.
    """
    tokenizer, context = model.tokenizer, model.config.context_length
    template = Template(tokenizer, model.template) if model.template and not raw else None
    ids = []
    for i, prompt in enumerate(prompts):
        try:
            tokens = template.prompt(prompt) if template else tokenizer.encode(prompt)
        except InputError as error:
            raise InputError(f"--prompt={_shortened(prompt)!r}: {error}") from None
        if not tokens and tokenizer.bos_id is None:
            raise InputError("This tokenizer has no end-of-text to start from: give a --prompt that is not empty.")
        if not tokens or (tokenizer.specials.adds_bos and not template):
            tokens = [tokenizer.bos_id, *tokens]
        if len(tokens) > context:
            raise InputError(
                f"Prompt {i} has {len(tokens)} tokens and the model's context is {context}, which leaves no room for "
                "new ones: shorten it."
            )
        if tokenizer.unk_id is not None and tokenizer.unk_id in tokens:
            unknown = f"{tokens.count(tokenizer.unk_id)} of its {len(tokens)} tokens are the unknown one"
            print(f"note: --prompt={_shortened(prompt)!r} has characters that the vocabulary lacks: {unknown}",
                  file=sys.stderr)  # fmt: skip
        ids.append(tokens)
    room = context + 1 - max(map(len, ids), default=0)
    if room < max_new_tokens:
        print(f"note: the context of {context} leaves room for {room:,} of {max_new_tokens:,} new tokens after the "
              "longest prompt", file=sys.stderr)  # fmt: skip
    with jax.set_mesh(model.mesh):
        params = frozen(model.params, model.dtype)  # half the bytes to read at 16 bits

        stop = Stop(max_new_tokens, tokenizer.stop_ids)
        out = generate(params, model.decoder, ids, stop, sampling, seed=seed)
        if speed:
            began = time.perf_counter()
            out = generate(params, model.decoder, ids, stop, sampling, seed=seed)
            seconds, steps = time.perf_counter() - began, max(map(len, out))
            slots = sum(map(len, ids)) / len(ids) + steps / 2
            print(
                describe_speed(params, model.config, len(ids), slots, model.dtype, sum(map(len, out)), seconds,
                               model.mesh.devices.flat), file=sys.stderr,
            )  # fmt: skip
    return [(template or tokenizer).decode(tokens) for tokens in out]


def _shortened(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


def main(_):
    model = load_model(FLAGS.workdir, step=FLAGS.step)
    sampling = Sampling(FLAGS.temperature, FLAGS.top_k, FLAGS.top_p)
    prompts = [p for p in FLAGS.prompt for _ in range(FLAGS.n)]
    texts = continue_texts(
        model, prompts, max_new_tokens=FLAGS.max_new_tokens, sampling=sampling, seed=FLAGS.seed, raw=FLAGS.raw,
        speed=FLAGS.speed,
    )  # fmt: skip
    for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        if len(prompts) > 1:
            print(f"--- {i} ---")
        print(text if model.template and not FLAGS.raw else prompt + text)


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    command_line.define_path("workdir", None, "A training run's workdir.")
    flags.DEFINE_multi_string("prompt", [""], "Text to continue; may be repeated.")
    flags.DEFINE_integer("n", 1, "Samples per prompt.", lower_bound=1)
    flags.DEFINE_integer("max_new_tokens", 128, "Maximum number of new tokens.", lower_bound=1)
    flags.DEFINE_float("temperature", 1.0, "Divides the logits; 0 is greedy.")
    flags.DEFINE_integer("top_k", 0, "Keep the k likeliest tokens; 0 keeps all.")
    flags.DEFINE_float("top_p", 1.0, "Keep the likeliest tokens of this mass.")
    flags.DEFINE_integer("seed", 0, "The same seed gives the same text.", lower_bound=0)
    flags.DEFINE_bool("raw", False, "Continue the prompt as text, without the template of a tuned model.")
    flags.DEFINE_bool("speed", False, "Print tokens per second, and the bound that memory bandwidth sets.")
    command_line.define_step()
    flags.mark_flag_as_required("workdir")
    command_line.run(main)

"""Samples of the model during training, written to samples.jsonl and printed."""

import dataclasses

from gptjax import command_line
from gptjax.data.chat import Template
from gptjax.data.demonstrations import Demonstrations
from gptjax.data.tokenizer import Tokenizer
from gptjax.distributed import hosts
from gptjax.errors import InputError
from gptjax.generation.decode import Decoder, Stop, generate
from gptjax.generation.respond import respond
from gptjax.generation.sampling import Sampling
from gptjax.ranges import Count, PositiveShare
from gptjax.training.stage import Evaluation


@dataclasses.dataclass(frozen=True)
class SamplesConfig:
    """Texts written to samples.jsonl before the first step and after the last.

    prompts: texts to continue.
    max_new_tokens: maximum tokens of a continuation.
    temperature: divides the logits; 0 = greedy.
    top_p: sample from the most likely tokens of this probability mass.
    """

    prompts: tuple[str, ...] = ()
    max_new_tokens: Count = 128
    temperature: float = 0.8
    top_p: PositiveShare = 0.95


def sample_prompts(prompts, tokenizer: Tokenizer, context_length: int) -> dict[str, list[int]]:
    """{prompt: its token ids} of samples.prompts.

    A prompt that cannot be used (characters that the tokenizer lacks, longer than the context) is skipped with a
    warning if it comes from the config file, which is written without knowing the data. Raises InputError if it was
    given on the command line or in code.
    """
    encoded = {}
    for prompt in prompts:
        ids, problem = [], None
        try:
            ids = tokenizer.encode(prompt)
        except InputError as error:
            problem = str(error)
        if problem is None and not 0 < len(ids) <= context_length:
            problem = f"it has {len(ids)} tokens and must have 1 to {context_length} (the context)"
        if problem is None:
            encoded[prompt] = ids
        elif command_line.overridden("samples.prompts"):
            raise InputError(f"samples.prompts {prompt!r}: {problem}. Change --config.samples.prompts.")
        else:
            hosts.say(
                f"warning: no sample of the config file's prompt {prompt!r} is written: {problem}. Give another with "
                "--config.samples.prompts."
            )
    return encoded


def continuations(c: SamplesConfig, prompts: dict[str, list[int]], decoder: Decoder, tokenizer: Tokenizer, seed: int):
    """Returns evaluate(state) -> Evaluation: a continuation of each prompt, with the same noise each time. prompts:
    {text: ids}."""
    stop, sampling = Stop(c.max_new_tokens, tokenizer.eot_id), Sampling(c.temperature, top_p=c.top_p)

    def evaluate(state) -> Evaluation:
        if not prompts:
            return Evaluation({})
        out = generate(state.params, decoder, list(prompts.values()), stop, sampling, seed=seed)
        rows = [{"prompt": p, "text": tokenizer.decode(ids)} for p, ids in zip(prompts, out, strict=True)]
        for row in rows:
            hosts.say(f"--- sample at step {int(state.step)} ---\n{row['prompt']}{row['text']}\n")
        return Evaluation({}, rows)

    return evaluate


# --- responses of a fine-tuned model --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ResponseConfig:
    """Responses to validation prompts, written to samples.jsonl before the first step and after the last; they are also
    what selection='reward' scores.

    count: how many are written; four times as many are scored.
    max_new_tokens: maximum tokens of a response.
    temperature: divides the logits; 0 = greedy.
    """

    count: int = 8
    max_new_tokens: Count = 64
    temperature: float = 0.7


def scored_prompts(c: ResponseConfig, demonstrations: Demonstrations) -> list:
    """The validation prompts (ids) whose sampled responses selection='reward' scores."""
    return [d.ids[: d.prompt] for d in demonstrations.validation if d.prompt][: 4 * c.count]


def scored_responses(reward_model, c: ResponseConfig, demonstrations: Demonstrations, decoder: Decoder,
                     template: Template, seed: int):  # fmt: skip
    """Returns evaluate(state) -> Evaluation: 'reward', the reward model's mean score of sampled responses, by which the
    best checkpoint is selected. reward_model: with score(prompts, responses) -> [number of responses]."""
    prompts = scored_prompts(c, demonstrations)

    def evaluate(state) -> Evaluation:
        sampled = respond(
            state.params, decoder, template, prompts, max_new_tokens=c.max_new_tokens, temperature=c.temperature,
            seed=seed,
        )  # fmt: skip
        reward = float(reward_model.score(prompts, sampled).mean())
        return Evaluation({"reward": reward, "selection": -reward})

    return evaluate


def responses(c: ResponseConfig, demonstrations: Demonstrations, decoder: Decoder, template: Template, seed: int):
    """Returns evaluate(state) -> Evaluation: responses to the first validation prompts, with the demonstrations."""
    shown = [d for d in demonstrations.validation if d.prompt][: c.count]

    def evaluate(state) -> Evaluation:
        prompts = [d.ids[: d.prompt] for d in shown]
        sampled = respond(
            state.params, decoder, template, prompts, max_new_tokens=c.max_new_tokens, temperature=c.temperature,
            seed=seed,
        )  # fmt: skip
        rows = [
            {"prompt": template.decode(d.ids[: d.prompt]), "text": template.decode(response),
             "demonstration": template.decode(d.ids[d.prompt :])}
            for d, response in zip(shown, sampled, strict=True)
        ]  # fmt: skip
        for row in rows:
            hosts.say(f"--- sample at step {int(state.step)} ---\n{row['prompt']}\n=> {row['text']}")
        return Evaluation({}, rows)

    return evaluate

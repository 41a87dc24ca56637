"""The model class that lm-evaluation-harness calls: requests as text in, log-likelihoods and generated text out."""

import copy
import dataclasses
import functools
import logging
import re

from gptjax import paths
from gptjax.console import progress
from gptjax.data.chat import ROLES, Template
from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import InputError
from gptjax.generation.sampling import Sampling
from gptjax.interop.hf_tokenizer import CHAT_TEMPLATE
from gptjax.tasks.generate import Continuation, continue_texts, prompt_ids, sampling_keys, with_frozen_params
from gptjax.tasks.likelihood import log_likelihoods
from gptjax.tasks.requests import encode_pair, prefix_token, rolling_windows
from gptjax.trained import load_model
from gptjax.training.precision import DTYPES

try:
    import lm_eval.models  # noqa: F401  first: in a registry that has ours alone, its own models would not be found
    from lm_eval.__main__ import cli_evaluate  # noqa: F401  for __main__.py
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
except ModuleNotFoundError as error:
    raise InputError(
        f"lm-evaluation-harness is not installed ({error}): install it with pip install 'gptjax[eval]'."
    ) from None

_ROWS = 16
_MAX_GEN_TOKENS = 256  # of the harness, where a task gives none
_NEUTRAL = {"num_beams": 1, "repetition_penalty": 1.0, "use_cache": True}  # what decoding does anyway

log = logging.getLogger(__name__)


@register_model("gptjax")
class GPTJAX(LM):
    """A workdir's model.

    workdir, step: as trained.load_model. dtype: a key of precision.DTYPES; None = the run's own. batch_size: packed
    rows scored, or prompts continued, at a time; None or 'auto' = 16. seed: of sampled text. max_batch_size and device
    are the harness's and change nothing: JAX decides where things run.
    """

    def __init__(self, workdir, step: int | str | None = None, dtype: str | None = None, seed: int = 0,
                 batch_size: int | str | None = None, max_batch_size: int | None = None,
                 device: str | None = None):  # fmt: skip
        super().__init__()
        if dtype is not None and dtype not in DTYPES:
            raise InputError(f"model_args: dtype={dtype!r}: choose {' or '.join(DTYPES)}.")
        self.model = load_model(paths.expand(str(workdir)), step=step)
        if dtype is not None:
            self.model = dataclasses.replace(self.model, dtype=DTYPES[dtype])
        automatic = batch_size is None or str(batch_size).startswith("auto")
        self.batch_size = _ROWS if automatic else int(batch_size)
        self._template = Template(self.model.tokenizer, "chat") if self.model.template == "chat" else None
        self._seed = seed

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log p(continuation | context), whether greedy decoding gives it) of each request's two texts."""
        pairs = [encode_pair(self._tokenizer(r.args[0]), *r.args) for r in requests]
        scores = log_likelihoods(self.model, pairs, rows=self.batch_size)
        for what in ("truncated", "spanned"):
            if n := sum(getattr(score, what) for score in scores):
                log.warning("%d of %d requests were %s (see gptjax/tasks/requests.py)", n, len(scores), what)
        return [(score.log_prob, score.greedy) for score in scores]

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """log p of each request's text, every token scored once."""
        prefix, context = prefix_token(self.model.tokenizer), self.model.config.context_length
        windows, owners = [], []
        for i, request in enumerate(requests):
            for window in rolling_windows(prefix, self.model.tokenizer.encode(request.args[0]), context):
                windows.append(window)
                owners.append(i)
        totals = [0.0] * len(requests)
        scores = log_likelihoods(self.model, windows, rows=self.batch_size) if windows else []
        for owner, score in zip(owners, scores, strict=True):
            totals[owner] += score.log_prob
        return totals

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """The text that follows each request's context, before its first stop string or end-of-text. What is sampled is
        a function of the seed and the request's place among all of them."""
        alike: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            alike.setdefault(repr(request.args[1]), []).append(i)
        texts = [""] * len(requests)
        with progress(total=len(requests), desc="generating", unit="text", disable=disable_tqdm) as bar:
            for members in alike.values():
                generation = Generation.of(requests[members[0]].args[1], self.model.config.context_length)
                prompts = {i: self._prompt(requests[i].args[0], generation.room) for i in members}
                order = sorted(members, key=lambda i: -len(prompts[i]))
                for start in range(0, len(order), self.batch_size):
                    some = order[start : start + self.batch_size]
                    keys = sampling_keys(self._seed, 0, some)
                    written = continue_texts(self._writer, [prompts[i] for i in some], keys, generation.continuation)
                    for i, text in zip(some, written, strict=True):
                        texts[i] = text
                        self.cache_hook.add_partial("generate_until", requests[i].args, text)
                    bar.update(len(some))
        return texts

    # --- chat templates -----------------------------------------------------------------------------------

    def apply_chat_template(self, chat_history: list[dict], add_generation_prompt: bool = True) -> str:
        """A conversation as one text, whose role tokens `_tokenizer` reads as such. InputError: the model has no chat
        template, or a message has a role token in its text."""
        template = self._needs_template()
        names = template_tokens(self.model.tokenizer)
        text = ""
        for i, message in enumerate(chat_history):
            if found := [name for name in names if name in message["content"]]:
                raise InputError(f"A message of the conversation has {found[0]} in its text: remove that.")
            text += ROLES[message["role"]] + message["content"]
            last = i == len(chat_history) - 1
            if message["role"] == "assistant" and (add_generation_prompt or not last):
                text += self.model.tokenizer.token(template.eos_id)
        return text + (ROLES["assistant"] if add_generation_prompt else "")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template in Jinja, for the harness's records."""
        self._needs_template()
        return CHAT_TEMPLATE

    @property
    def tokenizer_name(self) -> str:
        return f"gptjax-{self.model.tokenizer.fingerprint[:16]}"

    def _needs_template(self) -> Template:
        if self._template is None:
            raise InputError(
                "The model has no chat template, so it continues plain text: leave out --apply_chat_template, or give "
                "the workdir of a model from SFT."
            )
        return self._template

    def _tokenizer(self, context: str):
        """What encodes a context and what follows it."""
        if self._template is not None and context.startswith(tuple(ROLES.values())):
            return Rendered(self.model.tokenizer)
        return self.model.tokenizer

    # --- generation ---------------------------------------------------------------------------------------

    def _prompt(self, context: str, room: int) -> list[int]:
        return prompt_ids(self._tokenizer(context), context)[-room:]

    @functools.cached_property
    def _writer(self):
        return with_frozen_params(self.model)


@dataclasses.dataclass(frozen=True)
class Generation:
    """A request's generation settings. room: tokens of a prompt; longer ones lose their first tokens."""

    continuation: Continuation
    room: int

    @classmethod
    def of(cls, gen_kwargs: dict, context_length: int) -> "Generation":
        """From the harness's gen_kwargs. More new tokens than the context has room for are clipped to half of it, so
        that models of a short context can be asked too. InputError: a setting that decoding here does not have."""
        given = normalize_gen_kwargs(copy.deepcopy(gen_kwargs), _MAX_GEN_TOKENS)
        new = given.pop("max_gen_toks")
        until = tuple(stop for stop in given.pop("until") if stop)
        temperature = given.pop("temperature", None)
        sampling = Sampling(0.0)
        top_k, top_p = given.pop("top_k", None), given.pop("top_p", None)
        if given.pop("do_sample"):
            # As transformers, which samples at 1 where nothing else is said.
            temperature = 1.0 if temperature is None else float(temperature)
            sampling = Sampling(temperature, int(top_k or 0), 1.0 if top_p is None else float(top_p))
        if other := [key for key, value in given.items() if value is not None and value != _NEUTRAL.get(key)]:
            raise InputError(
                f"generation_kwargs: {other[0]}={given[other[0]]!r} is not supported: the settings are until, "
                "max_gen_toks, do_sample, temperature, top_k and top_p."
            )
        if new < 1:
            raise InputError(f"generation_kwargs: max_gen_toks={new}: give at least 1.")
        if new >= context_length:
            clipped = max(1, context_length // 2)
            log.warning("max_gen_toks=%d leaves no room for a prompt in a context of %d: it is %d here", new,
                        context_length, clipped)  # fmt: skip
            new = clipped
        return cls(Continuation(until, new, sampling), max(1, context_length - new))


class Rendered:
    """A tokenizer of rendered conversations: role tokens and end-of-text in a text are encoded as such."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer, self._names = tokenizer, template_tokens(tokenizer)
        self._split = re.compile(f"({'|'.join(map(re.escape, self._names))})")
        self.bos_id, self.specials = tokenizer.bos_id, dataclasses.replace(tokenizer.specials, adds_bos=False)

    def encode(self, text: str) -> list[int]:
        ids = []
        for part in filter(None, self._split.split(text)):
            ids += [self._tokenizer.special_id(part)] if part in self._names else self._tokenizer.encode(part)
        return ids


def template_tokens(tokenizer: Tokenizer) -> tuple[str, ...]:
    """The special tokens of a rendered conversation, as text."""
    return (*ROLES.values(), tokenizer.token(tokenizer.eot_id))


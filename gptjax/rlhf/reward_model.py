"""The reward model: its score, its loss, and a trained one loaded for best-of-n, PPO and SFT's checkpoint selection.

The workdir's reward.json holds the gain and bias that reward.py fitted after training (InstructGPT: demonstrations
score 0 on average), because comparisons leave the offset of the scores undetermined. They are folded into the head.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from gptjax import config as configs
from gptjax import paths, run_config
from gptjax.console import progress
from gptjax.data.tokenizer import Tokenizer
from gptjax.distributed import hosts
from gptjax.errors import InputError
from gptjax.generation.decode import bucket
from gptjax.model import gpt, heads
from gptjax.model.attention import resolve
from gptjax.model.spec import GPTConfig
from gptjax.objectives.base import Sums
from gptjax.objectives.preference import best_of_k_loss, ranking_loss, ranking_statistics
from gptjax.parallel.mesh import batch_shards
from gptjax.parallel.sharding import parameter_shardings, shared
from gptjax.trained import load_params
from gptjax.training.precision import DTYPES

CRITERIA = {"pairs": ranking_loss, "best": best_of_k_loss}  # what RewardConfig.objective may be


@dataclasses.dataclass(frozen=True)
class RewardModel:
    """params: {'trunk', 'head'}, normalized. template: name of the template that its training texts were made with."""

    config: GPTConfig
    params: dict
    tokenizer: Tokenizer
    template: str
    dtype: type
    mesh: jax.sharding.Mesh
    step: int = 0
    weights: str = ""  # digest of the checkpoint's parameters, with the gain and bias

    def check_length(self, longest: int, fix: str):
        """Raises InputError where a text (prompt and response) of `longest` tokens exceeds the context. fix: the end
        of its message."""
        if longest > self.config.context_length:
            raise InputError(
                f"A text of {longest} tokens is longer than the reward model's context of "
                f"{self.config.context_length}. {fix}"
            )

    def score(self, prompts, responses, rows: int = 64) -> np.ndarray:
        """The score of each response (ids, end-of-text last) to its prompt (ids): float32 [number of responses].

        Texts of similar length are scored together, so that few shapes are compiled and there is little padding.
        Raises InputError for a text longer than the context. rows: texts of one forward pass.
        """
        texts = [np.concatenate([np.asarray(p, np.int32), np.asarray(r, np.int32)])
                 for p, r in zip(prompts, responses, strict=True)]  # fmt: skip
        self.check_length(max(map(len, texts), default=0), "Shorten the texts.")
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        rows = -(-rows // batch_shards(self.mesh.shape)) * batch_shards(self.mesh.shape)
        out = np.zeros(len(texts), np.float32)
        with jax.set_mesh(self.mesh):
            for first in progress(range(0, len(order), rows), desc="scoring", unit="batch", leave=False,
                                  disable=len(order) < 20 * rows):  # fmt: skip
                chosen = order[first : first + rows]
                length = bucket(len(texts[chosen[-1]]), self.config.context_length)
                tokens_BT, lengths_B = np.zeros((rows, length), np.int32), np.ones(rows, np.int32)
                for row, i in enumerate(chosen):
                    tokens_BT[row, : len(texts[i])], lengths_B[row] = texts[i], len(texts[i])
                scores_B = score_rows(self.params, tokens_BT, lengths_B, self.config, self.dtype, self.mesh)
                out[chosen] = hosts.whole(scores_B)[: len(chosen)]
        return out


def prompt_room(contexts: Mapping[str, int], new_tokens: int, flag: str) -> int:
    """The most tokens a prompt may have, so that it fits every model's context together with new_tokens of response.

    contexts: {name of the model: its context length}. flag: what sets new_tokens, for the message. Raises InputError
    if no token is left.
    """
    reader = min(contexts, key=contexts.get)
    room = contexts[reader] - new_tokens
    if room < 1:
        raise InputError(
            f"{flag}={new_tokens} leaves no room for a prompt in the {reader}'s context of {contexts[reader]} tokens: "
            "lower it."
        )
    return room


def score_at_end(params, tokens_BT, lengths_B, config: GPTConfig, dtype, mesh=None, dropout_keys=None):
    """The scalar at each row's last real token: float32 [B]. tokens_BT: int, padded on the right; attention is causal,
    so the padding changes nothing."""
    x_BTD = gpt.hidden(params["trunk"], config, tokens_BT, dtype=dtype, mesh=mesh, dropout_keys=dropout_keys)
    last_BD = jnp.take_along_axis(x_BTD, (lengths_B - 1)[:, None, None], axis=1)[:, 0]
    return heads.scalar(params["head"], last_BD)


score_rows = functools.partial(jax.jit, static_argnames=("config", "dtype", "mesh"))(score_at_end)


@shared
def reward_loss(model: GPTConfig, dtype, objective: str, mesh=None):
    """The loss of an Objective, summed over prompts. Micro-batch: tokens [B, N, T]; lengths, ranks, valid [B, N]."""
    criterion = CRITERIA[objective]

    def loss(params, batch, dropout_keys_B) -> Sums:
        B, N, T = batch["tokens"].shape
        keys = None
        if dropout_keys_B is not None:  # each completion's own
            keys = jax.vmap(lambda key: jax.random.split(key, N))(dropout_keys_B).reshape(B * N)
        flat = batch["tokens"].reshape(B * N, T), batch["lengths"].reshape(B * N)
        scores_BN = score_at_end(params, *flat, model, dtype, mesh, keys).reshape(B, N)
        total, count = criterion(scores_BN, batch["ranks"], batch["valid"])
        return Sums(total, count, ranking_statistics(scores_BN, batch["ranks"], batch["valid"]))

    return loss


def load_reward_model(workdir, *, mesh, tokenizer: Tokenizer | None = None) -> RewardModel:
    """Loads a reward model from a workdir of gptjax.reward.

    tokenizer: of the model whose texts are to be scored. Raises InputError if the reward model's tokenizer is another,
    if the workdir holds no reward model, or if its training has not finished.
    """
    workdir = paths.local(workdir)
    run = run_config.read_config(workdir)
    if run["kind"] != "scalar":
        raise InputError(f"{workdir} is a {run.get('stage')} run, not a reward model: train one with gptjax.reward.")
    own = Tokenizer.load(workdir / "tokenizer")
    if tokenizer is not None and own.fingerprint != tokenizer.fingerprint:
        raise InputError(
            f"The reward model in {workdir} has another tokenizer than the policy: train it from the same SFT run."
        )
    path = workdir / "reward.json"
    if not path.exists():
        raise InputError(f"{workdir} has no reward.json: let its training finish, it is normalized at the end.")
    fitted = json.loads(path.read_text())
    config = configs.build(GPTConfig, run["model"], "model")
    config = dataclasses.replace(
        config, attention=resolve(config.attention, mesh.devices.flat[0].platform), remat="none", dropout=0.0
    )
    boxed = heads.abstract_scalar_model(config)
    params, meta = load_params(workdir, run, boxed, parameter_shardings(boxed, mesh), fitted["step"])
    params = {**params, "head": normalized(params["head"], fitted["gain"], fitted["bias"])}
    dtype = DTYPES[run["precision"]["compute"]]
    weights = f"{meta['weights']} x {fitted['gain']} + {fitted['bias']}"
    return RewardModel(config, params, own, run["template"], dtype, mesh, fitted["step"], weights)


def normalized(head, gain: float, bias: float):
    """The head whose scores are gain x (the old scores) + bias."""
    return {"kernel": head["kernel"] * gain, "bias": head["bias"] * gain + bias}

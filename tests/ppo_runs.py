"""What the tests of whole PPO runs share: settings, the planted rule, a refusal."""

import dataclasses

import pytest
from numerics import model_terms, tolerance
from runs import lines

from gptjax.errors import InputError
from gptjax.model.spec import GPTConfig
from gptjax.ppo import ppo

WHOLE = {  # everything an iteration can depend on is at work
    "steps": 4, "ppo__ptx_coefficient": 0.5, "ptx__per_episode": 1.0, "kl__target": 0.05, "kl__horizon": 100.0,
    "kl__coefficient": 0.1, "optimizer__learning_rate": 1e-3,
}  # fmt: skip
LIKED = ("ba", "la")
# How far log-probabilities of up to 10 may lie apart in two programs, and so their ratio from 1.
ROUNDING = 10 * tolerance(model_terms(GPTConfig(300, n_layer=2, n_head=4, d_model=32, context_length=48)))


def share(prompts, responses):
    """The planted rule: what part of the words is of LIKED."""
    return [sum(w in LIKED for w in r.split()) / max(len(r.split()), 1) for r in responses]


def refused(c, workdir, says, claimed=False, **kwargs):
    with pytest.raises(InputError, match=f"(?s){says}") as caught:
        ppo(c, str(workdir), **kwargs)
    assert "\n" not in str(caught.value)
    assert not (workdir / "metrics.jsonl").exists() or not lines(workdir)
    assert (workdir / "config.json").exists() is claimed


def shortened(load, context):
    """load_reward_model whose models have a shorter context."""

    def loaded(*args, **kwargs):
        model = load(*args, **kwargs)
        trunk = model.params["trunk"] | {"wpe": model.params["trunk"]["wpe"][:context]}
        config = dataclasses.replace(model.config, context_length=context)
        return dataclasses.replace(model, config=config, params={**model.params, "trunk": trunk})

    return loaded

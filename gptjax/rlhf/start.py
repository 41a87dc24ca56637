"""What a PPO run begins from: its models, its prompts, and the state before the first iteration."""

import dataclasses

from gptjax.data.chat import Template
from gptjax.data.prompts import Prompts, load_prompts
from gptjax.errors import InputError
from gptjax.model import heads
from gptjax.model.architecture import require_gpt
from gptjax.rlhf.config import PPOConfig
from gptjax.rlhf.networks import RLSpec
from gptjax.rlhf.program import PPOProgram, context_lengths
from gptjax.rlhf.reward_model import RewardModel, load_reward_model, prompt_room
from gptjax.rlhf.state import PPOState, new_state
from gptjax.trained import Model, load_model


def load_models(c: PPOConfig, mesh) -> tuple[Model, Template, RewardModel | None]:
    """(model of policy and reference, template of its prompts, reward model or None)."""
    base = load_model(c.policy, mesh=mesh)
    require_gpt(base.config, "PPO")
    if base.tokenizer.pad_id is None or base.tokenizer.eot_id is None:
        raise InputError(f"{c.policy} has no padding token of its own: give the workdir of an SFT run as policy.")
    template = Template(base.tokenizer, base.template or "chat")
    reward_model = load_reward_model(c.reward, mesh=mesh, tokenizer=base.tokenizer) if c.reward else None
    if reward_model and reward_model.template != template.kind:
        raise InputError(
            f"The reward model saw {reward_model.template!r} prompts and the policy {template.kind!r} ones: train the "
            "reward model from this policy's SFT run."
        )
    return base, template, reward_model


def load_both_prompts(c: PPOConfig, spec: RLSpec, template: Template) -> tuple[Prompts, Prompts, int]:
    """(prompts to train on, prompts held out for evaluation, room: the most tokens of a prompt that leave space for a
    response in every model's context)."""
    room = prompt_room(context_lengths(spec), spec.response, "rollout.max_new_tokens")
    if c.data.max_length is not None and c.data.max_length > room:
        raise InputError(
            f"data.max_length={c.data.max_length} and rollout.max_new_tokens={spec.response} are together more than "
            f"the shortest context, {min(context_lengths(spec).values())}: lower one of them."
        )
    held_out = dataclasses.replace(c.data, source=c.eval.source or c.data.source)
    return load_prompts(c.data, template, room), load_prompts(held_out, template, room), room


def initial_state(policy, reward, *, c: PPOConfig, spec: RLSpec, program: PPOProgram) -> PPOState:
    """policy: parameters of the SFT model; reward: of the reward model, or None. The value network is initialized
    from the reward model (InstructGPT C.4), or without one from the policy, with a zero head."""
    value = {}
    if spec.value:
        value = reward or heads.scalar_model(policy, spec.policy, None)
    elif spec.critic:
        value = {"head": heads.new_head(spec.policy.d_model, None)}
    return new_state(policy, value, program.policy_tx, program.value_tx, c.kl.coefficient, c.seed)

"""InstructGPT's PPO-ptx (Ouyang et al. 2022, §3.5 eq. 2 and appendix C.4).

    python -m gptjax.ppo --config=configs/instructgpt/ppo.py:1.3b --workdir=runs/ppo --config.policy=runs/sft-rl \
        --config.reward=runs/reward --config.data.source=prompts.jsonl

1.3b, 6b, 175b; with ',ppo' (1.3b,ppo): gamma = 0, the paper's plain "PPO". Prompts and responses have up to 1,000
tokens each, so the policy's context must be 2,000 or more; for a smaller one lower data.max_length and
rollout.max_new_tokens. The paper does not publish the released models' policy learning rate, GAE's lambda, or how the
two terms of eq. 2 are normalized: those are ours, and grad_norm/ppo, grad_norm/ptx and grad_norm/cosine in
metrics.jsonl say what gamma came to.

Hardware: SLICES says which TPU slice each size, with a reward model and a value network of 6B, is laid out for (bf16,
everything recomputed). What lies in memory throughout fits by our own count (tests/test_presets.py), which leaves out
activations; by the TPU compiler, 1.3b's sampling and scoring take 43.33 GiB of 95 a chip. `python -m gptjax.aot`
compiles the rest. On other slices mesh.fsdp takes all the devices (with 175b: half of them), which must divide
ppo.microbatch_size and rollout.forward_rows.
"""

from gptjax.config import choose, config_dict
from gptjax.ppo import PPOConfig

PRESETS = {"ppo": ["1.3b", "6b", "175b", "1.3b,ppo", "6b,ppo", "175b,ppo"]}  # by stage, for --help

SIZES = {  # policy's rate (ours, inside the sweeps of C.4), value's rate (C.4)
    "1.3b": (5e-6, 9e-6),  # swept 2.55e-6 .. 2.55e-5; above 8.05e-6 diverged without ptx
    "6b": (5e-6, 9e-6),
    "175b": (2.55e-6, 5e-6),  # 2.55e-6 and 3.74e-6 were tried
}

SLICES = {"1.3b": "v5p:2x2x2", "6b": "v5p:2x2x4", "175b": "v5p:4x4x8"}  # 8, 16 and 128 chips
MODELS = {"1.3b": "gpt3:1.3b", "6b": "gpt3:6.7b", "175b": "gpt3:175b"}  # the policy's
REWARD = "gpt3:6.7b"  # §3.5: one 6B reward model for policies of every size


def get_config(arg="1.3b"):
    size, _, variant = arg.partition(",")
    rate, value_rate = choose(SIZES, size, "size")
    plain = choose({"": False, "ppo": True}, variant, "variant")
    c = config_dict(PPOConfig)
    c.episodes = 256_000  # C.4
    c.batch_size = 512  # C.4
    c.ppo.update(
        epochs=1, minibatches=8,  # C.4: minibatches of 64, a single inner epoch
        clip=0.2,  # C.4
        value_clip=0.2,  # not stated: Ziegler et al.'s
        ptx_coefficient=0.0 if plain else 27.8,  # C.4
        ptx_normalize="token",  # not stated: ours
        ema_decay=0.992,  # C.4
    )  # fmt: skip
    c.ptx.per_episode = 8.0  # C.4: "8 times more pretraining examples than the number of the RL training episodes"
    c.kl.update(coefficient=0.02, target=None)  # C.4: fixed
    c.rollout.update(
        max_new_tokens=1000,  # C: responses of at most 1k tokens
        temperature=1.0,  # C.4
        gamma=1.0,  # C.4: no discount
        lam=0.95,  # not stated: Ziegler et al.'s
        missing_eos=-1.0,  # not stated: Stiennon et al.'s
    )  # fmt: skip
    c.rate.update(kind="constant", warmup=10, warmup_start=0.1)  # C.4: over the first 10 iterations, from a tenth
    for optimizer, learning_rate in ((c.optimizer, rate), (c.value_optimizer, value_rate)):
        optimizer.update(learning_rate=learning_rate, b1=0.9, b2=0.95, weight_decay=0.0, clip_norm=1.0)
    c.model.remat = "full"
    c.precision.compute = "bfloat16"
    c.mesh.update(data=1, fsdp=-1, tensor=2 if size == "175b" else 1)
    c.ppo.microbatch_size = c.rollout.forward_rows = 64 if size == "175b" else 16
    c.data.update(max_length=1000, drop_long=True)  # C: longer prompts filtered
    c.eval.every = c.checkpoint.every = 50
    return c

"""One PPO iteration at a time of TRL's PPOTrainer: the peer that gptjax's PPO is timed against.

    pip install -r requirements-trl.txt             # in an environment of its own
    python experiments/benchmarks/ppo_trl_peer.py   # with that environment's Python

Random weights, random prompts, no network; nothing of gptjax is imported. Prints {"ready": true}, then runs one
iteration for every line "go" on stdin and prints its seconds as a JSON line, until stdin closes:

    seconds   from "go" until the trainer asks for the next batch
    rollout   until the responses are sampled
    score     from there to the first optimization step: log-probabilities, reference, values, rewards, GAE
    update    the PPO epochs

What seconds has left over is the trainer's metrics, its logging and the second of its two garbage collections
(the first falls in score). TRL's loop is not changed: it waits where it takes its next batch. All other output
goes to stderr.
"""

import contextlib
import itertools
import json
import os
import sys
import tempfile
import time

MODEL = dict(n_layer=4, n_head=4, n_embd=128, n_positions=64, vocab_size=4096)
PROMPT, RESPONSE, BATCH, EPOCHS = 16, 24, 64, 4
KL_COEF, LEARNING_RATE = 0.05, 1e-5
EOS, PAD = MODEL["vocab_size"] - 1, MODEL["vocab_size"]  # TRL never embeds the pad: the model has no such token


class Closed(Exception):
    """stdin has closed: the way out of a training loop that has no end."""


class Gate:
    """The trainer's data loader, with a wait for "go" before each batch, and the clock of an iteration."""

    def __init__(self, loader, reply):
        self.loader, self.reply = loader, reply
        self.times = {}  # when each phase of this iteration was last seen to end

    def mark(self, phase):
        self.times[phase] = time.perf_counter()

    def __iter__(self):
        batches = itertools.chain.from_iterable(itertools.repeat(self.loader))
        self.reply({"ready": True})
        for _ in sys.stdin:
            self.times.clear()
            last = began = time.perf_counter()
            yield next(batches)
            answer = {"seconds": time.perf_counter() - began}
            for phase in ("rollout", "score", "update"):
                answer[phase] = self.times[phase] - last
                last = self.times[phase]
            self.reply(answer)
        raise Closed


def make_tokenizer():
    """Satisfies TRL, which wants the ids of pad and eos and a padding collator; no text is ever tokenized."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(EOS)} | {"<eos>": EOS, "<pad>": PAD}
    inner = Tokenizer(models.WordLevel(words, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="w0", eos_token="<eos>", pad_token="<pad>")


def make_trainer(folder):
    import torch
    from datasets import Dataset
    from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel
    from trl import PPOConfig, PPOTrainer

    torch.manual_seed(0)
    off = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    config = GPT2Config(**MODEL, **off, bos_token_id=None, eos_token_id=EOS, num_labels=1)
    policy, reference = GPT2LMHeadModel(config), GPT2LMHeadModel(config)
    reference.load_state_dict(policy.state_dict())
    value, reward = GPT2ForSequenceClassification(config), GPT2ForSequenceClassification(config)
    prompts = torch.randint(EOS, (64 * BATCH, PROMPT)).tolist()
    return PPOTrainer(
        config=PPOConfig(
            output_dir=folder, report_to="none", save_strategy="no", eval_strategy="no", num_sample_generations=0,
            disable_tqdm=True, use_cpu=True, seed=0,
            total_episodes=10**6 * BATCH, per_device_train_batch_size=BATCH, gradient_accumulation_steps=1,
            num_mini_batches=1, local_rollout_forward_batch_size=BATCH, num_ppo_epochs=EPOCHS,
            response_length=RESPONSE, stop_token=None, temperature=1.0, kl_coef=KL_COEF,
            learning_rate=LEARNING_RATE, lr_scheduler_type="constant",
        ),
        processing_class=make_tokenizer(),
        policy=policy, ref_policy=reference, reward_model=reward, value_model=value,
        train_dataset=Dataset.from_dict({"input_ids": prompts}),
    )  # fmt: skip


def watch(trainer, gate):
    """Marks the ends of the phases: generation returns, the first epoch begins, an epoch ends."""
    from trl.trainer import ppo_trainer

    generation, accumulate = ppo_trainer.batch_generation, trainer.accelerator.accumulate

    def timed_generation(*args, **kwargs):
        out = generation(*args, **kwargs)
        gate.mark("rollout")
        return out

    @contextlib.contextmanager
    def timed_accumulate(*models):
        if "score" not in gate.times:
            gate.mark("score")
        with accumulate(*models):
            yield
        gate.mark("update")

    ppo_trainer.batch_generation, trainer.accelerator.accumulate = timed_generation, timed_accumulate
    trainer.dataloader = gate


def main():
    answers = os.fdopen(os.dup(1), "w")  # stdout is for the answers alone; what anyone else prints joins stderr
    os.dup2(2, 1)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(folder)
        watch(trainer, Gate(trainer.dataloader, lambda answer: print(json.dumps(answer), file=answers, flush=True)))
        with contextlib.suppress(Closed):
            trainer.train()


if __name__ == "__main__":
    main()

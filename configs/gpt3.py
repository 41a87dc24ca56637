"""GPT-3 (Brown et al. 2020): all eight sizes, 300B tokens.

    python -m gptjax.pretrain --config=configs/gpt3.py:125m --workdir=runs/gpt3 --config.data.source=PATH
    python -m gptjax.pretrain --config=configs/gpt3.py:125m,mixture --config.data.source=FOLDER ...

Sizes: 125m, 350m, 760m, 1.3b, 2.7b, 6.7b, 13b, 175b (Table 2.1; model/spec.py says which two of its figures
are misprints). `,mixture` weights the folders common_crawl, webtext2, books1, books2 and wikipedia under
data.source as Table 2.2 does; its percentages sum to 101 and are normalized.

Appendix B: Adam .9/.95/1e-8, clip 1, weight decay .1, warm-up over 375M tokens, cosine to 10 % at 260B
tokens (measured here from the end of warm-up), batch from 32k tokens to the full size over the first 4-12B
tokens "depending on the model size". Ours, as the paper is silent: which size ramps how long, the band of 256
and its parity, no dropout, the decay mask. The mesh is for TPU v5p slices and is overridden freely; batch_size
is the full batch rounded up to whole micro-batches, whose last rows carry no weight.
"""

from gptjax.config import choose, config_dict
from gptjax.model.spec import GPT3
from gptjax.pretrain import PretrainConfig

# by stage, for --help; each size may have ,mixture
PRESETS = {"pretrain": ["125m", "350m", "760m", "1.3b", "2.7b", "6.7b", "13b", "175b", "125m,mixture"]}

# size: (batch in tokens, learning rate, ramp in tokens, batch_size, microbatch_size, fsdp, tensor)
TRAINING = {
    "125m": (0.5e6, 6.0e-4, 4e9, 256, 32, 8, 1),
    "350m": (0.5e6, 3.0e-4, 4e9, 256, 32, 8, 1),
    "760m": (0.5e6, 2.5e-4, 4e9, 256, 32, 16, 1),
    "1.3b": (1e6, 2.0e-4, 6e9, 512, 32, 16, 1),
    "2.7b": (1e6, 1.6e-4, 6e9, 512, 64, 32, 1),
    "6.7b": (2e6, 1.2e-4, 8e9, 1024, 64, 64, 1),
    "13b": (2e6, 1.0e-4, 8e9, 1024, 64, 64, 2),
    "175b": (3.2e6, 0.6e-4, 12e9, 1600, 320, 64, 8),
}
MIXTURE = {"common_crawl": 60.0, "webtext2": 22.0, "books1": 8.0, "books2": 8.0, "wikipedia": 3.0}


def get_config(arg="125m"):
    size, *options = arg.split(",")
    c = config_dict(PretrainConfig)
    model = choose(GPT3, size, "GPT-3 size")
    batch_tokens, learning_rate, ramp, batch_size, microbatch_size, fsdp, tensor = TRAINING[size]
    c.model.update(vars(model))
    c.model.remat = "full"
    c.data.tokenizer = f"bpe:{model.vocab_size}"
    c.data.validation = "0.001"
    c.tokens = 300e9
    c.batch_size, c.microbatch_size = batch_size, microbatch_size
    c.optimizer.update(learning_rate=learning_rate, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, clip_norm=1.0)
    c.schedule.update(
        kind="cosine", warmup_tokens=375e6, decay_tokens=260e9, final_fraction=0.1,
        ramp_tokens=ramp, ramp_start_batch_tokens=32e3, ramp_full_batch_tokens=batch_tokens,
    )  # fmt: skip
    c.precision.compute = "bfloat16"
    c.mesh.update(data=1, fsdp=fsdp, tensor=tensor)
    c.log.every = 10
    c.eval.batches = 100
    c.samples.prompts = ("The meaning of life is",)
    for option in options:
        choose({"mixture": None}, option, "GPT-3 config option")
        c.data.mixture = MIXTURE
    return c

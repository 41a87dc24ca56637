"""What a GPT is: its shape as a frozen config, the published presets, and their exact parameter counts.

Sources: GPT-1 (Radford et al. 2018 §4.1), GPT-2 (Radford et al. 2019 §2.3), GPT-3 (Brown et al. 2020,
Table 2.1). Two figures of GPT-3's Table 2.1 contradict the rest of the paper and are corrected here:

* XL (1.3B) is printed with 24 heads of 128, an inner width of 3,072 for d_model 2,048. That would be
  1.517B parameters, not Table D.1's 1.320B. With 16 heads of 128 = 2,048 the count is 1,315,723,264.
* 13B is printed with d_model 5,140, which 40 heads of 128 do not divide and which gives 12.953B.
  With d_model 5,120 = 40 x 128 the count is 12,853,386,240, Table D.1's 12,850M.
"""

import dataclasses
from typing import Literal

from gptjax.errors import InputError
from gptjax.ranges import BelowOne, Count

ATTENTION_PATHS = ("auto", "reference", "xla", "cpu", "splash", "cudnn")
REMAT_POLICIES = ("none", "dots", "full", "offload")
SHAPE = (  # the keys that weights depend on
    "vocab_size", "n_layer", "n_head", "d_model", "context_length", "norm", "local_window", "tied_head",
    "mup_base_width", "mup_base_heads",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class GPTConfig:
    """The architecture. Hashable, so that it can be a static argument of jit.

    vocab_size: rows of the embedding; pre-training takes the tokenizer's size where it is not set.
    n_layer: transformer blocks.
    n_head: attention heads of a block; each has d_model / n_head features.
    d_model: width of the residual stream; the MLP is four times as wide.
    context_length: the maximum length of a sequence, in tokens; the number of position embeddings.
    norm: 'pre' = GPT-2/3 (LayerNorm first, one more after the last block, residual projections initialized with
        .02/sqrt(2 n_layer)); 'post' = GPT-1 (LayerNorm after each residual sum, no final one, every matrix N(0, .02)).
    local_window: None = dense attention in every layer. An integer = GPT-3's alternating pattern: in even layers
        dense, in odd layers a query sees only the last `local_window` positions, its own included. The paper
        gives neither the width nor which layers are banded: both are our choice, after openai/sparse_attention.
    tied_head: the output projection is the token embedding (all GPTs); False = a separate matrix.
    mup_base_width: maximal-update parametrization (muP, model/mup.py), under which the learning rate that is best for
        a model of this d_model is nearly the best for wider ones; None = standard parametrization. A model of this
        very width is the same in both.
    mup_base_heads: heads of the model of that width.
    dropout: probability that an element is dropped in training; 0 = no dropout.
    dropout_sites: 'all' = embeddings, attention weights and sub-layer outputs (GPT-1 §4.1); 'residual' = sub-layer
        outputs alone (InstructGPT C.1).
    attention: the implementation: 'reference', 'xla', 'cpu', 'splash' (TPU) or 'cudnn' (GPU); 'auto' picks by platform
        (see model/attention/).
    remat: what the backward pass recomputes: 'none', 'dots' (all but the weight matmuls), 'full', or 'offload': as
        'dots', with the matmuls' outputs kept in host memory until then.
    unroll: layers per iteration of the scan over layers. n_layer = no loop at all, which is faster on CPU; 1 keeps
        compile time independent of depth.
    pipeline_microbatches: the maximum number of micro-batches that a pipeline (mesh.stage > 1) splits the rows into;
        None = 4 per stage.
    pipeline_virtual_stages: groups of layers on each pipeline stage; more of them make the pipeline bubble smaller.
    """

    vocab_size: Count
    n_layer: Count
    n_head: Count
    d_model: Count
    context_length: Count
    norm: Literal["pre", "post"] = "pre"
    local_window: Count | None = None
    tied_head: bool = True
    mup_base_width: Count | None = None
    mup_base_heads: Count | None = None
    dropout: BelowOne = 0.0
    dropout_sites: str = "all"
    attention: str = "auto"
    remat: str = "none"
    unroll: Count = 1
    pipeline_microbatches: Count | None = None
    pipeline_virtual_stages: Count = 1

    def __post_init__(self):
        for name in ("vocab_size", "n_layer", "n_head", "d_model", "context_length"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise InputError(f"model.{name} must be a positive whole number, not {value!r}.")
        if self.d_model % self.n_head:
            raise InputError(
                f"model.d_model={self.d_model} is not a multiple of model.n_head={self.n_head}: "
                "each head takes d_model / n_head features. Change one of them."
            )
        if self.norm not in ("pre", "post"):
            raise InputError(f"model.norm must be 'pre' or 'post', not {self.norm!r}.")
        if not 0.0 <= self.dropout < 1.0:
            raise InputError(f"model.dropout must be in [0, 1), not {self.dropout}.")
        if self.dropout_sites not in ("all", "residual"):
            raise InputError(f"model.dropout_sites={self.dropout_sites!r}: choose all or residual.")
        if self.local_window is not None and self.local_window < 1:
            raise InputError(f"model.local_window must be at least 1 or None, not {self.local_window}.")
        if self.attention not in ATTENTION_PATHS:
            raise InputError(f"model.attention={self.attention!r}: choose one of {', '.join(ATTENTION_PATHS)}.")
        if self.remat not in REMAT_POLICIES:
            raise InputError(f"model.remat={self.remat!r}: choose one of {', '.join(REMAT_POLICIES)}.")
        if not 1 <= self.unroll <= self.n_layer:
            raise InputError(f"model.unroll={self.unroll} must lie between 1 and model.n_layer={self.n_layer}.")
        microbatches = 1 if self.pipeline_microbatches is None else self.pipeline_microbatches
        if min(self.pipeline_virtual_stages, microbatches) < 1:
            raise InputError("model.pipeline_virtual_stages and model.pipeline_microbatches are at least 1.")
        width, heads = self.mup_base_width, self.mup_base_heads
        if (width is None) != (heads is None):
            raise InputError(
                "muP needs both model.mup_base_width and model.mup_base_heads, the width and the heads of the model "
                "whose learning rate is known: give the other one too, or neither."
            )
        if width is not None and (min(width, heads) < 1 or width % heads):
            raise InputError(f"model.mup_base_width={width} is not a multiple of model.mup_base_heads={heads}.")

    @property
    def d_head(self) -> int:
        return self.d_model // self.n_head

    @property
    def d_ff(self) -> int:
        """All GPTs: four times the width."""
        return 4 * self.d_model

    # --- muP: what differs from standard parametrization, where all of these are 1 (model/mup.py) ---

    @property
    def width_multiplier(self) -> float:
        """d_model over that of the base model."""
        return self.d_model / self.mup_base_width if self.mup_base_width else 1.0

    @property
    def output_multiplier(self) -> float:
        """Of the final hidden states, and so of the logits."""
        return 1 / self.width_multiplier

    @property
    def attention_multiplier(self) -> float:
        """Of the queries: scores are q k / sqrt(d_head) times this, which is const / d_head."""
        return (self.mup_base_width / self.mup_base_heads / self.d_head) ** 0.5 if self.mup_base_width else 1.0

    @property
    def hidden_rate(self) -> float:
        """Adam's learning rate of the blocks' matrices, relative to the other parameters'."""
        return 1 / self.width_multiplier

    def is_local(self, layer: int) -> bool:
        """Whether a layer has banded attention (GPT-3 §2.1: alternating)."""
        return self.local_window is not None and layer % 2 == 1


def parameter_count(c: GPTConfig) -> int:
    """V D + T D + L (12 D^2 + 13 D) [+ 2 D, final LayerNorm] [+ V D, untied head]. Letters: model/__init__.py."""
    D = c.d_model
    blocks = c.n_layer * (12 * D * D + 13 * D)
    final_norm = 2 * D if c.norm == "pre" else 0
    head = 0 if c.tied_head else c.vocab_size * D
    return c.vocab_size * D + c.context_length * D + blocks + final_norm + head


def non_embedding_count(c: GPTConfig) -> int:
    """Parameters without token and position embeddings (and without an untied head): N of Kaplan et al. 2020."""
    head = 0 if c.tied_head else c.vocab_size * c.d_model
    return parameter_count(c) - (c.vocab_size + c.context_length) * c.d_model - head


GPT1_VOCAB = 40_478  # <unk>, 238 characters, 238 characters + </w>, 40,000 merges, \n</w>
GPT2_VOCAB = 50_257  # 256 bytes, 50,000 merges, <|endoftext|>
GPT3_LOCAL_WINDOW = 256  # our choice: the paper does not say


def _gpt2(n_layer: int, d_model: int, n_head: int) -> GPTConfig:
    return GPTConfig(GPT2_VOCAB, n_layer, n_head, d_model, context_length=1024)


def _gpt3(n_layer: int, d_model: int, n_head: int) -> GPTConfig:
    return GPTConfig(GPT2_VOCAB, n_layer, n_head, d_model, context_length=2048, local_window=GPT3_LOCAL_WINDOW)


GPT1 = GPTConfig(GPT1_VOCAB, 12, 12, 768, context_length=512, norm="post", dropout=0.1)

GPT2 = {  # Radford et al. 2019, Table 2, under the counts its README corrected them to
    "124m": _gpt2(12, 768, 12),
    "355m": _gpt2(24, 1024, 16),
    "774m": _gpt2(36, 1280, 20),
    "1558m": _gpt2(48, 1600, 25),
}

GPT3 = {  # Brown et al. 2020, Table 2.1, corrected as the docstring says
    "125m": _gpt3(12, 768, 12),
    "350m": _gpt3(24, 1024, 16),
    "760m": _gpt3(24, 1536, 16),
    "1.3b": _gpt3(24, 2048, 16),
    "2.7b": _gpt3(32, 2560, 32),
    "6.7b": _gpt3(32, 4096, 32),
    "13b": _gpt3(40, 5120, 40),
    "175b": _gpt3(96, 12288, 96),
}


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """What a later stage may change about the model it starts from; None = as that run had it.

    dropout: probability that an element is dropped in training; 0 = no dropout.
    dropout_sites: 'all' = embeddings, attention weights and sub-layer outputs (GPT-1 §4.1); 'residual' = sub-layer
        outputs alone (InstructGPT C.1).
    attention: the implementation: 'reference', 'xla', 'cpu', 'splash' (TPU) or 'cudnn' (GPU); 'auto' picks by platform.
    remat: what the backward pass recomputes: 'none', 'dots' (all but the weight matmuls), 'full', or 'offload': as
        'dots', with the matmuls' outputs kept in host memory until then.
    unroll: layers per iteration of the scan over layers; the model's n_layer = no loop at all.
    pipeline_microbatches: the maximum number of micro-batches that a pipeline (mesh.stage > 1) splits the rows into.
    pipeline_virtual_stages: groups of layers on each pipeline stage; more of them make the pipeline bubble smaller.
    """

    dropout: BelowOne | None = None
    dropout_sites: str | None = None
    attention: str | None = None
    remat: str | None = None
    unroll: Count | None = None
    pipeline_microbatches: Count | None = None
    pipeline_virtual_stages: Count | None = None

    def no_dropout_by_default(self) -> "ModelOptions":
        """These options with dropout 0 unless they set one, where a stage is not to inherit it from its base."""
        return dataclasses.replace(self, dropout=self.dropout or 0.0)

    def apply(self, config, **others):
        """The model's config with the options that are not None, and `others`, replaced. InputError: an option that
        this model does not have (an LSTM has dropout alone)."""
        changed = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
        for name in changed.keys() - {field.name for field in dataclasses.fields(config)}:
            raise InputError(f"model.{name} is an option of GPTs, and this model is an LSTM: leave it out.")
        return dataclasses.replace(config, **changed, **others)

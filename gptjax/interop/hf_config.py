"""config.json of Hugging Face's GPT-2 and OpenAI-GPT to and from GPTConfig. Other architectures are rejected."""

import re
import warnings

import numpy as np

from gptjax.errors import InputError
from gptjax.interop.layout import HEAD, embedding_names
from gptjax.model.layers import INIT_STD, LAYER_NORM_EPS
from gptjax.model.spec import GPTConfig

MODEL_TYPES = {"gpt2": "pre", "openai-gpt": "post"}
ARCHITECTURES = {"pre": "GPT2LMHeadModel", "post": "OpenAIGPTLMHeadModel"}
SCORERS = {"pre": "GPT2ForSequenceClassification", "post": "OpenAIGPTForSequenceClassification"}
SCORE = "score.weight"
_LAYER = re.compile(r"h\.(\d+)\.")
_OTHER_POSITIONS = ("rotary", "rotary_dim", "rotary_pct", "rope_theta", "rope_scaling", "rope_parameters", "alibi")
_ALIASES = {"n_embd": "hidden_size", "n_positions": "max_position_embeddings", "n_layer": "num_hidden_layers",
            "n_head": "num_attention_heads"}  # transformers' aliases, common to all models  # fmt: skip
_TANH_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")  # three names of one function


def model_config(settings, tensors, where) -> GPTConfig:
    """The GPTConfig of a checkpoint: from config.json, completed by the tensors' shapes.

    Args:
        settings: the contents of config.json, or None if there is none.
        tensors: {name without prefix: object with `shape` and load()}.
        where: the checkpoint, for messages.
    Raises:
        InputError: an architecture that this model does not implement, or sizes that cannot be determined.
    """
    norm = _norm(settings, tensors, where)
    settings = settings or {}
    sizes = _sizes(settings, tensors, norm)
    if unknown := [key for key, value in sizes.items() if value is None]:
        raise InputError(
            f"{where}: {', '.join(unknown)} cannot be determined from the tensors. Put the model's config.json next to "
            "them."
        )
    _refuse_other_architectures(settings, norm, sizes["n_embd"], where)
    default = 0.1 if settings else 0.0  # transformers' default, where config.json does not set it
    rates = {key: settings.get(key, default) for key in ("resid_pdrop", "embd_pdrop", "attn_pdrop")}
    if len(set(rates.values())) > 1:
        warnings.warn(f"{where} has dropout {rates}: model.dropout is set to resid_pdrop.", stacklevel=3)
    try:
        return GPTConfig(
            sizes["vocab_size"], sizes["n_layer"], sizes["n_head"], sizes["n_embd"], sizes["n_positions"],
            norm=norm, tied_head=is_tied(settings, tensors, norm), dropout=rates["resid_pdrop"],
        )  # fmt: skip
    except (InputError, TypeError) as error:
        raise InputError(f"{where}: config.json has an invalid value: {error}") from None


def _norm(settings, tensors, where):
    if settings and "model_type" in settings:
        if settings["model_type"] not in MODEL_TYPES:
            raise InputError(
                f"{where}: config.json has model_type={settings['model_type']!r}, but only "
                f"{' and '.join(MODEL_TYPES)} are supported: use a checkpoint of one of these."
            )
        return MODEL_TYPES[settings["model_type"]]
    for norm in MODEL_TYPES.values():
        if embedding_names(norm)[0] in tensors:
            return norm
    first = ", ".join(sorted(tensors)[:3]) or "no tensor"
    raise InputError(
        f"{where} contains {first} ..., but neither wte.weight (GPT-2) nor tokens_embed.weight (OpenAI-GPT): "
        "use a checkpoint of one of these."
    )


def _sizes(settings, tensors, norm) -> dict[str, int | None]:
    wte, wpe = (tensors[n].shape if n in tensors else () for n in embedding_names(norm))
    shapes = {
        "vocab_size": wte[0] if len(wte) == 2 else None,
        "n_embd": wte[1] if len(wte) == 2 else None,
        "n_positions": wpe[0] if len(wpe) == 2 else None,
        # The number of distinct layers, not the highest: a stray h.99 is one extra layer, not 90 missing ones.
        "n_layer": len({match[1] for name in tensors if (match := _LAYER.match(name))}) or None,
    }
    sizes = {key: settings.get(key, settings.get(_ALIASES.get(key), value)) for key, value in shapes.items()}
    sizes["n_head"] = settings.get("n_head", settings.get(_ALIASES["n_head"]))
    width = sizes["n_embd"]
    if sizes["n_head"] is None and isinstance(width, int) and width % 64 == 0:
        sizes["n_head"] = width // 64
    return sizes


def _refuse_other_architectures(settings, norm, width, where):
    known = {"layer_norm_epsilon": (LAYER_NORM_EPS,), "quantization_config": (None,)}
    if norm == "pre":
        known |= {
            "activation_function": _TANH_GELU,
            "n_inner": (None, 4 * width),
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
            # reorder_and_upcast_attn computes the same function; our attention scores are always float32.
        }
    else:
        known |= {"afn": ("gelu", "gelu_new")}  # there 'gelu' means the tanh approximation
    faults = [
        f"{key}={settings[key]!r} (supported: {' or '.join(map(repr, values))})"
        for key, values in known.items()
        if key in settings and settings[key] not in values
    ]
    faults += [f"{key}={settings[key]!r}" for key in _OTHER_POSITIONS if settings.get(key) not in (None, False)]
    if settings.get("position_embedding_type", "absolute") != "absolute":
        faults.append(f"position_embedding_type={settings['position_embedding_type']!r} (supported: 'absolute')")
    if settings.get("pruned_heads"):
        faults.append(f"pruned_heads={settings['pruned_heads']!r}")
    if settings.get("auto_map"):
        faults.append("auto_map, which loads custom code")
    if faults:
        raise InputError(
            f"{where}: config.json describes an unsupported architecture: {'; '.join(faults)}. "
            "Use a checkpoint without these."
        )


def is_tied(settings: dict, tensors, norm: str) -> bool:
    """Whether the output projection is the token embedding: unless config.json unties it or it is another matrix."""
    if settings.get("tie_word_embeddings") is False:
        return False
    head, wte = tensors.get(HEAD), tensors.get(embedding_names(norm)[0])
    if head is None or wte is None:
        return True
    return head.shape == wte.shape and np.array_equal(head.load(), wte.load())


def settings_of(c: GPTConfig, token_ids: dict, scorer: bool = False) -> dict:
    """The contents of config.json, with every key that transformers would otherwise fill with GPT-2's default.

    token_ids: bos_token_id, eos_token_id and optionally pad_token_id. scorer: for a reward model, which has one label.
    """
    labels = {"num_labels": 1, "id2label": {"0": "score"}, "label2id": {"score": 0}, "problem_type": "regression"}
    model_type = next(name for name, norm in MODEL_TYPES.items() if norm == c.norm)
    activation = {"activation_function": "gelu_new", "n_inner": None} if c.norm == "pre" else {"afn": "gelu"}
    return {
        "architectures": [(SCORERS if scorer else ARCHITECTURES)[c.norm]],
        "model_type": model_type,
        "vocab_size": c.vocab_size,
        "n_positions": c.context_length,
        "n_ctx": c.context_length,
        "n_embd": c.d_model,
        "n_layer": c.n_layer,
        "n_head": c.n_head,
        **activation,
        "layer_norm_epsilon": LAYER_NORM_EPS,
        "initializer_range": INIT_STD,
        "embd_pdrop": c.dropout,
        "resid_pdrop": c.dropout,
        "attn_pdrop": c.dropout,
        "tie_word_embeddings": c.tied_head,
        **token_ids,
        "torch_dtype": "float32",
        **(labels if scorer else {}),
    }

"""The zero of a reward model's scores: a bias, or a gain too, fitted on demonstrations (InstructGPT C.2), because
comparisons leave the offset of the scores undetermined. c is a RewardConfig.
"""

import dataclasses

from gptjax import config as configs
from gptjax import paths, run_config
from gptjax.data.chat import Template
from gptjax.data.demonstrations import DemonstrationConfig, load_demonstrations
from gptjax.distributed import hosts
from gptjax.errors import InputError
from gptjax.rlhf.reward_model import RewardModel, normalized


def texts_of_base(c, workdir, resuming: bool) -> tuple[str, dict]:
    """(template, data section of the SFT run in init_from, or {} if that is another run). InputError: the config names
    another template than the SFT run's, or the folder of init_from is needed and gone."""
    gone = resuming and not paths.local(c.init_from).exists()
    if gone and c.normalize != "none" and c.demonstrations is None:
        raise InputError(
            f"{c.init_from} no longer exists, and its config says which demonstrations are to score 0 on average: "
            "restore it."
        )
    before = {"template": run_config.read_config(workdir)["template"]} if gone else {}
    of_sft = {} if gone else demonstration_config(run_config.read_config(c.init_from))
    kind = c.template or (before or of_sft).get("template", "chat")
    if of_sft and kind != of_sft["template"]:
        raise InputError(f"template={kind!r}, but {c.init_from} was tuned with {of_sft['template']!r}: leave it out.")
    return kind, of_sft


def demonstration_config(run: dict) -> dict:
    """The data section of a run's config.json where its data are demonstrations, else {}."""
    data = run.get("data") or {}
    return data if "loss_on" in data else {}


def reference_texts(c, of_sft: dict, template: Template, context_length: int):
    """(prompts, responses) as ids of the demonstrations that are to score 0 on average: at most 1,000, spread evenly
    over the source."""
    if not of_sft and c.demonstrations is None:
        raise InputError(
            f"{c.init_from} is no SFT run, so there are no demonstrations to set the zero of the reward by: give "
            "--config.demonstrations=PATH, or --config.normalize=none."
        )
    data = {**of_sft, "max_length": None, "drop_long": True}
    if c.demonstrations is not None:
        data = {"source": c.demonstrations, "template": template.kind, "drop_long": True}
    source = configs.build(DemonstrationConfig, data, "demonstrations")
    demonstrations = load_demonstrations(source, template, context_length, c.seed, flags=None)
    chosen, left_out = demonstrations.train, demonstrations.left_out
    if left_out and c.demonstrations is not None:  # the SFT run has reported its own
        hosts.say(f"demonstrations left out: {left_out}; {left_out.first()}")
    chosen = [chosen[i * len(chosen) // min(len(chosen), 1000)] for i in range(min(len(chosen), 1000))]
    return [d.ids[: d.prompt] for d in chosen], [d.ids[d.prompt :] for d in chosen]


def fit_scale(raw: RewardModel, examples, deviation: bool) -> dict:
    """{'gain', 'bias', ...}: what the scores are multiplied by and what is then added, so that those of the examples
    have mean 0 and, if `deviation`, standard deviation 1."""
    raw = dataclasses.replace(raw, config=dataclasses.replace(raw.config, dropout=0.0))
    scores = raw.score(*examples)
    gain = 1.0 / max(float(scores.std()), 1e-8) if deviation else 1.0
    bias = -gain * float(scores.mean())
    head = normalized(raw.params["head"], gain, bias)
    after = dataclasses.replace(raw, params={**raw.params, "head": head}).score(*examples)
    return {
        "gain": gain, "bias": bias, "demonstrations": len(scores),
        "mean_before": float(scores.mean()), "std_before": float(scores.std()), "mean_after": float(after.mean()),
    }  # fmt: skip

"""The SuperGLUE score: the mean of eight tasks, of which those with two metrics count with the mean of both.

Sources: Wang et al. 2019 §3; Brown et al. 2020 (GPT-3) Table 3.8.
"""

from collections.abc import Mapping

from gptjax.errors import InputError

METRICS = {
    "boolq": ("accuracy",),
    "cb": ("accuracy", "f1"),
    "copa": ("accuracy",),
    "rte": ("accuracy",),
    "wic": ("accuracy",),
    "wsc": ("accuracy",),
    "multirc": ("accuracy", "f1"),  # exact match of all answers of a question; F1 over answers (F1a)
    "record": ("accuracy", "f1"),  # exact match and F1 of an entity's words
}


def superglue_score(metrics: Mapping[str, Mapping[str, float]]) -> float:
    """The score, in the unit of the metrics.

    metrics: {task: {metric: value}} with what METRICS names; more is ignored.
    InputError: a task or metric that is missing, all of them in one message.
    """
    names = [(task, name) for task, of_task in METRICS.items() for name in of_task]
    if missing := [f"{task} {name}" for task, name in names if metrics.get(task, {}).get(name) is None]:
        raise InputError(f"The SuperGLUE score needs all eight tasks: {', '.join(missing)} missing.")
    return sum(sum(metrics[task][name] for name in of) / len(of) for task, of in METRICS.items()) / len(METRICS)

"""GPT-1's fine-tuning on its labeled tasks (Radford et al. 2018 §4.1-4.2), by the name of the task.

    python -m gptjax.finetune --config=configs/gpt1_finetune.py:sst2 --workdir=runs/sst2 --config.init_from=runs/gpt1 \
        --config.data.train=train.tsv --config.data.valid=dev.tsv [--seeds=0,1,2]

3 epochs of batches of 32, Adam at 6.25e-5 with linear decay after a warm-up of .2 % of the run, dropout .1, weight
decay .01, auxiliary language-model loss with lambda .5. Test-set scores of the paper's GPT-1, for comparison: SST-2
91.3, CoLA 45.4 (Matthews), MRPC 82.3 (F1), STS-B 82.0 (Pearson), QQP 70.3 (F1), MNLI 82.1 / 81.4, QNLI 88.1, RTE 56.0,
RACE 59.0, StoryCloze 86.5. SICK and MCTest are not in the paper.

The columns are those of the published files: GLUE's .tsv (CoLA's train.tsv and dev.tsv have no header), SICK's tab-
separated .txt, RACE's JSON files, MCTest's .tsv with the .ans next to it, StoryCloze's .csv. Other files: give
--config.data.fields.NAME=COLUMN.
"""

from gptjax.config import choose, config_dict
from gptjax.finetune import FinetuneConfig

TASKS = {
    "sst2": {"fields": {"text": "sentence"}, "labels": "0,1"},
    "cola": {
        "columns": "source,label,mark,sentence", "fields": {"text": "sentence"}, "labels": "0,1",
    },
    "mrpc": {
        "task": "similarity", "labels": "0,1",
        "fields": {"first": "#1 String", "second": "#2 String", "label": "Quality"},
    },
    "stsb": {
        "task": "similarity", "scores": "0,5",
        "fields": {"first": "sentence1", "second": "sentence2", "label": "score"},
    },
    "qqp": {
        "task": "similarity", "labels": "0,1",
        "fields": {"first": "question1", "second": "question2", "label": "is_duplicate"},
    },
    "mnli": {
        "task": "entailment", "labels": "entailment,neutral,contradiction",
        "fields": {"premise": "sentence1", "hypothesis": "sentence2", "label": "gold_label"},
    },
    "qnli": {
        "task": "entailment", "labels": "entailment,not_entailment",
        "fields": {"premise": "question", "hypothesis": "sentence"},
    },
    "rte": {
        "task": "entailment", "labels": "entailment,not_entailment",
        "fields": {"premise": "sentence1", "hypothesis": "sentence2"},
    },
    "sick": {
        "task": "entailment", "format": "tsv", "labels": "ENTAILMENT,NEUTRAL,CONTRADICTION",
        "fields": {"premise": "sentence_A", "hypothesis": "sentence_B", "label": "entailment_judgment"},
    },
    "race": {"task": "choice", "form": "race"},
    "storycloze": {
        "task": "choice", "labels": "1,2",
        "fields": {
            "context": "InputSentence1,InputSentence2,InputSentence3,InputSentence4",
            "choices": "RandomFifthSentenceQuiz1,RandomFifthSentenceQuiz2", "label": "AnswerRightEnding",
        },
    },
    "mctest": {"task": "choice", "form": "mctest"},
}  # fmt: skip
PRESETS = {  # by stage, for --help
    "finetune": [
        "sst2", "cola", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "sick", "race", "storycloze", "mctest",
    ],
}  # fmt: skip


def get_config(task: str = "sst2"):
    c = config_dict(FinetuneConfig)
    settings = dict(choose(TASKS, task, "task"))
    c.data.fields.update(settings.pop("fields", {}))
    c.data.update(settings)
    c.epochs, c.batch_size = 3.0, 32
    c.model.dropout = 0.1
    c.optimizer.update(name="gpt1_adam", learning_rate=6.25e-5, b1=0.9, b2=0.999, weight_decay=0.01, clip_norm=1.0)
    c.schedule.update(kind="gpt1_linear", warmup_fraction=0.002)
    c.eval.every = 1000
    return c

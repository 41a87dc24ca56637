"""GPT-3's data preparation (Brown et al. 2020, appendices A and C).

    python -m gptjax.curate --config=configs/curate/gpt3.py --workdir=runs/curated --config.input='crawl/*.jsonl.gz' \
        --config.good=PATH --config.bad=PATH --config.evaluation=DIR

The quality classifier with its Pareto rule (where config.good and config.bad are given; the paper's are WebText,
Wikipedia and books against unfiltered Common Crawl), fuzzy deduplication with 10 hashes, and decontamination by
13-grams (where config.evaluation is given). Ours: exact deduplication first; fuzzy duplicates by 5 words, and only what
a kept document contains, where the paper has the classifier's single words and Spark's approximate distance.
"""

from gptjax.config import config_dict
from gptjax.curation.classifier import Quality
from gptjax.curation.config import CurateConfig
from gptjax.curation.decontaminate import Decontaminate
from gptjax.curation.exact import Exact
from gptjax.curation.fuzzy import Fuzzy
from gptjax.curation.minhash import GPT3

PRESETS = {"curate": []}


def get_config():
    return config_dict(CurateConfig)


def get_steps(config):
    quality = Quality(config.good, config.bad, config.seed, text_field=config.text_field) if config.good else None
    clean = Decontaminate(config.evaluation) if config.evaluation else None
    return [step for step in (Exact(), quality, Fuzzy(GPT3), clean) if step is not None]

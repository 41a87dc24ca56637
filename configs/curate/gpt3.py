"""GPT-3's data preparation (Brown et al. 2020, appendix A): quality classifier, deduplication, decontamination.

    python -m gptjax.curate --config=configs/curate/gpt3.py --workdir=runs/curated --config.input='crawl/*.jsonl.gz' \
        --config.good=PATH --config.bad=PATH --config.evaluation=DIR
"""

from gptjax.config import config_dict
from gptjax.curation.config import CurateConfig
from gptjax.curation.exact import Exact
from gptjax.curation.fuzzy import Fuzzy
from gptjax.curation.minhash import GPT3

PRESETS = {"curate": []}


def get_config():
    return config_dict(CurateConfig)


def get_steps(config):
    return [Exact(), Fuzzy(GPT3)]

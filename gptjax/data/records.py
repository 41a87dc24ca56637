"""data.json of a workdir, and where documents ended in the pre-training that a run's weights come from.

data.json records which tokens a run reads (folders of the cache and fingerprints), and every later reader verifies
them:

    {"shuffle": 2, "text": {"tokenizer": sha256, "isolate_documents": false,
                            "parts": {"books1": {"directory": "0f5c…", "train": sha256, "validation": sha256}}}}

"shuffle" is the version of lm.shuffled. Stages after pre-training also have "documents" (pretraining_documents). A
source that is not a mixture has one part, "". Runs of earlier versions have no data.json: their tokens are in the cache
itself, and their checkpoints have the fingerprint.
"""

import functools
import json

from gptjax import paths
from gptjax.data import lm
from gptjax.distributed import hosts
from gptjax.errors import InputError
from gptjax.json_files import write_json
from gptjax.run_config import read_config


def read_record(workdir) -> dict:
    """The contents of a workdir's data.json; {} if there is none. InputError: damaged."""
    path = paths.local(workdir) / "data.json"
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is damaged ({error}): restore it, or start in a new workdir.") from error


def start_record(workdir, known: bool, base=None) -> dict:
    """The contents of data.json, equal on every host: the existing ones if the run is resumed (known), else those of a
    new run. base: the workdir that a stage after pre-training starts from."""
    if not known:
        return {"shuffle": lm.SHUFFLE} | ({"documents": pretraining_documents(base)} if base else {})
    return {"shuffle": 1, **hosts.from_first(lambda: read_record(workdir))}


def write_record(workdir, record: dict, text=None):
    """Writes data.json of a new run, before config.json claims the workdir. text: a corpus.Text that the run reads."""

    def write():
        paths.local(workdir).mkdir(parents=True, exist_ok=True)
        write_json(paths.local(workdir) / "data.json", record | ({"text": text.record} if text else {}))

    hosts.only_first(write)


# --- the pre-training of a run's weights -------------------------------------------------------------------


def pretraining_run(workdir) -> tuple[str, dict]:
    """(workdir, config.json) of the pre-training run that a run's weights come from, following init_from.

    InputError: the chain ends without one, as for imported weights.
    """
    seen = []
    while workdir and str(workdir) not in seen:
        seen.append(str(workdir))
        run = read_config(workdir)
        if _is_of_text(run) and run["data"].get("source"):
            return str(workdir), run
        workdir = run.get("init_from") or run.get("policy")
    raise InputError(f"{' <- '.join(seen)}: The pre-training text of these weights is unknown: give a source of text.")


def _is_of_text(run: dict) -> bool:
    """Whether the data section of a run (its config.json) is a DataConfig: plain text, as in pre-training."""
    return "tokenizer" in (run.get("data") or {})


def pretraining_documents(workdir) -> dict:
    """How documents were separated in the pre-training of a run's weights, in the terms of DataConfig:
    {'isolate_documents', 'document_separator', 'split'}, with split only if each line is a document.

    Taken from the config of the pre-training run, or from data.json of a later stage, since the base's folder may be
    gone. Imported weights have the defaults; so do, with a warning, weights whose pre-training is unknown."""
    data, seen = {}, set()
    while workdir and str(workdir) not in seen:
        seen.add(str(workdir))
        try:
            run, record = read_config(workdir), read_record(workdir)
        except InputError as error:
            _warn_once(f"{error} How documents were separated in pre-training is unknown: the defaults are assumed.")
            break
        if _is_of_text(run):
            data = run["data"]
            break
        if "documents" in record:
            data = record["documents"]
            break
        workdir = run.get("init_from") or run.get("policy")
    return {
        "isolate_documents": bool(data.get("isolate_documents")),
        "document_separator": data.get("document_separator"),
        "split": "lines" if data.get("split") == "lines" else None,
    }


_warn_once = functools.cache(hosts.warn)


def isolates_documents(workdir) -> bool:
    """Whether the weights of a run were pre-trained with attention within documents only."""
    return pretraining_documents(workdir)["isolate_documents"]


def documents_within(workdir) -> dict:
    """How documents within a text were separated in the pre-training of a run's weights: {'document_separator',
    'split'}."""
    return {k: v for k, v in pretraining_documents(workdir).items() if k != "isolate_documents"}

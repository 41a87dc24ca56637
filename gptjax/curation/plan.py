"""The plan of a curation, in curation.json of its workdir: config, steps and the files of each shard.

Whoever comes first writes it, with the files as they are then; a later start continues it, and is refused if it differs
in anything that the output depends on.
"""

import dataclasses
import json
from pathlib import Path

from gptjax import config as configs
from gptjax import json_files, paths
from gptjax.config import build
from gptjax.curation.config import CurateConfig
from gptjax.curation.documents import describe, name_of
from gptjax.curation.engine import Run
from gptjax.data import sources
from gptjax.errors import InputError
from gptjax.queue.files import Folder

PLAN, _MOST_FILES = "curation.json", 2_000  # files of a shard


def begin(config: CurateConfig, steps, workdir, path: str) -> Run:
    """The run of a workdir, which begins if there is none. path: of the config file with get_steps, for the record.

    InputError: no input, a step that cannot run here, or a workdir of another config, other steps or other files.
    """
    if not config.input:
        raise InputError("config.input is not set: give the text with --config.input=PATH.")
    if paths.is_remote(workdir):
        raise InputError(f"{workdir} is not a local folder: give one, on a disk that all workers see.")
    _check(steps)
    workdir, config = Path(paths.local(workdir)), _absolute(config)
    files = [{"path": file.fs.unstrip_protocol(file.path), "name": file.name, "size": file.size}
             for file in sources.listing(config.input).files]  # fmt: skip
    if not files:
        raise InputError(f"The input {config.input!r} has no files: check the path.")
    described = [describe(step) for step in steps]
    plan = {"config": configs.to_json(config), "steps": described, "file": path, "shards": shards(files, config)}
    folder = Folder(workdir)
    if not folder.create(PLAN, json_files.dumps(plan, indent=1).encode() + b"\n"):
        _compare(json.loads(folder.read(PLAN)), plan, workdir)
    return Run(workdir, config, tuple(steps), tuple(map(tuple, plan["shards"])))


def opened(workdir) -> Run:
    """The run of a workdir that has begun, with the steps of its config file: what a worker does."""
    workdir = Path(workdir)
    plan = json.loads((workdir / PLAN).read_text())
    config = build(CurateConfig, plan["config"])
    return Run(workdir, config, tuple(load_steps(plan["file"], config)), tuple(map(tuple, plan["shards"])))


def load_steps(path: str, config: CurateConfig) -> list:
    """What get_steps(config, ARGUMENT) of a config file returns. path: FILE[:ARGUMENT]. InputError: it has none."""
    file, _, argument = path.partition(":")
    get_steps = configs.function_of(file, "get_steps")
    if get_steps is None:
        raise InputError(f"{file} has no get_steps(config), which gives the steps; configs/curate/gpt3.py has.")
    return get_steps(config, *([argument] if argument else []))


def shards(files: list[dict], config: CurateConfig) -> list[list[dict]]:
    """The files in order, small ones together up to config.shard_bytes."""
    found, size = [[]], 0
    for file in files:
        if found[-1] and (size + file["size"] > config.shard_bytes or len(found[-1]) >= _MOST_FILES):
            found.append([])
            size = 0
        found[-1].append(file)
        size += file["size"]
    return found


def _absolute(config: CurateConfig) -> CurateConfig:
    """Workers may begin in another folder."""
    changed = {key: paths.absolute(value) for key, names in paths.fields(CurateConfig).items()
               if paths.is_path(value := getattr(config, key), names)}  # fmt: skip
    return dataclasses.replace(config, **changed)


def _check(steps) -> None:
    names = [name_of(step) for step in steps]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"Two steps have the name {name!r}, by which the manifest tells them apart: give one of "
                             "them another, as an attribute `name`.")  # fmt: skip
    for step, name in zip(steps, names, strict=True):
        if not callable(step) and not hasattr(step, "opened") and not hasattr(step, "sketch"):
            raise InputError(f"The step {name} is no function of a document: see gptjax/curation/engine.py.")
        if hasattr(step, "check"):
            step.check()


def _compare(there: dict, plan: dict, workdir: Path) -> None:
    for key in ("config", "steps", "shards"):
        if there[key] == plan[key]:
            continue
        if key == "config":
            names = [k for k in plan[key] if plan[key][k] != there[key].get(k)]
            what = ", ".join(f"config.{k} was {there[key].get(k)!r}, not {plan[key][k]!r}" for k in names)
        elif key == "steps":
            what = f"its steps were {', '.join(there[key])}"
        else:
            what = "the files of its input have changed since"
        raise InputError(f"{workdir} holds another curation: {what}. Give another --workdir.")

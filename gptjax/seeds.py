"""A stage run with several seeds, and the mean of their metrics with its standard error."""

import json
from collections.abc import Callable, Sequence

import numpy as np
from ml_collections import config_dict as mlc

from gptjax import json_files, paths
from gptjax.distributed import hosts


def each_seed(stage: Callable, config: mlc.ConfigDict, workdir, seeds: Sequence[int]) -> dict | None:
    """Runs the stage, which writes a results.json, in workdir/seedN for each seed. Returns the metrics over the seeds,
    {split: {metric: {'mean', 'stderr', 'values'}}}, which it writes to workdir/results.json; None after SIGTERM or
    Ctrl-C. The same call resumes.

    stage: (config, workdir) -> RunResult.
    """
    workdir, results = paths.local(workdir), []
    for seed in seeds:
        c = config.copy_and_resolve_references()
        c.seed = seed
        if not stage(c, workdir / f"seed{seed}").finished:
            return None
        results.append(json.loads((workdir / f"seed{seed}" / "results.json").read_text()))
    found: dict = {"seeds": list(seeds)}
    for split in ("validation", "test"):
        of_split = [r[split] for r in results if split in r]
        if of_split:
            found[split] = {k: over_seeds([r[k] for r in of_split]) for k in of_split[0]}
    if hosts.first():
        json_files.write_json(workdir / "results.json", found)
        for split in (s for s in ("validation", "test") if s in found):
            shown = (f"{k.replace('_', ' ')} {v['mean']:.4f}{_spread(v['stderr'])}" for k, v in found[split].items())
            print(f"{split}, {len(seeds)} seeds, mean ± standard error: {', '.join(shown)}")
    return found


def over_seeds(values: Sequence[float]) -> dict:
    """Mean, its standard error (None for a single value), and the values."""
    stderr = float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "stderr": stderr, "values": list(values)}


def _spread(stderr: float | None) -> str:
    return "" if stderr is None else f" ± {stderr:.4f}"

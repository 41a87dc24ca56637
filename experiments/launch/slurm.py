"""GPUs under SLURM: writes an sbatch file and submits it.

    python -m experiments.launch.slurm --name=gpt2 --nodes=2 --gpus_per_node=8 --time=24:00:00 --partition=gpu \\
        --dry_run -- gptjax.pretrain --config=configs/gpt2.py:1558m --workdir=/scratch/me/gpt2 \\
        --config.data.source=/scratch/me/text --config.mesh.fsdp=-1

--dry_run prints the file. Run it in a checkout on a file system that every node sees, with its environment made:
`python3 -m venv .venv && .venv/bin/pip install -r requirements.txt 'jax[cuda12]'`. JAX finds the other processes by
SLURM's own variables. Before the time is up the run is told to save, and the job puts itself into the queue again,
where the same command resumes from the checkpoint; a job that is preempted or loses a node does so too.
"""

import argparse
import shlex

from experiments.launch import job
from gptjax.errors import InputError

PROGRAMS = {"sbatch": "run this on a login node of a SLURM cluster"}
WARNING = 300  # seconds before the end: a checkpoint is written in them

SBATCH = """\
#!/bin/bash
# {devices} GPUs, {processes}
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node={tasks}
#SBATCH --gpus-per-node={gpus}
#SBATCH --cpus-per-task={cpus}
#SBATCH --time={time}
#SBATCH --output={name}-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@{warning}
{optional}set -uo pipefail

# Every task sees all GPUs of its node, and JAX gives it its own: GPUs that SLURM binds to a task would all be number 0.
{environment}srun --kill-on-bad-exit=1 --gpu-bind=none {run} &
running=$!

time_is_up() {{  # the run saves and ends, and the job begins again where it was
  scancel --signal=TERM "$SLURM_JOB_ID.0"
  wait "$running"
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
}}
trap time_is_up USR1
code=0
wait "$running" || code=$?
if [[ $code = {lost} || $code = 134 ]] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {tries} ]; then  # a host was lost
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


def make(argv: list[str]):
    p = job.parser(__doc__, prog="python -m experiments.launch.slurm")
    p.add_argument("--nodes", type=int, default=1)
    p.add_argument("--gpus_per_node", type=int, required=True)
    p.add_argument("--process_per", choices=("gpu", "node"), default="gpu", help="one process for each of them")
    p.add_argument("--cpus_per_gpu", type=int, default=8)
    p.add_argument("--time", required=True, help="as 24:00:00, of one stay in the queue's machines")
    p.add_argument("--partition")
    p.add_argument("--account")
    p.add_argument("--python", default=".venv/bin/python", help="with the packages, on a shared file system")
    a, run = job.parse(p, argv)
    file = sbatch(a, run)
    if a.dry_run:
        return a, file, PROGRAMS
    return a, f"sbatch <<'END_OF_SBATCH_FILE'\n{file}END_OF_SBATCH_FILE\n", PROGRAMS


def sbatch(a: argparse.Namespace, run: job.Job) -> str:
    if min(a.nodes, a.gpus_per_node, a.cpus_per_gpu) < 1:
        raise InputError("--nodes, --gpus_per_node and --cpus_per_gpu are at least 1.")
    run.check(a.nodes * a.gpus_per_node, keeps_disk=True)  # a file system that every node sees
    for name, value in (("time", a.time), ("partition", a.partition), ("account", a.account)):
        if value and (value.split() != [value] or value.startswith("-")):
            raise InputError(f"--{name}={value}: one word, as sbatch takes it.")
    per_node = a.process_per == "node"
    tasks = 1 if per_node else a.gpus_per_node
    devices = ",".join(map(str, range(a.gpus_per_node)))
    return SBATCH.format(
        devices=a.nodes * a.gpus_per_node, processes=f"one process for each {a.process_per}", name=a.name,
        nodes=a.nodes, tasks=tasks, gpus=a.gpus_per_node, cpus=a.cpus_per_gpu * a.gpus_per_node // tasks, time=a.time,
        warning=WARNING, lost=job.LOST, tries=20, run=run.shell(shlex.quote(a.python)),
        optional="".join(f"#SBATCH --{k}={v}\n" for k in ("partition", "account") if (v := getattr(a, k))),
        environment=f"export JAX_LOCAL_DEVICE_IDS={devices}\n" if per_node else "",
    )  # fmt: skip


if __name__ == "__main__":
    job.main(make)

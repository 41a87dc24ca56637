"""TPU slices of a GKE cluster, through XPK: one slice or several over DCN.

    python -m experiments.launch.gke --name=gpt3 --project=MINE --zone=us-east5-a --cluster=tpus \\
        --accelerator=v5p-1024 --slices=2 --dry_run -- gptjax.pretrain --config=configs/gpt3.py:175b \\
        --workdir=gs://BUCKET/gpt3 --config.data.source=gs://BUCKET/text --config.data.cache=/tmp/tokens \\
        --config.mesh.dcn_data=2 --config.mesh.data=2 --config.batch_size=1664 --config.microbatch_size=128

Run it in the checkout: XPK puts the folder into the image (`pip install xpk`; the cluster is made with `xpk cluster
create`). The packages are installed when a pod starts, unless --docker_image names an image that has them and the
code. A pod that is taken away is started again, at most --max_restarts times, and resumes from the last checkpoint.
"""

import argparse
import shlex

from experiments.launch import accelerators, job
from gptjax.errors import InputError

PROGRAMS = {"xpk": "`pip install xpk`", "gcloud": "install the Google Cloud CLI (cloud.google.com/sdk)"}
BASE_IMAGE = "python:3.12"
GRACE = 300  # seconds between SIGTERM and SIGKILL: a checkpoint is written in them


def make(argv: list[str]):
    p = job.parser(__doc__, prog="python -m experiments.launch.gke")
    p.add_argument("--project", help="of Google Cloud; default: $CLOUDSDK_CORE_PROJECT")
    p.add_argument("--zone", required=True, help="of the cluster")
    p.add_argument("--cluster", required=True, help="an XPK cluster")
    p.add_argument("--accelerator", required=True, help="of one slice: v5litepod-16, v6e-16, v5p-1024, tpu7x-128, ...")
    p.add_argument("--slices", type=int, default=1, help="above 1: multislice, joined by the data-center network")
    p.add_argument("--spot", action="store_true", help="on an autoprovisioning cluster: cheaper, may be taken away")
    p.add_argument("--docker_image", help="with the code and its packages; default: built from this folder")
    p.add_argument("--max_restarts", type=int, default=job.TRIES)
    a, run = job.parse(p, argv)
    return a, script(a, run), PROGRAMS


def script(a: argparse.Namespace, run: job.Job) -> str:
    machine = accelerators.parse(a.accelerator)
    if a.slices < 1 or a.max_restarts < 0:
        raise InputError(f"--slices={a.slices} --max_restarts={a.max_restarts}: at least 1 and 0.")
    devices = machine.devices * a.slices
    run.check(devices, keeps_disk=False, slices=a.slices)
    # exec: SIGTERM, which XPK hands to its child, must reach Python for the run to save
    command = f"exec {run.shell('python')}"
    image = [f"--docker-image={a.docker_image}"]
    if not a.docker_image:
        image = [f"--base-docker-image={BASE_IMAGE}", "--script-dir=."]
        command = f'pip install -q -r requirements.txt "jax[tpu]" gcsfs && {command}'
    create = [
        "xpk", "workload", "create", f"--workload={a.name}", f"--project={job.project_of(a)}", f"--zone={a.zone}",
        f"--cluster={a.cluster}", f"--tpu-type={a.accelerator}", f"--num-slices={a.slices}", *image,
        f"--max-restarts={a.max_restarts}", f"--restart-on-exit-codes={job.LOST},134",
        f"--termination-grace-period-seconds={GRACE}",
        *(["--spot"] if a.spot else []), f"--command={command}",
    ]  # fmt: skip
    files = [f"{run.workdir.rstrip('/')}/{file}" for file in ("report.html", "metrics.jsonl")]
    return f"""\
#!/usr/bin/env bash
# {a.name}: {a.slices} x {a.accelerator} of the cluster {a.cluster}, {devices} devices
# its log and its end: xpk workload list, or the address that this prints; then
#   {shlex.join(["gcloud", "storage", "cp", *files, "."])}
set -euo pipefail
{shlex.join(create)}
"""


if __name__ == "__main__":
    job.main(make)

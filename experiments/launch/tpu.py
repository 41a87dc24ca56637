"""One Cloud TPU VM, a pod slice, or several slices over DCN: create, install, run, fetch the report, delete.

    python -m experiments.launch.tpu --name=gpt2 --project=MINE --zone=us-west4-a --accelerator=v5litepod-16 --spot \\
        --dry_run -- gptjax.pretrain --config=configs/gpt2.py:1558m --workdir=gs://BUCKET/gpt2 \\
        '--config.data.source=gs://BUCKET/text/*.jsonl' --config.data.cache=/tmp/tokens --config.mesh.fsdp=-1

--dry_run prints the script that this would run, and nothing happens. The TPU is asked for through a queue: the script
waits until there is one. When it is taken away (spot) or the connection breaks, the script gets another and gives the
same command again, which resumes from the last checkpoint. So does the script itself when it is started again: it
takes the TPU that is there. A run that fails leaves its TPU up to be looked at, and says that it costs money.
Several hosts at once need your key in ssh-agent: `ssh-add ~/.ssh/google_compute_engine`.
"""

import argparse
import posixpath
import shlex

from experiments.launch import accelerators, job
from gptjax.errors import InputError

STEPS = ("create", "install", "run", "fetch", "delete")
RESULTS = ("report.html", "metrics.jsonl", "config.json")
GRACE = 300  # seconds in which an earlier start that is told to stop writes its checkpoint
PYTHON = "3.12"  # TPU VMs come with an older one; uv brings this
PROGRAMS = {
    "gcloud": "install the Google Cloud CLI (cloud.google.com/sdk) and run `gcloud auth login`",
    "git": "install git",
}

SCRIPT = """\
#!/usr/bin/env bash
# {name}: {machine} in {zone}, {hosts} hosts, {devices} devices
set -euo pipefail

state() {{  # ACTIVE, WAITING_FOR_RESOURCES, SUSPENDED, ...; nothing where there is no such TPU
  {list}
}}

create() {{  # asks for a TPU, or takes the one that is there, and waits until it is up
  local now
  now=$(state)
  case "$now" in FAILED | SUSPEND*) delete; now= ;; esac
  if [ -z "$now" ]; then
    {create}
  fi
  until now=$(state); [ "$now" = ACTIVE ]; do
    case "$now" in FAILED | SUSPEND*) echo "no TPU was given: $now" >&2; return 1 ;; esac
    echo "{name}: ${{now:-asked for}}"
    sleep 30
  done
}}

install() {{  # the code, and Python {python} with its packages, on every host
  for _ in 1 2 3 4 5 6 7 8 9 10; do  # a machine that has just come up does not answer yet
    {hello} && break
    sleep 15
  done
  {ship}
  {install}
}}

run() {{  # the same command on every host: JAX finds the others
  {run}
}}

fetch() {{  # what is looked at first; the checkpoints stay where they are
  mkdir -p {results}
  {fetch}
}}

delete() {{
  {delete}
}}

leave() {{
  echo {name} 'may still be there, and costs money while it is. To be rid of it:' >&2
  echo {bill} >&2
}}
trap leave EXIT

"""

ENSURE_COMMITTED = """\
if [ -n "$(git status --porcelain)" ]; then
  echo 'What goes there is the last commit, and files here are not in it: commit them first.' >&2
  exit 1
fi
"""

RUN = """\
tries=0
while true; do
  code=0
  run || code=$?
  sleep {settle}  # by then a TPU that is being taken away says so
  until now=$(state); do sleep 60; done  # no network here: wait for it
  if [ "$now" != ACTIVE ]; then
    echo "{name} was taken away (${{now:-gone}}): asking for another"
    create
    install
  elif [[ $code = 255 || $code = {lost} || $code = 134 ]] && [ $((tries += 1)) -le {tries} ]; then
    echo "the connection or a host was lost: taking the run up again"
  else
    break
  fi
done
[ "$code" = 0 ] || exit "$code"
"""


def make(argv: list[str]):
    p = job.parser(__doc__, prog="python -m experiments.launch.tpu")
    p.add_argument("--project", help="of Google Cloud; default: $CLOUDSDK_CORE_PROJECT")
    p.add_argument("--zone", required=True, help="as us-west4-a; it must have the accelerator")
    p.add_argument("--accelerator", required=True, help="of one slice: v5litepod-8, v6e-16, v5p-1024, ...")
    p.add_argument("--slices", type=int, default=1, help="above 1: multislice, joined by the data-center network")
    p.add_argument("--spot", action="store_true", help="cheaper, and may be taken away at any time")
    p.add_argument("--runtime_version", help="of the TPU's software; default: its generation's")
    p.add_argument("--repository", help="a git URL that the hosts clone; default: the last commit here is copied")
    p.add_argument("--ref", default="HEAD", help="of --repository: a branch, a tag or a commit")
    p.add_argument("--results", default="runs", help="the folder here that the report is fetched into")
    p.add_argument("--steps", default=",".join(STEPS), help="which of them to do")
    a, run = job.parse(p, argv)
    return a, script(a, run), PROGRAMS


def script(a: argparse.Namespace, run: job.Job) -> str:
    machine = accelerators.parse(a.accelerator)
    if machine.runtime is None:
        raise InputError(f"{a.accelerator} is available only through GKE: use experiments.launch.gke.")
    if a.slices < 1:
        raise InputError(f"--slices={a.slices}: at least 1.")
    steps = a.steps.split(",")
    if unknown := [step for step in steps if step not in STEPS]:
        raise InputError(f"--steps: there is no {unknown[0]!r}: {job.nearest(unknown[0], STEPS)}")
    devices, hosts = machine.devices * a.slices, machine.hosts * a.slices
    run.check(devices, keeps_disk=hosts == 1 and not a.spot, slices=a.slices)

    # The queue makes one slice and several alike; afterwards one is a tpu-vm to gcloud, and several are its nodes.
    where = [f"--project={job.project_of(a)}", f"--zone={a.zone}"]
    tpus = ["gcloud", "compute", "tpus"]
    queue = [*tpus, "queued-resources"]
    vms, everywhere = ([*tpus, "tpu-vm"], []) if a.slices == 1 else (queue, ["--node=all"])
    ssh = lambda command: shlex.join(
        [*vms, "ssh", a.name, *where, *everywhere, "--worker=all", f"--command={command}"]
    )  # fmt: skip
    nodes = [f"--node-id={a.name}"] if a.slices == 1 else [f"--node-count={a.slices}", f"--node-prefix={a.name}"]
    create = [
        *queue, "create", a.name, *where, *nodes, f"--accelerator-type={a.accelerator}",
        f"--runtime-version={a.runtime_version or machine.runtime}", *(["--spot"] if a.spot else []),
    ]  # fmt: skip
    delete = shlex.join([*queue, "delete", a.name, *where, "--force", "--quiet"])

    if a.repository:
        ship = ssh(
            f"(test -d gptjax || git clone -q {shlex.quote(a.repository)} gptjax) && cd gptjax && "
            f"git fetch -q origin {shlex.quote(a.ref)} && git checkout -q FETCH_HEAD"
        )
    else:
        archive = f"/tmp/{a.name}.tar.gz"
        copy = [*vms, "scp", archive, f"{a.name}:gptjax.tar.gz", *where, *everywhere, "--worker=all"]
        ship = "\n  ".join([
            shlex.join(["git", "archive", "--format=tar.gz", f"--output={archive}", "HEAD"]),
            shlex.join(copy),
            ssh("mkdir -p gptjax && tar -xzf gptjax.tar.gz -C gptjax"),
        ])  # fmt: skip
    results = posixpath.join(a.results, a.name, "")
    if run.remote_workdir:
        fetch = ["gcloud", "storage", "cp", *(f"{run.workdir.rstrip('/')}/{file}" for file in RESULTS), results]
    else:
        there = [f"{a.name}:{posixpath.join('gptjax', run.workdir, file)}" for file in RESULTS]
        fetch = [*vms, "scp", *there, results, *where]

    text = SCRIPT.format(
        name=a.name, zone=a.zone, hosts=hosts, devices=devices, python=PYTHON,
        machine=(f"{a.slices} slices of " if a.slices > 1 else "") + a.accelerator + (", spot," if a.spot else ""),
        list=shlex.join([*queue, "list", *where, f"--filter=name~(^|/){a.name}$", "--format=value(state.state)"]),
        create=shlex.join(create), hello=ssh("true"), ship=ship, install=ssh(_install()), run=ssh(_run(run)),
        results=shlex.quote(results), fetch=shlex.join(fetch), delete=delete, bill=shlex.quote(f"  {delete}"),
    )  # fmt: skip
    if "install" in steps and not a.repository:
        text += ENSURE_COMMITTED
    for step in STEPS:
        if step in steps:
            text += _again(a) if step == "run" else f"{step}\n"
    return text + ("trap - EXIT\n" if "delete" in steps else "")


def _again(a: argparse.Namespace) -> str:
    return RUN.format(name=a.name, settle=60 if a.spot else 5, lost=job.LOST, tries=job.TRIES)


def _install() -> str:
    return (
        "(test -x ~/.local/bin/uv || curl -LsSf https://astral.sh/uv/install.sh | sh) && "
        f"~/.local/bin/uv venv -q --allow-existing --python {PYTHON} gptjax-env && "
        "~/.local/bin/uv pip install -q --python gptjax-env/bin/python "
        '-r gptjax/requirements.txt "jax[tpu]" gcsfs'
    )


def _run(run: job.Job) -> str:
    """An earlier start whose connection broke is told to save and to go first: a TPU serves one process."""
    return (
        'cd gptjax; old=$(cat run.pid 2>/dev/null); if [ -n "$old" ] && kill "$old" 2>/dev/null; '
        f'then timeout {GRACE} tail --pid="$old" -f /dev/null || kill -9 "$old"; fi; echo $$ > run.pid; '
        f"exec {run.shell('../gptjax-env/bin/python')}"
    )


if __name__ == "__main__":
    job.main(make)

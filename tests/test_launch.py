"""Launchers: what is printed is a shell script with the right commands, and it does the right thing when run.

Run with stand-ins for gcloud, srun and the like on the PATH: they note their arguments and say what the test has
written down for them.
"""

import importlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.launch import accelerators, gke, job, slurm, tpu
from gptjax.errors import InputError

ROOT = Path(__file__).resolve().parent.parent
RUN = [
    "--", "gptjax.pretrain", "--config=configs/gpt2.py:1558m", "--workdir=gs://bucket/gpt2",
    "--config.data.source=gs://bucket/te xt's/*.jsonl", "--config.data.cache=/tmp/tokens", "--config.mesh.fsdp=-1",
]  # fmt: skip
CLOUD = ["--name=gpt2", "--project=mine", "--zone=us-west4-a", "--accelerator=v5litepod-16"]
GKE = [*CLOUD, "--cluster=tpus"]
SLURM = ["--name=gpt2", "--nodes=2", "--gpus_per_node=8", "--time=24:00:00"]
LAUNCHERS = {
    "vm": (tpu, ["--name=gpt2", "--project=mine", "--zone=us-west4-a", "--accelerator=v5litepod-8"]),
    "pod": (tpu, [*CLOUD, "--spot"]),
    "multislice": (tpu, [*CLOUD, "--slices=2"]),
    "clone": (tpu, [*CLOUD, "--repository=https://example.org/x y.git", "--ref=v1"]),
    "gke": (gke, [*GKE, "--slices=2"]),
    "image": (gke, [*GKE, "--docker_image=gcr.io/mine/gptjax"]),
    "slurm": (slurm, [*SLURM, "--partition=gpu"]),
    "slurm-node": (slurm, [*SLURM, "--process_per=node"]),
}


def run_on(options) -> list[str]:
    """RUN, told of its slices."""
    return [*RUN, "--config.mesh.dcn_data=2", "--config.mesh.data=2"] if "--slices=2" in options else RUN


def dry_run(launcher, options, run=None) -> str:
    return launcher.make([*options, "--dry_run", *(run or run_on(options))])[1]


def commands(script: str, program: str) -> list[list[str]]:
    """The words of each line of a script that begins with a program, an `&` or `&& break` at its end left out."""
    lines = [line.strip() for line in script.splitlines()]
    lines = [line.removesuffix("&& break").removesuffix("&") for line in lines if line.startswith(f"{program} ")]
    return [shlex.split(line) for line in lines]


def remote(words: list[str]) -> str:
    """What an ssh or a workload runs there."""
    return next(word.removeprefix("--command=") for word in words if word.startswith("--command="))


def trained(shell: str) -> list[str]:
    """The words after `python -m` in a line of shell, as the shell there would split them."""
    return shlex.split(shell[shell.index("-m gptjax.pretrain") :])[1:]


@pytest.mark.parametrize("name", LAUNCHERS)
def test_what_is_printed_is_shell_and_is_the_same_each_time(name):
    launcher, options = LAUNCHERS[name]
    script = dry_run(launcher, options)
    assert script == dry_run(launcher, options)
    checked = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
    assert checked.returncode == 0 and not checked.stderr, checked.stderr
    for line in script.splitlines():
        if line.strip().startswith(("gcloud", "xpk", "srun")):
            shlex.split(line)


@pytest.mark.parametrize("name", ["vm", "pod", "multislice", "clone"])
def test_the_run_arrives_at_a_tpu_word_for_word(name):
    launcher, options = LAUNCHERS[name]
    last = [words for words in commands(dry_run(launcher, options), "gcloud") if "ssh" in words][-1]
    assert trained(remote(last)) == run_on(options)[1:]


def test_the_run_arrives_at_gke_and_slurm_word_for_word():
    for name in ("gke", "image"):
        (create,) = commands(dry_run(*LAUNCHERS[name]), "xpk")
        assert trained(remote(create)) == run_on(LAUNCHERS[name][1])[1:]
    (srun,) = commands(dry_run(*LAUNCHERS["slurm"]), "srun")
    assert srun[-len(RUN) + 1 :] == RUN[1:] and srun[-len(RUN) - 1 : -len(RUN) + 1] == [".venv/bin/python", "-m"]


def test_environment_variables_reach_the_run_unharmed():
    value = "--xla_a=1 --xla_b='$HOME'"
    for launcher, options in (LAUNCHERS["gke"], LAUNCHERS["pod"]):
        script = dry_run(launcher, [*options, f"--env=LIBTPU_INIT_ARGS={value}"])
        words = (commands(script, "xpk") or [w for w in commands(script, "gcloud") if "ssh" in w])[-1]
        there = subprocess.run(
            ["bash", "-c", re.sub(r".*exec (.*) \S*python -m .*", r"\1 printenv LIBTPU_INIT_ARGS", remote(words))],
            capture_output=True, text=True,
        )  # fmt: skip
        assert there.stdout == value + "\n"


def test_a_pod_slice_is_asked_for_and_all_its_workers_are_spoken_to():
    gcloud = commands(dry_run(*LAUNCHERS["pod"]), "gcloud")
    (create,) = [w for w in gcloud if "create" in w]
    assert create[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "gpt2"]
    assert {
        "--project=mine", "--zone=us-west4-a", "--node-id=gpt2", "--accelerator-type=v5litepod-16",
        "--runtime-version=v2-alpha-tpuv5-lite", "--spot",
    } == set(create[6:])  # fmt: skip
    there = [w for w in gcloud if "ssh" in w or "scp" in w]
    assert len(there) == 5  # hello, the code in two steps, the packages, the run
    assert all(w[3] == "tpu-vm" and "--worker=all" in w and "--node=all" not in w for w in there)
    assert "16 devices" in dry_run(*LAUNCHERS["pod"]) and "4 hosts" in dry_run(*LAUNCHERS["pod"])


def test_several_slices_are_one_queued_resource_and_all_its_nodes_are_spoken_to():
    script = dry_run(*LAUNCHERS["multislice"])
    gcloud = commands(script, "gcloud")
    (create,) = [w for w in gcloud if "create" in w]
    assert {"--node-count=2", "--node-prefix=gpt2"} < set(create) and "--spot" not in create
    there = [w for w in gcloud if "ssh" in w or "scp" in w]
    assert all(w[3] == "queued-resources" and {"--worker=all", "--node=all"} < set(w) for w in there)
    assert "32 devices" in script and "8 hosts" in script


def test_only_the_steps_asked_for_are_done():
    script = dry_run(tpu, [*CLOUD, "--steps=run,fetch"])
    done = script[script.index("trap leave EXIT") :].splitlines()
    assert "create" not in done and "install" not in done and "delete" not in done and "trap - EXIT" not in done
    assert "  run || code=$?" in done and done[-1] == "fetch"


def test_a_local_workdir_is_fetched_from_the_machine():
    run = ["--", "gptjax.pretrain", "--config=configs/demo.py", "--workdir=runs/demo"]
    words = next(w for w in commands(dry_run(tpu, LAUNCHERS["vm"][1], run), "gcloud") if w[-3] == "runs/gpt2/")
    assert words[3:6] == ["tpu-vm", "scp", "gpt2:gptjax/runs/demo/report.html"]


def test_a_workload_has_its_slices_its_restarts_and_time_to_save():
    (create,) = commands(dry_run(*LAUNCHERS["gke"]), "xpk")
    assert create[:3] == ["xpk", "workload", "create"]
    assert {
        "--workload=gpt2", "--cluster=tpus", "--project=mine", "--zone=us-west4-a", "--tpu-type=v5litepod-16",
        "--num-slices=2", "--script-dir=.", "--max-restarts=20", "--restart-on-exit-codes=75,134",
        "--termination-grace-period-seconds=300",
    } < set(create)  # fmt: skip
    assert '"jax[tpu]"' in remote(create) and " && exec python -m gptjax.pretrain" in remote(create)
    (create,) = commands(dry_run(*LAUNCHERS["image"]), "xpk")
    assert "--docker-image=gcr.io/mine/gptjax" in create and remote(create).startswith("exec python -m")


def test_the_header_of_an_sbatch_file():
    def header(text):
        return dict(re.findall(r"^#SBATCH --([a-z-]+)=?(\S*)$", text, re.MULTILINE))

    script = dry_run(*LAUNCHERS["slurm"])
    assert header(script) == {
        "job-name": "gpt2", "nodes": "2", "ntasks-per-node": "8", "gpus-per-node": "8", "cpus-per-task": "8",
        "time": "24:00:00", "output": "gpt2-%j.log", "open-mode": "append", "requeue": "", "signal": "B:USR1@300",
        "partition": "gpu",
    }  # fmt: skip
    last = max(i for i, line in enumerate(script.splitlines()) if line.startswith("#SBATCH"))
    assert not any(
        line and not line.startswith("#") for line in script.splitlines()[:last]
    )  # sbatch stops reading there
    assert "JAX_LOCAL_DEVICE_IDS" not in script
    script = dry_run(*LAUNCHERS["slurm-node"])
    assert header(script)["ntasks-per-node"] == "1" and header(script)["cpus-per-task"] == "64"
    assert "\nexport JAX_LOCAL_DEVICE_IDS=0,1,2,3,4,5,6,7\n" in script


# --- run, with stand-ins for the programs they call -----------------------------------------------------------


@pytest.fixture
def stand_ins(tmp_path):
    """A folder that goes before the PATH, and a function that puts programs into it."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def put(name, text):
        (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (folder / name).chmod(0o755)

    put("sleep", "exit 0")
    put("git", f'echo "git $*" >> {tmp_path}/said')
    put.log = lambda: (tmp_path / "said").read_text().splitlines()
    put.environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
    put.folder = tmp_path
    return put


def play(stand_ins, states, codes, options=("--spot",)):
    """Runs the pod's script against a gcloud whose states and whose run's exit codes are given, one for each call.

    Returns (the finished process, what was done in order).
    """
    folder = stand_ins.folder
    (folder / "states").write_text("".join(f"{s}\n" for s in states))
    (folder / "codes").write_text("".join(f"{c}\n" for c in codes))
    stand_ins(
        "gcloud",
        f"""cd {folder}
take() {{ head -n 1 $1; sed -i 1d $1; }}
case "$*" in
  *" list "*) take states ;;
  *"-m gptjax.pretrain"*) echo run >> said; exit $(take codes) ;;
  *" ssh "*"--command=true") echo hello >> said ;;
  *" ssh "*"uv pip"*) echo packages >> said ;;
  *" ssh "*) ;;
  *" scp "*) echo copy >> said ;;
  *"storage cp"*) echo fetch >> said ;;
  *" create "*) echo create >> said ;;
  *" delete "*) echo delete >> said ;;
esac""",
    )
    script = dry_run(tpu, [*CLOUD, *options, f"--results={folder}/results"])
    done = subprocess.run(
        ["bash", "-c", script], env=stand_ins.environment, capture_output=True, text=True, timeout=60, cwd=folder
    )
    return done, [line for line in stand_ins.log() if not line.startswith(("git", "hello", "copy"))]


UP = ["create", "packages", "run"]


def test_a_run_from_nothing_to_its_report(stand_ins):
    done, did = play(stand_ins, ["", "WAITING_FOR_RESOURCES", "ACTIVE", "ACTIVE"], [0])
    assert done.returncode == 0 and did == [*UP, "fetch", "delete"]
    assert "costs money" not in done.stderr
    assert [line for line in stand_ins.log() if line.startswith("git")] == [
        "git status --porcelain", "git archive --format=tar.gz --output=/tmp/gpt2.tar.gz HEAD"
    ]  # fmt: skip


def test_a_tpu_that_is_taken_away_is_replaced_and_the_run_goes_on(stand_ins):
    """Whatever code the connection ended with: a run that was told to stop and saved ends with 0."""
    for code in (255, 0, 75, 1):
        (stand_ins.folder / "said").unlink(missing_ok=True)
        states = ["", "ACTIVE", "SUSPENDED", "SUSPENDED", "ACTIVE", "ACTIVE"]
        done, did = play(stand_ins, states, [code, 0])
        assert done.returncode == 0 and did == [*UP, "delete", *UP, "fetch", "delete"]


def test_a_broken_connection_or_a_lost_host_is_taken_up_again_on_the_same_tpu(stand_ins):
    done, did = play(stand_ins, ["", *["ACTIVE"] * 4], [255, 75, 0])
    assert done.returncode == 0 and did == [*UP, "run", "run", "fetch", "delete"]


def test_a_run_that_fails_again_and_again_is_given_up(stand_ins):
    done, did = play(stand_ins, ["", *["ACTIVE"] * 40], [75] * 40)
    assert done.returncode == 75 and did.count("run") == 1 + 20


def test_a_run_that_fails_leaves_its_tpu_and_says_so(stand_ins):
    done, did = play(stand_ins, ["", "ACTIVE", "ACTIVE"], [2])
    assert done.returncode == 2 and did == UP
    assert "costs money" in done.stderr
    assert "queued-resources delete gpt2 --project=mine --zone=us-west4-a --force --quiet" in done.stderr


def test_started_again_it_takes_the_tpu_that_is_there(stand_ins):
    done, did = play(stand_ins, ["ACTIVE"] * 3, [0])
    assert done.returncode == 0 and did == ["packages", "run", "fetch", "delete"]


def test_no_capacity_is_an_error_and_not_a_wait_without_end(stand_ins):
    done, did = play(stand_ins, ["", "FAILED"], [])
    assert done.returncode == 1 and did == ["create"] and "no TPU was given: FAILED" in done.stderr


def test_changes_that_are_not_committed_are_not_left_behind_silently(stand_ins):
    stand_ins("git", f'echo "git $*" >> {stand_ins.folder}/said; [ "$1" != status ] || echo "?? new.py"')
    done, did = play(stand_ins, [], [])
    assert done.returncode == 1 and did == [] and "commit them first" in done.stderr


def test_the_second_start_on_a_host_waits_until_the_first_has_saved(stand_ins):
    """A connection that broke leaves its process: it gets SIGTERM, and the new one begins when it is gone."""
    folder = stand_ins.folder
    (folder / "gptjax").mkdir()
    (folder / "gptjax-env" / "bin").mkdir(parents=True)
    python = folder / "gptjax-env" / "bin" / "python"
    trap = "trap 'echo saved $1 >> ../said; exit 0' TERM"
    python.write_text(f'#!/bin/bash\nset -- "${{@: -1}}"\n{trap}\necho began $1 >> ../said\n'
                      "while [ $1 = --n=1 ]; do /bin/sleep 0.05; done\n")  # fmt: skip
    python.chmod(0o755)
    here = lambda n: tpu._run(job.Job(("gptjax.pretrain", f"--n={n}")))
    first = subprocess.Popen(["bash", "-c", here(1)], cwd=folder)
    deadline = time.monotonic() + 30
    while not ((folder / "said").exists() and "began" in (folder / "said").read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    second = subprocess.Popen(["bash", "-c", here(2)], cwd=folder)
    assert first.wait(timeout=30) == 0 and second.wait(timeout=30) == 0
    assert stand_ins.log() == ["began --n=1", "saved --n=1", "began --n=2"]


def test_a_slurm_job_saves_and_queues_again_when_its_time_is_up(stand_ins):
    folder = stand_ins.folder
    stand_ins("srun", f"trap 'echo saved >> {folder}/said; exit 0' TERM\necho $$ > {folder}/pid\n"
                      "while true; do /bin/sleep 0.05; done")  # fmt: skip
    stand_ins("scancel", f'echo "scancel $*" >> {folder}/said; kill -TERM $(cat {folder}/pid)')
    stand_ins("scontrol", f'echo "scontrol $*" >> {folder}/said')
    batch = subprocess.Popen(
        ["bash", "-c", dry_run(*LAUNCHERS["slurm"])], env={**stand_ins.environment, "SLURM_JOB_ID": "7"}
    )
    deadline = time.monotonic() + 30
    while not (folder / "pid").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.3)
    batch.send_signal(signal.SIGUSR1)
    assert batch.wait(timeout=30) == 0
    assert stand_ins.log() == ["scancel --signal=TERM 7.0", "saved", "scontrol requeue 7"]


def test_a_slurm_job_ends_with_the_code_of_its_run_and_does_not_queue_again(stand_ins):
    stand_ins("srun", "exit 2")
    done = subprocess.run(["bash", "-c", dry_run(*LAUNCHERS["slurm"])], env=stand_ins.environment)
    assert done.returncode == 2 and not (stand_ins.folder / "said").exists()


def test_sbatch_is_given_the_very_file_that_was_printed(stand_ins):
    stand_ins("sbatch", f"cat > {stand_ins.folder}/given")
    options = LAUNCHERS["slurm"][1]
    subprocess.run(
        [sys.executable, "-m", "experiments.launch.slurm", *options, *RUN], check=True, cwd=ROOT,
        env=stand_ins.environment,
    )  # fmt: skip
    assert (stand_ins.folder / "given").read_text() == dry_run(*LAUNCHERS["slurm"])


# --- what the documentation says ------------------------------------------------------------------------------


def documented() -> list[list[str]]:
    """The words of every launcher's command in WORKSPACE.md and in the launchers' own docstrings."""
    text = (ROOT / "WORKSPACE.md").read_text() + "\n\n" + "\n\n".join(m.__doc__ for m in (tpu, gke, slurm))
    found = re.findall(r"^ *python -m (experiments\.launch\.(?:.*\\\n)*.*)$", text, re.MULTILINE)
    return [shlex.split(command.replace("\\\n", " ")) for command in found]


@pytest.mark.parametrize("words", documented(), ids=lambda words: " ".join(words[:2]))
def test_documented_recipes_are_accepted_and_their_mesh_takes_their_batch(words):
    from gptjax import config as configs
    from gptjax.parallel.mesh import check_fits
    from gptjax.pretrain import PretrainConfig

    launcher = {m.__name__: m for m in (tpu, gke, slurm)}[words[0]]
    script = launcher.make(words[1:])[1]
    assert "--dry_run" in words and words[words.index("--") + 1] == "gptjax.pretrain"
    devices = int(re.search(r"(\d+) (devices|GPUs)", script)[1])

    run = words[words.index("--") + 2 :]
    file, _, size = next(w.partition("=")[2] for w in run if w.startswith("--config=")).partition(":")
    c = importlib.import_module(file.removesuffix(".py").replace("/", ".")).get_config(size)
    for key, value in re.findall(r"^--config\.([a-z_.]+)=(.*)$", "\n".join(run), re.MULTILINE):
        c.update_from_flattened_dict({key: int(value) if re.fullmatch(r"-?\d+", value) else value})
    c = configs.build(PretrainConfig, c)
    sizes = c.mesh.sizes(devices)
    check_fits(sizes, n_head=c.model.n_head, batch_size=c.batch_size, microbatch_size=c.microbatch_rows)


def test_every_kind_of_machine_has_its_recipe():
    kinds = [(words[0].rpartition(".")[2], any(w.startswith("--slices") for w in words)) for words in documented()]
    assert {("tpu", False), ("tpu", True), ("gke", True), ("slurm", False)} <= set(kinds)
    assert "experiments/colab/quickstart.ipynb" in (ROOT / "WORKSPACE.md").read_text()


# --- accelerators ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, chips, hosts, devices",
    [
        ("v2-8", 4, 1, 8), ("v3-32", 16, 4, 32), ("v4-8", 4, 1, 4), ("v4-32", 16, 4, 16), ("v5p-8", 4, 1, 4),
        ("v5p-1024", 512, 128, 512), ("v5litepod-1", 1, 1, 1), ("v5litepod-8", 8, 1, 8), ("v5litepod-16", 16, 4, 16),
        ("v5litepod-256", 256, 64, 256), ("v6e-4", 4, 1, 4), ("v6e-64", 64, 16, 64), ("tpu7x-128", 64, 16, 128),
    ],
)  # fmt: skip
def test_slices(name, chips, hosts, devices):
    s = accelerators.parse(name)
    assert (s.chips, s.hosts, s.devices) == (chips, hosts, devices)


# --- bad input: one line, and what to do about it -------------------------------------------------------------


def changed(*options, **run):
    """CLOUD with options replaced or added, and the run with flags replaced, or dropped where None."""
    names = {o.split("=")[0] for o in options}
    words = [w for w in RUN if w.split("=")[0].removeprefix("--") not in {k.replace("__", ".") for k in run}]
    added = [f"--{k.replace('__', '.')}={v}" for k, v in run.items() if v is not None]
    return [*(o for o in CLOUD if o.split("=")[0] not in names), *options, *words, *added]


@pytest.mark.parametrize(
    "argv, message",
    [
        (changed("--accelerator=v5e-16"), "did you mean v5litepod-16"),
        (changed("--accelerator=v5litepod-12"), "comes in chips of 1, 4, 8, 16"),
        (changed("--accelerator=v5p-12"), "comes in cores of multiples of 8"),
        (changed("--accelerator=v6-8"), "did you mean v6e-8"),
        (changed("--accelerator=a100"), "there are v2, v3, v4"),
        (changed("--accelerator=tpu7x-128"), "only through GKE"),
        (changed("--slices=0"), "at least 1"),
        (changed("--slices=2"), "2 slices: .*--config.mesh.dcn_data=2"),
        (changed("--steps=create,instal"), "did you mean install"),
        (changed("--name=My TPU"), "lower-case letters"),
        (changed("--env=FLAGS"), "NAME=VALUE"),
        (changed(workdir="runs/x"), "gs://BUCKET/NAME"),
        (changed(workdir=None), "no --workdir"),
        (changed(config__data__cache=None), "--config.data.cache=/tmp/tokens"),
        (changed(config__mesh__tensor=3), "takes 3 devices and there are 16"),
        (changed(config__mesh__tensor=32), "takes 32 devices and there are 16"),
        (CLOUD, "No run given"),
        ([*CLOUD, "--", "--config=x"], "No run given"),
        ([*CLOUD, *RUN, "--x=a\nb"], "line break"),
    ],
)
def test_refusals_before_anything_costs_money(argv, message):
    with pytest.raises(InputError, match=message):
        tpu.make(argv)


def test_the_mesh_must_fill_the_devices_when_it_is_given_whole():
    whole = {"config__mesh__" + axis: 1 for axis in ("data", "tensor", "stage", "seq")}
    with pytest.raises(InputError, match="takes 8 devices and there are 16"):
        tpu.make(changed(**whole, config__mesh__fsdp=8))
    tpu.make(changed(**whole, config__mesh__fsdp=16))
    tpu.make(changed("--slices=2", **whole, config__mesh__fsdp=32, config__mesh__dcn_data=2))


def test_a_spot_machine_keeps_no_local_workdir():
    run = ["--", "gptjax.pretrain", "--workdir=runs/x"]
    one = ["--name=x", "--project=p", "--zone=z", "--accelerator=v5litepod-8"]
    tpu.make([*one, *run])
    with pytest.raises(InputError, match="taken away"):
        tpu.make([*one, "--spot", *run])
    with pytest.raises(InputError, match="taken away"):
        gke.make([*one, "--cluster=c", *run])
    slurm.make([*SLURM, *run])


def test_no_project(monkeypatch):
    monkeypatch.delenv("CLOUDSDK_CORE_PROJECT", raising=False)
    without = [o for o in CLOUD if not o.startswith("--project")]
    with pytest.raises(InputError, match="gcloud projects list"):
        tpu.make([*without, *RUN])
    monkeypatch.setenv("CLOUDSDK_CORE_PROJECT", "theirs")
    assert "--project=theirs" in dry_run(tpu, without)


def test_more_gpus_than_none_and_one_word_a_field():
    with pytest.raises(InputError, match="at least 1"):
        slurm.make([*SLURM, "--nodes=0", *RUN])
    with pytest.raises(InputError, match="one word"):
        slurm.make([*SLURM, "--partition=a b", *RUN])


@pytest.mark.parametrize("name, program", [("pod", "gcloud"), ("gke", "xpk"), ("slurm", "sbatch")])
def test_a_program_that_is_not_there_is_named_before_anything_runs(name, program, tmp_path):
    launcher, options = LAUNCHERS[name]
    done = subprocess.run(
        [sys.executable, "-m", launcher.__name__, *options, *run_on(options)], capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "PATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"error: {program} is not on the PATH") and done.stderr.count("\n") == 1


def test_the_launchers_need_no_package_but_python_itself():
    """They run on the laptop that has gcloud, which need not have JAX."""
    for name in ("pod", "gke", "slurm"):
        launcher, options = LAUNCHERS[name]
        script = subprocess.run(
            [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
             f"from {launcher.__name__} import make; print(make(sys.argv[1:])[1], end='')",
             *options, "--dry_run", *run_on(options)],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert script.stdout == dry_run(launcher, options)

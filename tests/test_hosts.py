"""Multi-host runs: finding the job, the handshake, a host that is lost, each host's rows, and real processes."""

import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from conftest import ROOT
from host_processes import Processes, assert_same_figures, free_port, hosts_config, read_config_file
from jax.sharding import NamedSharding, PartitionSpec
from runs import lines

from gptjax.distributed import handshake, hosts
from gptjax.errors import InputError
from gptjax.parallel.mesh import MeshConfig, make_mesh
from gptjax.parallel.sharding import batch_sharding
from gptjax.pretrain import pretrain
from gptjax.training.checkpoint import Checkpointer

# --- which job ----------------------------------------------------------------------------------------------

CLUSTER = ("JAX_", "SLURM_", "TPU_", "MEGASCALE_", "OMPI_", "KUBERNETES_", "JOB_COMPLETION")
SLURM = {
    "SLURM_JOB_ID": "77", "SLURM_STEP_NODELIST": "node[003-004]", "SLURM_NTASKS": "2", "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}  # fmt: skip
MANUAL = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "2"}


@pytest.fixture
def surroundings(monkeypatch):
    """Sets the environment to these variables only; the network must not be used."""
    import os

    for name in [name for name in os.environ if name.startswith(CLUSTER)]:
        monkeypatch.delenv(name)
    for name in ("create_connection", "gethostbyname", "getaddrinfo"):
        monkeypatch.setattr(socket, name, lambda *a, name=name, **k: pytest.fail(f"{name} was called"))
    return lambda **variables: [monkeypatch.setenv(k, v) for k, v in variables.items()]


def test_nothing_set_is_one_process(surroundings):
    began = time.monotonic()
    assert handshake.find_job(300) is None
    with hosts.join({}, "w"):
        assert jax.process_count() == 1
    assert time.monotonic() - began < 150  # it did not wait the 300 s for others


def test_a_manual_job(surroundings):
    surroundings(**MANUAL)
    assert handshake.find_job(1) == handshake.Job("a:1", 3, 2, manual=True)
    surroundings(JAX_NUM_PROCESSES="1", JAX_PROCESS_ID="0")
    assert handshake.find_job(1) is None


@pytest.mark.parametrize("missing", MANUAL)
def test_an_incomplete_manual_job(surroundings, missing):
    surroundings(**{k: v for k, v in MANUAL.items() if k != missing})
    with pytest.raises(InputError, match=f"not {missing}: set all three"):
        handshake.find_job(1)


@pytest.mark.parametrize("wrong", [{"JAX_PROCESS_ID": "3"}, {"JAX_PROCESS_ID": "x"}, {"JAX_COORDINATOR_ADDRESS": "a"}])
def test_a_malformed_manual_job(surroundings, wrong):
    surroundings(**MANUAL | wrong)
    with pytest.raises(InputError, match="give host:port and an id"):
        handshake.find_job(1)


def test_slurm(surroundings):
    surroundings(**SLURM)
    job = handshake.find_job(1)
    assert (job.address.split(":")[0], job.count, job.index, job.manual) == ("node003", 2, 1, False)
    assert handshake.local_devices() is None  # JAX's default: one device per task
    surroundings(SLURM_STEP_TASKS_PER_NODE="1(x2)")
    assert handshake.local_devices() == []  # one task per node has them all
    surroundings(SLURM_NTASKS="1", SLURM_PROCID="0")
    assert handshake.find_job(1) is None


def test_gke(surroundings, monkeypatch):
    from jax._src.clusters import cloud_tpu_cluster

    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(cloud_tpu_cluster.BaseTpuCluster, "wait_for_coordinator", lambda *a: None)
    surroundings(TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="t-0,t-1,t-2", TPU_WORKER_ID="2")
    surroundings(MEGASCALE_COORDINATOR_ADDRESS="t-0:1", MEGASCALE_NUM_SLICES="2", MEGASCALE_SLICE_ID="1")
    assert handshake.find_job(1) == handshake.Job("t-0:8482", 6, 5)
    surroundings(MEGASCALE_NUM_SLICES="1", TPU_WORKER_HOSTNAMES="localhost", TPU_WORKER_ID="0")  # as on one TPU VM
    assert handshake.find_job(1) is None


def test_a_lone_pod_is_one_process(surroundings):
    surroundings(KUBERNETES_SERVICE_HOST="10.0.0.1")
    assert handshake.find_job(1) is None


def test_facts():
    found = handshake.facts({"seed": 1, "model": {"n_layer": 2}}, "w")
    assert found["config.model.n_layer"] == "2" and found["workdir"] == "w" and found["jax"] == jax.__version__
    assert len(found["the code of gptjax"]) == 12


# --- the handshake ------------------------------------------------------------------------------------------


def call(present, count, limit=2.0, port=None, **changed):
    """What each process of `present` receives: its answer or its InputError. changed: {'p1': facts}."""
    address, got = f"127.0.0.1:{port or free_port()}", {}

    def one(place, index):
        job = handshake.Job(address, count, index)
        own = changed.get(f"p{place}", {"config.seed": "0"})
        hello = {"index": index, "count": count, "host": f"host{place}", "facts": own}
        try:
            if index:
                _, answer = handshake.register(job, hello, limit)
                got[place] = answer
            else:
                connections, names = handshake.accept_processes(job, hello, limit)
                [connection.send({"names": names}) for connection in connections.values()]
                got[place] = names
        except InputError as error:
            got[place] = str(error)

    threads = [threading.Thread(target=one, args=pair) for pair in enumerate(present)]
    [t.start() for t in threads]
    [t.join(20) for t in threads]
    return got


def test_all_processes_register():
    got = call([2, 0, 1], 3, limit=20)
    assert got[1] == {0: "host1", 1: "host2", 2: "host0"}
    assert got[0]["names"]["1"] == "host2"


def test_missing_processes_are_named_to_all():
    began = time.monotonic()
    got = call([0, 2], 4)
    assert time.monotonic() - began < 15  # 2 s, and what a busy machine takes
    for text in got.values():
        assert "2 of 4 processes did not connect within 2 s: 1, 3." in text and "or raise --join_limit." in text
        assert "Present: process 0 (host0), process 2 (host1)" in text


def test_process_0_is_missing():
    text = call([1], 2)[0]
    assert text.startswith("Process 0 did not answer within 2 s: process 1 (") and "raise --join_limit." in text


def test_differing_processes_are_named_to_all():
    got = call([0, 1, 2], 3, limit=20, p1={"config.seed": "1", "jax": "9"}, p0={"config.seed": "0", "jax": "8"},
               p2={"config.seed": "0", "jax": "8", "config.more": "3"})  # fmt: skip
    for text in got.values():
        assert "On process 1 (host1) config.seed is 1, on process 0 it is 0." in text
        assert "On process 1 (host1) jax is 9, on process 0 it is 8." in text
        assert "On process 2 (host2) config.more is 3, on process 0 it is unset." in text
        assert text.startswith("The job cannot start:") and "Start the same command with the same software" in text


def test_two_processes_with_one_id():
    got = call([0, 1, 1], 3)
    for text in got.values():
        assert "Two processes have the id 1, on host" in text and "connect within 2 s: 2." in text


def test_a_taken_port():
    with socket.create_server(("", 0)) as taken:
        assert "cannot listen on port" in call([0], 2, port=taken.getsockname()[1])[0]


# --- a host that is lost ------------------------------------------------------------------------------------


@pytest.fixture
def watched(monkeypatch):
    """(process 1's end of its connection, how process 0 and process 2 exited, the Watch of process 0)."""
    ends = {}
    exit_now = lambda text, code: ends.setdefault(threading.current_thread().name, (text, code))
    monkeypatch.setattr(handshake, "exit_now", exit_now)
    one, of_one = socket.socketpair()
    two, of_two = socket.socketpair()
    names = {0: "a", 1: "b", 2: "c"}
    zero = handshake.Watch(0, {1: handshake.Connection(of_one), 2: handshake.Connection(of_two)}, names)
    handshake.Watch(2, {0: handshake.Connection(two)}, names)
    yield one, ends, zero
    one.close()


def ended(ends, count):
    for _ in range(2000):
        if len(ends) == count:
            break
        time.sleep(0.01)
    time.sleep(0.05)
    return list(ends.values())


def test_a_death_ends_all(watched):
    one, ends, _ = watched
    one.close()
    found = ended(ends, 2)
    assert len(found) == 2 and all(code == handshake.HOST_LOST == 75 for _, code in found)
    assert all("error: Lost process 1 (b)" in text and "Start the same command again" in text for text, _ in found)


def test_an_error_ends_all_and_is_named(watched):
    one, ends, _ = watched
    handshake.Connection(one).send({"stopped": "Stopped by process 1 (b): No such file.", "code": 2})
    assert ended(ends, 2) == [("error: Stopped by process 1 (b): No such file.", 2)] * 2


def test_an_orderly_end_ends_nobody(watched):
    one, ends, zero = watched
    handshake.Connection(one).send("done")
    zero.done()
    one.close()
    assert ended(ends, 0) == []


def test_a_stuck_process_says_where_and_ends():
    stuck = (
        "import time; from gptjax.distributed.watchdog import watchdog\n"
        "def waits_for_good(): time.sleep(60)\n"
        "with watchdog(1.5) as alive:\n"
        "    for i in range(6): time.sleep(0.3); alive()\n"
        "    print('alive', flush=True); waits_for_good()"
    )
    done = subprocess.run([sys.executable, "-c", stuck], capture_output=True, text=True, timeout=50, cwd=ROOT)
    assert done.returncode == 1 and done.stdout == "alive\n"
    assert "Timeout" in done.stderr and "in waits_for_good" in done.stderr


# --- each host's rows ---------------------------------------------------------------------------------------


class OfHost:
    """A sharding as one host of several sees it: only its own devices are addressable."""

    def __init__(self, sharding, devices):
        self.mesh, self.spec, self._sharding, self._devices = sharding.mesh, sharding.spec, sharding, devices

    def addressable_devices_indices_map(self, shape):
        return {d: i for d, i in self._sharding.devices_indices_map(shape).items() if d in self._devices}


MESHES = {
    "data 8": MeshConfig(),
    "fsdp 8": MeshConfig(data=1, fsdp=8),
    "data 2 tensor 4": MeshConfig(data=2, tensor=4),
    "tensor 8": MeshConfig(data=1, tensor=8),
    "data 2 fsdp 2 tensor 2": MeshConfig(data=2, fsdp=2, tensor=2),
}


@pytest.mark.parametrize("per_host", [1, 2, 4])
@pytest.mark.parametrize("order", ["as they are", "mixed"])
@pytest.mark.parametrize("name", MESHES)
def test_rows_follow_from_the_sharding(monkeypatch, name, order, per_host):
    """On any mesh a host loads exactly the rows its devices hold, and each device gets its own shard."""
    devices = np.array(jax.devices())
    mesh = make_mesh(MESHES[name], list(devices if order == "as they are" else devices[[0, 5, 2, 7, 4, 1, 6, 3]]))
    sharding = batch_sharding(mesh, 1)
    full = np.arange(3 * 16 * 4).reshape(3, 16, 4)
    made = {}
    monkeypatch.setattr(jax, "process_count", lambda: 8 // per_host)
    monkeypatch.setattr(jax, "make_array_from_callback", lambda shape, s, get: made.update(shape=shape, get=get))
    everyone = set()
    for own in devices.reshape(-1, per_host):
        here = hosts.rows_here(OfHost(sharding, set(own)), 16)
        hosts.global_array(full[:, here], OfHost(sharding, set(own)))
        assert made["shape"] == full.shape
        held = set()
        for index in OfHost(sharding, set(own)).addressable_devices_indices_map(full.shape).values():
            np.testing.assert_array_equal(made["get"](index), full[index])
            held |= set(range(16)[index[1]])
        assert here.tolist() == sorted(held)  # no row that it does not need
        everyone |= held
    assert everyone == set(range(16))


def test_rows_sharded_along_time_too(monkeypatch):
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "seq"))
    sharding = NamedSharding(mesh, PartitionSpec(None, "data", "seq"))
    full = np.arange(2 * 6 * 8).reshape(2, 6, 8)
    made = {}
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    monkeypatch.setattr(jax, "make_array_from_callback", lambda shape, s, get: made.update(get=get))
    own = OfHost(sharding, set(jax.devices()[6:]))
    assert hosts.rows_here(own, 6).tolist() == [3, 4, 5]
    hosts.global_array(full[:, 3:], own)
    for index in own.addressable_devices_indices_map(full.shape).values():
        np.testing.assert_array_equal(made["get"](index), full[index])


def test_each_micro_batch_is_sharded_over_all_hosts(monkeypatch):
    sharding = OfHost(batch_sharding(make_mesh(MeshConfig()), 0), set(jax.devices()[4:]))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert hosts.batch_rows(sharding, 8)(24).tolist() == [4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23]


# --- real processes -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ctrl_c_on_one_host_saves_on_all_and_one_process_resumes(tmp_path):
    """2 processes x 2 devices, stopped by a SIGINT to the second, then 1 x 8: equal to an uninterrupted run of 1 x 8.
    The handler of SIGINT sends the process a SIGTERM, for which JAX makes the hosts agree on a step."""
    options = {"steps": 400, "checkpoint.every": 100}
    heard = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background may ignore it
    with Processes("pretrain", hosts_config(tmp_path), tmp_path / "run", 2, devices=2, **options) as run:
        signal.signal(signal.SIGINT, heard)
        run.wait_for_lines(1)
        run.signal(1, signal.SIGINT)
        first, second = run.ends()
    assert (first.code, second.code) == (0, 0), first.text + second.text
    stopped = Checkpointer(tmp_path / "run").steps()[-1]
    assert f"asked to stop: saved step {stopped}" in first.text and "asked to stop: saved" not in second.text
    assert 1 <= stopped < 100 and [line["step"] for line in lines(tmp_path / "run")] == list(range(1, stopped + 1))
    config = read_config_file(hosts_config(tmp_path))
    config.steps = stopped + 2
    for workdir in ("run", "straight"):
        assert pretrain(config, str(tmp_path / workdir)).finished
    assert_same_figures(tmp_path / "run", tmp_path / "straight")

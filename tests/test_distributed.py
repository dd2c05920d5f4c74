"""Several processes on this machine: started, stopped, killed, continued, compared with one."""

import os
import re
import runpy
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from toy_network import ToyNetwork

from csc_jax import config as config_lib
from csc_jax import models
from csc_jax.errors import UserError
from csc_jax.evaluation import detail
from csc_jax.parallel import distributed
from csc_jax.reporting import writers
from csc_jax.training.checkpoint import Checkpointer
from csc_jax.training.experiment import build
from csc_jax.training.lock import lock
from csc_jax.training.loop import train

TESTS = Path(__file__).parent

# A run as from the command line, on a network that compiles at once. A process may be told to send
# itself a signal: at which call of which method of StopRequest.
RUN = f"""
import os, signal, sys
sys.path.insert(0, {str(TESTS)!r})
from csc_jax import main, models
from csc_jax.training import interrupt
from toy_network import ToyNetwork

models.build = lambda config, num_classes, **_: ToyNetwork(num_classes)
when, call, name = os.environ.get("TOLD", "reached 0 SIGTERM").split()
method, calls = getattr(interrupt.StopRequest, when), 0

def told(self):
    global calls
    calls += 1
    if calls == int(call):
        os.kill(os.getpid(), getattr(signal, name))
    return method(self)

setattr(interrupt.StopRequest, when, told)
main.run()
"""
CONFIG = """
from pathlib import Path
from tiny import tiny_config

def get_config():
    return tiny_config(
        Path(__file__).parent,
        train__steps=4,
        train__eval_every=3,
        train__panels=1,
        train__consistency_lag=2,
        checkpoint__every=1,
        checkpoint__keep=4,
        model__projection_dim=4,  # of the toy network
        method__pseudo_label__threshold=0.15,
        optimizer__name="sgd",  # adamw makes much of small differences
        optimizer__learning_rate=1e-3,
    )
"""


def pair(folder: Path, name: str, told: str = "") -> list[tuple[int, str]]:
    """Trains in two processes of two devices, of which the second is told.

    Returns the exit status and the output of each.
    """
    xla = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=2")
    environment = os.environ | {
        "XLA_FLAGS": xla,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    command = [
        *(sys.executable, "-c", RUN, f"--config={folder / 'config.py'}"),
        *(f"--workdir={folder / name}", "--config.parallel.devices=0"),
        *(f"--coordinator={address}", "--num_processes=2", "--heartbeat_timeout=10"),
    ]
    both = [
        subprocess.Popen(
            [*command, f"--process_id={i}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment | ({"TOLD": told} if told and i else {}),
        )
        for i in range(2)
    ]
    output = [process.communicate()[0] for process in both]
    return [(process.returncode, text) for process, text in zip(both, output, strict=True)]


def saved(workdir, step):
    """Returns what the checkpoint of a step holds."""
    with Checkpointer(workdir, read_only=True) as checkpointer:
        run = checkpointer.describe()
        config = config_lib.from_plain(run["config"])
        config.parallel.devices = 4  # as there, where the run's 0 means all
        palette = np.asarray(run["palette"], np.uint8)
        like = build(config, tuple(run["class_names"]), palette).abstract_state()
        return checkpointer.restore(like, str(step))


def assert_close(expected, found):
    assert expected.loop["iterator"] == found.loop["iterator"]
    leaves = jax.tree_util.tree_leaves_with_path(expected.state)
    for (path, a), b in zip(leaves, jax.tree.leaves(found.state), strict=True):
        np.testing.assert_allclose(
            np.asarray(b), a, rtol=1e-4, atol=1e-5, err_msg=jax.tree_util.keystr(path)
        )


@pytest.mark.slow
def test_two_processes_end_like_one_through_a_kill_and_a_signal(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "build", lambda config, classes, **_: ToyNetwork(classes))
    (tmp_path / "config.py").write_text(CONFIG)
    config = runpy.run_path(str(tmp_path / "config.py"))["get_config"]()
    train(config, tmp_path / "alone")

    (status, output), (killed, _) = pair(tmp_path, "pair", told="reached 4 SIGKILL")  # step 3
    assert killed == -signal.SIGKILL
    # Whichever comes first: a broken connection, or JAX misses the other's heartbeat.
    ends = {1: "error: process 0 of 2 ends, and with it the run", -signal.SIGABRT: "another task"}
    assert ends[status] in output

    # The second is told while the first evaluation, at step 3, is under way.
    first, second = pair(tmp_path, "pair", told="interrupt_evaluation 1 SIGTERM")
    assert (first[0], second[0]) == (75, 75), first[1] + second[1]
    assert re.search(r"4 x cpu of 2 processes; step [12] of 4 in", first[1])
    assert "Stopped by a signal to another process after step 3 of 4" in first[1]
    assert "Stopped by SIGTERM after step 3 of 4" in second[1]
    assert "step 3/4  loss" in first[1]
    assert "step 3/4  loss" not in second[1]
    assert_close(saved(tmp_path / "alone", 3), saved(tmp_path / "pair", 3))

    # Another number of processes and devices.
    train(config, tmp_path / "pair")
    assert_close(saved(tmp_path / "alone", 4), saved(tmp_path / "pair", 4))
    records = [writers.read_metrics(tmp_path / name) for name in ("alone", "pair")]
    for a, b in zip(*records, strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - {"train/images_per_second"}:
            near = a[key] is None or pytest.approx(a[key], rel=1e-3, abs=1e-4)
            assert b[key] == near or (a[key] is None and b[key] is None), (a["step"], key)
    files = {path.name for path in (tmp_path / "pair" / "plots").iterdir()}
    assert files == {"curves.png", "panel_000003.png", "panel_000004.png"}


@pytest.mark.slow
def test_two_processes_measure_what_one_does(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "build", lambda config, classes, **_: ToyNetwork(classes))
    changed = CONFIG.replace("train__steps=4", "train__steps=1, train__report=True")
    (tmp_path / "config.py").write_text(changed)
    train(runpy.run_path(str(tmp_path / "config.py"))["get_config"](), tmp_path / "alone")
    for status, output in pair(tmp_path, "pair"):
        assert status == 0, output
    one, two = (detail.load(tmp_path / name) for name in ("alone", "pair"))
    assert one.scores.confusion.sum() == two.scores.confusion.sum()
    # A prediction may change where two classes are all but equal.
    np.testing.assert_allclose(two.scores.confusion, one.scores.confusion, atol=10)
    np.testing.assert_allclose(two.calibration.count, one.calibration.count, atol=10)
    np.testing.assert_allclose(two.boundary.union, one.boundary.union, atol=20)
    assert two.calibration.confidence.sum() == pytest.approx(one.calibration.confidence.sum(), 1e-4)
    assert "2 processes" in (tmp_path / "pair" / "report.html").read_text()


def test_an_error_of_the_first_process_is_one_of_all(tmp_path):
    (tmp_path / "config.py").write_text(CONFIG)
    with lock(tmp_path / "taken"):
        for status, output in pair(tmp_path, "taken"):
            assert status == UserError.exit_status
            assert f"taken is in use by process {os.getpid()}" in output


SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NTASKS": "2",
}


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({}, ""),
        (SLURM, "Slurm"),
        (SLURM | {"SLURM_NTASKS": "1"}, ""),
        # Within an allocation, but not started by srun.
        ({k: v for k, v in SLURM.items() if k != "SLURM_STEP_NODELIST"}, ""),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4"}, "Open MPI"),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}, ""),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, ""),  # any pod, such as one with a notebook
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, "Kubernetes"),
        ({"TPU_WORKER_ID": "0", "TPU_WORKER_HOSTNAMES": "a,b"}, "TPU pod (GKE)"),
        ({"TPU_WORKER_ID": "0", "TPU_WORKER_HOSTNAMES": "localhost"}, ""),
    ],
)
def test_a_launcher_is_known_by_what_it_sets(environment, name):
    assert distributed.cluster(environment) == name


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"coordinator": "a:1"}, r"--num_processes and --process_id is missing"),
        ({"num_processes": 2, "process_id": 0}, r"--coordinator is missing"),
        ({"num_processes": 2}, r"--coordinator and --process_id is missing"),
        ({"coordinator": "a", "num_processes": 2, "process_id": 0}, r"=a is no address"),
        ({"coordinator": "a:1", "num_processes": 2, "process_id": 2}, r"numbered 0 to 1"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(flags, message, monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: pytest.fail("joined"))
    with pytest.raises(UserError, match=message):
        distributed.join(**flags)


def test_one_process_joins_nobody(monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: pytest.fail("joined"))
    for name in SLURM:
        monkeypatch.delenv(name, raising=False)
    distributed.join()
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    distributed.join(num_processes=1)
    assert not distributed.several()
    assert distributed.is_first()
    assert distributed.first_only(lambda: 3) == 3
    assert distributed.leave(2) == 2


def test_a_launcher_that_does_not_say_enough_is_an_error(monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")

    def initialize(*_: object, **__: object) -> None:
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(
        UserError, match=r"\(Open MPI\): coordinator_address .* by hand with --coor"
    ):
        distributed.join()


def test_processes_that_do_not_come_are_not_waited_for_longer_than_asked():
    join = "distributed.join('localhost:9', 2, 1, initialization_timeout=1)"
    done = subprocess.run(
        [sys.executable, "-c", f"from csc_jax.parallel import distributed; {join}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == UserError.exit_status
    assert "Not all processes of this run came within 1 s" in done.stderr
    assert "process 1 of 2, coordinator localhost:9" in done.stderr

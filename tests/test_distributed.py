"""Several processes on this machine: started, stopped, killed, continued, compared with one."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from csc_jax import config as config_lib
from csc_jax import distributed, writers
from csc_jax.checkpoint import Checkpointer
from csc_jax.errors import UserError
from csc_jax.experiment import build

TESTS = Path(__file__).parent

# A run as from the command line, in which a process may be told to send itself a signal: at which
# call of which method of StopRequest.
RUN = """
import os, signal, sys
from csc_jax import interrupt, main

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
CONFIG = f"""
import sys
sys.path.insert(0, {str(TESTS)!r})
from pathlib import Path
from tiny import tiny_config

def get_config():
    return tiny_config(
        Path(__file__).parent,
        parallel__devices=0,
        train__panels=1,
        train__steps=6,
        train__eval_every=3,
        checkpoint__every=2,
        checkpoint__keep=4,
        optimizer__name="sgd",  # adamw makes much of small differences
        optimizer__learning_rate=1e-2,
    )
"""


class Runs:
    """Starts training in work directories below `folder`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.config = folder / "config.py"
        self.config.write_text(CONFIG)

    def start(self, name: str, devices: int, *flags: str, told: str = "") -> subprocess.Popen:
        """Starts one process that sees so many devices."""
        xla = os.environ["XLA_FLAGS"].replace("device_count=4", f"device_count={devices}")
        environment = os.environ | {"XLA_FLAGS": xla} | ({"TOLD": told} if told else {})
        return subprocess.Popen(
            [
                *(sys.executable, "-c", RUN, f"--config={self.config}"),
                *(f"--workdir={self.folder / name}", *flags),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )

    def pair(self, name: str, told: str = "") -> list[tuple[int, str]]:
        """Runs two processes of two devices; the second is told. Returns statuses and output."""
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        flags = [f"--coordinator={address}", "--num_processes=2", "--heartbeat_timeout=5"]
        both = [
            self.start(name, 2, *flags, f"--process_id={i}", told=told if i else "")
            for i in range(2)
        ]
        output = [process.communicate()[0] for process in both]
        return [(process.returncode, text) for process, text in zip(both, output, strict=True)]


def final_state(workdir):
    with Checkpointer(workdir, read_only=True) as checkpointer:
        run = checkpointer.describe()
        config = config_lib.from_plain(run["config"])
        palette = np.asarray(run["palette"], np.uint8)
        experiment = build(config, tuple(run["class_names"]), palette)
        return checkpointer.restore(experiment.abstract_state())


def assert_same_run(expected: Path, found: Path) -> None:
    timing = "train/images_per_second"
    records = [writers.read_metrics(workdir) for workdir in (expected, found)]
    assert len(records[0]) == len(records[1])
    for a, b in zip(*records, strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - {timing}:
            if a[key] is None:
                assert b[key] is None
            else:
                assert b[key] == pytest.approx(a[key], rel=1e-3, abs=1e-4), (a["step"], key)
    a, b = final_state(expected), final_state(found)
    assert a.loop["iterator"] == b.loop["iterator"]
    pairs = zip(jax.tree_util.tree_leaves_with_path(a.state), jax.tree.leaves(b.state), strict=True)
    for (path, x), y in pairs:
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4, err_msg=name)


def test_two_processes_end_like_one_through_signals_and_a_kill(tmp_path):
    runs = Runs(tmp_path)
    alone = runs.start("alone", 4)
    output = alone.communicate()[0]
    assert alone.returncode == 0, output

    stopped = runs.pair("pair", told="interrupt_evaluation 1 SIGTERM")
    for (status, text), name in zip(stopped, ("a signal to another process", "SIGTERM")):
        assert status == 75, text
        assert f"Stopped by {name} after step 3 of 6" in text
    assert "step 3/6  " in stopped[0][1]  # progress
    assert "step 3/6  " not in stopped[1][1]

    (status, text), (killed, _) = runs.pair("pair", told="reached 3 SIGKILL")
    assert killed == -9
    assert status != 0
    assert "another" in text
    shutil.copytree(tmp_path / "pair", tmp_path / "moved")

    for status, text in runs.pair("pair"):
        assert status == 0, text
    assert_same_run(tmp_path / "alone", tmp_path / "pair")
    files = {path.name for path in (tmp_path / "pair" / "plots").iterdir()}
    assert files == {"curves.png", "panel_000003.png", "panel_000006.png"}

    moved = runs.start("moved", 1)
    output = moved.communicate()[0]
    assert moved.returncode == 0, output
    assert_same_run(tmp_path / "alone", tmp_path / "moved")

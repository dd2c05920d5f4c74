"""Names of the user's on a terminal, and output that nobody reads any more."""

import errno
import io
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from absl.testing import flagsaver
from tiny import tiny_config

from csc_jax import compilation_cache, main, output, paths, text
from csc_jax.errors import UserError
from csc_jax.training.loop import train

HOSTILE = {
    "\x1b[2J\x1b]0;title\x07": r"\x1b[2J\x1b]0;title\x07",
    "a\rb\x08\x7f": r"a\rb\x08\x7f",
    "\x9b31m": r"\x9b31m",  # the same escape in one byte of Latin-1
    "evil\u202egnp.exe": r"evil\u202egnp.exe",  # right to left from here on
    "\u2066x\u2069\u200f": r"\u2066x\u2069\u200f",
    "\udcff.png": r"\udcff.png",  # a byte of a file name that is no UTF-8
    "\u2028line\u2029": r"\u2028line\u2029",
    "\U000e0041": r"\U000e0041",
}


@pytest.mark.parametrize(("hostile", "shown"), HOSTILE.items())
def test_what_a_terminal_obeys_comes_out_as_an_escape(hostile, shown):
    assert text.printable(hostile) == text.name(hostile) == shown
    text.printable(hostile).encode()


@pytest.mark.parametrize("harmless", ["größe 2.png", "空", "שלום", "<b>&amp;</b>", "a b", "🙂", ""])
def test_what_can_be_printed_stays(harmless):
    assert text.printable(harmless) == text.name(harmless) == harmless


def test_messages_keep_their_lines_and_names_have_none():
    assert text.printable("a\n\tb") == "a\n\tb"
    assert text.name("a\n\tb") == r"a\n\tb"
    assert text.name(Path("x\n")) == r"x\n"


def test_messages_and_errors_are_escaped(capsys, monkeypatch):
    main.log_to_terminal()
    logging.getLogger("csc_jax").warning("class %s", "\x1b[31mred")
    assert capsys.readouterr().out == "class \\x1b[31mred\n"
    with flagsaver.flagsaver():
        assert main.main(["csc-jax", "--config=\x1b[2J\u202e"]) == 2
    shown = capsys.readouterr().err
    assert r"\x1b[2J\u202e" in shown
    assert "\x1b" not in shown


# ---- Output ----


def closed_pipe():
    read, write = os.pipe()
    os.close(read)
    return os.fdopen(write, "w")


def test_a_stream_goes_on_where_its_reader_has_gone(monkeypatch, capsys):
    with closed_pipe() as stream:
        outliving = output.Outliving(stream)
        monkeypatch.setattr(sys, "stdout", outliving)
        for _ in range(3):
            print("x" * 100_000)  # more than a buffer
            print("line", flush=True)
    assert capsys.readouterr().err.count("Standard output has gone (Broken pipe)") == 1


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_stream_outlives_a_full_disk_and_a_terminal_that_hung_up(number):
    class Broken(io.StringIO):
        def write(self, _):
            raise OSError(number, os.strerror(number))

    assert output.Outliving(Broken()).write("line") == 4


def test_what_a_stream_cannot_encode_is_escaped():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    output.Outliving(stream).write("größe")
    stream.flush()
    assert raw.getvalue() == rb"gr\xf6\xdfe"


def test_closed_streams_are_opened(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    output.outlive_readers()
    first = sys.stdout
    print("nowhere")
    output.outlive_readers()
    assert sys.stdout is first  # not wrapped again
    sys.stdout.close()


@pytest.mark.parametrize("closing", ["| head -1", ">&-", "2>&-", ">&- 2>&-"])
def test_a_command_ends_well_where_its_output_is_closed(closing):
    command = f"set -o pipefail; {sys.executable} -m csc_jax.main --helpfull {closing}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_a_run_goes_on_to_its_checkpoint_without_anybody_to_read_it(tmp_path, monkeypatch, capsys):
    config = tiny_config(
        tmp_path, method__name="supervised", train__steps=2, train__eval_every=2, train__panels=0
    )
    with closed_pipe() as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        main.log_to_terminal()
        train(config, tmp_path / "run")
    assert (tmp_path / "run/checkpoints/2").is_dir()
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 3
    assert "Traceback" not in capsys.readouterr().err


# ---- Paths ----


def test_a_home_that_is_not_known_is_named(monkeypatch):
    with pytest.raises(UserError, match=r"data\.root is '~nouser/x', but nouser's home folder"):
        paths.given("data.root", "~nouser/x")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # no HOME, an unknown user
    with pytest.raises(UserError, match=r"data\.root is '~/x', but your home folder.*set HOME"):
        paths.given("data.root", "~/x")
    with pytest.raises(UserError, match=r"data\.cache_dir is not set.*--config\.data\.cache_dir"):
        paths.cache_folder("data.cache_dir", "")
    assert paths.cache_folder("data.cache_dir", "/x") == Path("/x")


def test_a_path_with_a_nul_is_named():
    with pytest.raises(UserError, match=r"--out is 'a\\\\x00b'; no path holds a NUL"):
        paths.given("--out", "a\0b")


def test_no_home_costs_the_cache_of_programs_alone(monkeypatch, caplog):
    caplog.set_level("INFO", "csc_jax")
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    compilation_cache.use()
    assert "Compiled programs are not kept" in caplog.text


def test_a_file_that_nobody_has_explained_ends_without_traceback(monkeypatch, capsys, tmp_path):
    def fail(config):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(tmp_path / "x\x1b"))

    monkeypatch.setattr(main, "dispatch", fail)
    with flagsaver.flagsaver():
        status = main.main(["csc-jax", "--config=synthetic", f"--workdir={tmp_path}"])
    shown = capsys.readouterr().err
    assert status == 2
    assert shown.startswith(f"error: {tmp_path}/x\\x1b: Input/output error. ")

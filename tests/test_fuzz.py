"""A short run of scripts/fuzz.py over the readers of the user's files."""

import runpy
from pathlib import Path

import pytest

FUZZ = runpy.run_path(str(Path(__file__).parents[1] / "scripts" / "fuzz.py"))


@pytest.mark.parametrize("name", FUZZ["READERS"])
def test_hostile_files_are_read_or_refused(name):
    counts = FUZZ["fuzz"](name, examples=150)
    assert sum(counts.values()) >= 150
    assert min(counts.values()) > 0  # both ways are taken


@pytest.mark.parametrize("name", FUZZ["READERS"])
def test_a_crash_is_found(name):
    def careless(scratch, content):
        if len(content) > 40:
            raise KeyError("crash")

    with pytest.raises(KeyError, match="crash"):
        FUZZ["fuzz"](name, examples=150, reader=careless)

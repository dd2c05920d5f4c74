"""Waiting for work in the background says what is waited for."""

import logging
import threading
import time

import pytest

from csc_jax.training import background
from csc_jax.training.background import in_background, wait_for


def test_who_waits_long_hears_what_for_and_since_when(monkeypatch, caplog):
    monkeypatch.setattr(background, "_FIRST", 0.01)
    monkeypatch.setattr(background, "_THEN", 0.01)
    caplog.set_level(logging.INFO, "csc_jax")
    told_twice = threading.Event()

    class Count(logging.Handler):
        def emit(self, record):
            if len(caplog.records) >= 2:
                told_twice.set()

    handler = Count()
    logging.getLogger("csc_jax").addHandler(handler)
    try:
        result = in_background(lambda: told_twice.wait(60))
        assert wait_for(result, "compiling the train step", time.perf_counter() - 95)
    finally:
        logging.getLogger("csc_jax").removeHandler(handler)
    assert caplog.messages[:2] == ["compiling the train step, 95 s so far"] * 2


def test_who_need_not_wait_hears_nothing(caplog):
    caplog.set_level(logging.INFO, "csc_jax")
    assert wait_for(in_background(lambda: 3), "counting", time.perf_counter()) == 3
    assert not caplog.messages


@pytest.mark.parametrize("error", [TimeoutError, ValueError])
def test_an_error_of_the_work_ends_the_wait(error):
    def fail():
        raise error("its own")

    with pytest.raises(error, match="its own"):
        wait_for(in_background(fail), "failing", time.perf_counter())

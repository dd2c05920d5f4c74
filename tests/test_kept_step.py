"""The compiled step on disk: taken for the same program alone, and never in the way."""

import zlib
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from tiny import Harness, tiny_config

from csc_jax.data import abstract_batch
from csc_jax.training import kept_step as module
from csc_jax.training import step as train_step
from csc_jax.training.kept_step import KeptStep, kept_step
from csc_jax.training.loop import train


@pytest.fixture
def cache(tmp_path):
    """An empty compilation cache that takes every program."""
    names = {"jax_compilation_cache_dir": str(tmp_path / "cache")}
    names |= {"jax_persistent_cache_min_compile_time_secs": 0.0}
    before = {name: jax.config.values[name] for name in names}
    for name, value in names.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield tmp_path / "cache"
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def lower(factor):
    """A program with a constant large enough that a text made for people would leave it out."""
    constant = np.full(1000, factor, np.float32)
    return jax.jit(lambda x: (x * constant).sum()).lower(jnp.zeros(1000))


@pytest.fixture
def compiled(monkeypatch):
    """The programs given to XLA or looked up in JAX's cache, those of this module alone."""
    seen = []
    original = jax.stages.Lowered.compile

    def compile(lowered, *args):
        seen.append(lowered)
        return original(lowered, *args)

    monkeypatch.setattr(jax.stages.Lowered, "compile", compile)
    return seen


def kept(folder, mesh, factor, config="a"):
    """Returns what a run with such a program gets, once all it writes is there."""
    step = KeptStep(folder, config, "machine", mesh)
    program = step.compile(lower(factor))
    if step.saved is not None:
        step.saved.result()
    return program(jnp.ones(1000))


def steps(folder):
    """The steps that are kept, but for what names them."""
    return [path for path in folder.iterdir() if path.suffix == ""]


def test_the_same_program_is_compiled_once(cache, compiled, mesh1):
    assert kept(cache / "steps", mesh1, 2.0) == 2000
    assert kept(cache / "steps", mesh1, 2.0) == 2000
    assert len(compiled) == 1


def test_a_program_with_another_constant_is_compiled_and_kept_instead(cache, compiled, mesh1):
    for factor in (2.0, 3.0, 3.0):
        assert kept(cache / "steps", mesh1, factor) == 1000 * factor
    assert len(compiled) == 2


def test_a_config_finds_the_step_that_another_has_kept(cache, compiled, mesh1):
    for config in ("a", "b", "b"):
        jax.clear_caches()
        assert kept(cache / "steps", mesh1, 2.0, config) == 2000
    assert len(compiled) == 2  # the first of "b" does not know yet, and JAX's cache has it
    assert len(steps(cache / "steps")) == 1


def test_what_jax_had_in_its_cache_is_not_kept(cache, mesh1):
    kept(cache / "first", mesh1, 2.0)
    jax.clear_caches()
    assert kept(cache / "second", mesh1, 2.0) == 2000
    assert not (cache / "second").exists()


def test_what_another_thread_compiles_meanwhile_does_not_count(cache):
    theirs, own = lower(2.0), lower(3.0)
    with module._misses() as mine, ThreadPoolExecutor(1) as other:
        other.submit(theirs.compile).result()
        assert mine == []
        own.compile()
        assert len(mine) == 1


def damaged(stored):
    return {
        "empty": b"",
        "cut off": stored[:-100],
        "no program": zlib.compress(b"nothing"),
    }


@pytest.mark.parametrize("how", damaged(b""))
def test_a_damaged_file_does_no_harm(cache, compiled, caplog, mesh1, how):
    kept(cache / "steps", mesh1, 2.0)
    [path] = steps(cache / "steps")
    path.write_bytes(damaged(path.read_bytes())[how])
    jax.clear_caches()
    assert kept(cache / "steps", mesh1, 2.0) == 2000
    assert len(compiled) == 2
    assert "cannot be read" in caplog.text
    assert not path.exists()


def test_a_step_that_is_gone_is_compiled(cache, compiled, caplog, mesh1):
    kept(cache / "steps", mesh1, 2.0)
    [path] = steps(cache / "steps")
    path.unlink()
    assert kept(cache / "steps", mesh1, 2.0) == 2000
    assert len(compiled) == 2
    assert not caplog.text


def test_a_folder_that_cannot_be_written_does_no_harm(cache, caplog, mesh1):
    cache.mkdir()
    (cache / "steps").write_text("no folder")
    assert kept(cache / "steps", mesh1, 2.0) == 2000
    assert "The compiled step cannot be kept" in caplog.text


def test_nothing_is_left_of_what_cannot_be_finished(cache, tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="taken"):
        module._write(tmp_path / "taken", b"x")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_there_is_one_for_each_config_but_for_the_seed(cache, mesh1, mesh4, monkeypatch):
    def path(mesh=mesh1, **overrides):
        return kept_step(tiny_config(**overrides), mesh)._last

    assert path().is_relative_to(cache)
    assert path() == path(seed=1)
    others = [path(train__steps=7), path(mesh4)]
    monkeypatch.setenv("XLA_FLAGS", "--xla_other")
    others.append(path())
    monkeypatch.setattr(module, "_cpu", lambda: "of another make")
    others.append(path())
    assert len({path(), *others}) == 4


@pytest.mark.parametrize("folder", [None, "gs://bucket/cache"])
def test_there_is_none_without_a_folder_for_the_cache(cache, mesh1, folder):
    jax.config.update("jax_compilation_cache_dir", folder)
    assert kept_step(tiny_config(), mesh1) is None


def test_there_is_none_where_jax_keeps_nothing(cache, mesh1):
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        assert kept_step(tiny_config(), mesh1) is None
    finally:
        jax.config.update("jax_enable_compilation_cache", True)


def test_a_run_asks_for_the_kept_step(cache, tmp_path, monkeypatch):
    asked = []
    original = KeptStep.compile
    monkeypatch.setattr(KeptStep, "compile", lambda *args: (asked.append(args), original(*args))[1])
    train(tiny_config(tmp_path, method__name="supervised", train__steps=1), tmp_path / "run")
    [(step, _)] = asked
    step.saved.result()
    assert len(steps(cache / "csc_jax_steps")) == 1


@pytest.mark.parametrize("devices", [1, 2])
def test_a_step_read_back_is_the_step(cache, compiled, devices):
    harness = Harness(tiny_config(method__name="supervised"), devices)
    state = train_step.abstract_state(harness.method, harness.tx, harness.mesh)
    compiled.clear()  # of what `Harness` compiles
    results = []
    for _ in range(2):
        step = kept_step(harness.config, harness.mesh)
        ahead = train_step.compile_ahead(
            harness.step, state, abstract_batch(harness.config), step.compile
        )
        now = harness.init()
        for i in range(2):
            now, metrics = ahead(now, harness.batch(i))
        results.append(jax.device_get((now, metrics)))
        if step.saved is not None:
            step.saved.result()
    assert len(compiled) == 1
    jax.tree.map(np.testing.assert_array_equal, *results)

"""Every test runs on eight virtual CPU devices, with JAX's rank check on and warnings as errors."""

import logging
import os
import shutil
import tempfile
from collections.abc import Generator, Iterator
from importlib.metadata import version
from pathlib import Path

# JAX reads these when it is imported or first used, hence before any other import. They are
# environment variables so that commands which a test starts inherit them.
os.environ["JAX_PLATFORMS"] = "cpu"
# Unoptimised programs compile in half the time, and with the older code generator, which JAX 0.12
# no longer has, in a quarter: compilation is what tests spend theirs on.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)
# A flag that XLA does not know ends the process.
older = version("jaxlib") < "0.12"
os.environ["XLA_FLAGS"] += (
    " --xla_cpu_use_fusion_emitters=false" if older else " --xla_cpu_opt_preset=fast_compile"
)
os.environ["MPLBACKEND"] = "agg"
# Tests build the same step again and again; compiled programs are shared by all of a session's
# processes. The folder is new each time: a program that a killed test run left half written would
# fail the next one. The size limit makes JAX lock the folder (it does not without one).
OWNS_CACHE = "JAX_COMPILATION_CACHE_DIR" not in os.environ
if OWNS_CACHE:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="csc_jax_xla_")
    os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(2**30)  # bytes

import jax
import pytest
from hypothesis import settings

jax.config.update("jax_numpy_rank_promotion", "raise")

# Compilation makes a first example slow, and a failure must come again at the next run.
settings.register_profile("csc_jax", deadline=None, derandomize=True)
settings.load_profile("csc_jax")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-skips", action="store_true", help="a test that would be skipped fails")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and item.config.option.no_skips:
        report.outcome = "failed"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    if report.skipped and collector.config.option.no_skips:
        report.outcome = "failed"
    return report


def pytest_unconfigure(config: pytest.Config) -> None:
    if OWNS_CACHE:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


@pytest.fixture(autouse=True)
def own_log() -> Iterator[None]:
    """Takes back what `main.log_to_terminal` did: its handler holds a test's captured stdout."""
    log = logging.getLogger("csc_jax")
    before = log.handlers[:], log.level, log.propagate
    yield
    log.handlers[:], log.level, log.propagate = before


@pytest.fixture(scope="module", params=["cpu", "gpu"])
def platform(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a module's tests twice: the paper's module traced for a CPU and for a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("csc_jax.contrast.devices.platform", lambda: request.param)
        jax.clear_caches()  # or what was traced for the one device would be taken for the other
        yield request.param
    jax.clear_caches()


@pytest.fixture(scope="session")
def mesh1() -> jax.sharding.Mesh:
    """A mesh of one device."""
    from csc_jax.parallel import sharding

    return sharding.make_mesh(1)


@pytest.fixture(scope="session")
def mesh4() -> jax.sharding.Mesh:
    """A mesh of four devices."""
    from csc_jax.parallel import sharding

    return sharding.make_mesh(4)


@pytest.fixture(scope="session")
def camvid_root() -> Path:
    """The CamVid folder, which the project does not ship."""
    beside_checkout = Path(__file__).parents[2] / "shared" / "camvid"
    root = Path(os.environ.get("CSC_CAMVID_ROOT", beside_checkout))
    if not (root / "images").is_dir():
        pytest.skip(f"no CamVid at {root}: set CSC_CAMVID_ROOT to its folder")
    return root

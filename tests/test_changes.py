"""A run of an older version goes on as it was, or is refused by name."""

import pytest

from csc_jax import __version__
from csc_jax import config as config_lib
from csc_jax.config import checks as config_checks
from csc_jax.config.changes import CHANGES
from csc_jax.errors import UserError

NEW_FIELDS = ("contrast.halves", "method.unsupervised_mean")


def config_of(method):
    """The default config of a method, "+csc" for the module on top of it."""
    config = config_lib.default_config()
    config.method.name, _, on_top = method.partition("+")
    config.method.contrast = on_top or "none"
    return config


def of_older_version(config):
    stored = config_lib.to_plain(config)
    for name in NEW_FIELDS:
        del stored[name]
    return stored


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("csc", {"contrast.halves": "together", "method.unsupervised_mean": "all"}),
        ("supervised+csc", {"contrast.halves": "together"}),
        ("cutmix_mean_teacher", {"method.unsupervised_mean": "all"}),
        ("supervised", {}),
    ],
)
def test_new_fields_mean_what_was_done_before(method, fields):
    config = config_of(method)
    stored = of_older_version(config)
    for name, value in fields.items():
        message = f"{name}: {value} before, {config_lib.to_plain(config)[name]} now"
        with pytest.raises(UserError, match=message):
            config_checks.check_resumed(stored, config, "0.1.0")
    config.update_from_flattened_dict(fields)
    assert config_checks.check_resumed(stored, config, "0.1.0") == []


def test_a_run_of_this_version_has_the_defaults_of_now():
    config = config_of("csc")
    assert config_checks.check_resumed(of_older_version(config), config, __version__) == []
    assert all(change.version <= __version__ for change in CHANGES)


@pytest.mark.parametrize(
    ("method", "fields", "what"),
    [
        ("fixmatch", {}, "strong view"),
        ("unimatch_v2+csc", {}, "strong view"),
        ("cps", {}, "batches of their own"),
        ("gct", {}, "flaw maps"),
        ("mean_teacher+csc", {}, "evaluation mode"),
        ("csc", {"method.blur": 0.5}, "colour jitter"),
        ("u2pl", {"method.color_jitter": 0.8}, "colour jitter"),
    ],
)
def test_a_run_that_nothing_can_bring_back_is_refused(method, fields, what):
    config = config_of(method)
    config.update_from_flattened_dict(fields)
    with pytest.raises(UserError, match=rf"csc_jax 0\.1\.0; since version 0\.2\.0 .*{what}"):
        config_checks.check_resumed(of_older_version(config), config, "0.1.0")
    assert config_checks.check_resumed(of_older_version(config), config, __version__) == []


@pytest.mark.parametrize("method", ["supervised", "u2pl", "mean_teacher"])
def test_a_run_that_no_change_concerns_goes_on(method):
    config = config_of(method)
    assert config_checks.check_resumed(of_older_version(config), config, "0.1.0") == []

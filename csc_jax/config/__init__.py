"""A run's fields: their defaults, what they may hold, and where config files are found."""

from csc_jax.config.defaults import (
    default_config,
    flatten,
    from_plain,
    rate_scale,
    resolve,
    to_plain,
)

__all__ = ["default_config", "flatten", "from_plain", "rate_scale", "resolve", "to_plain"]

"""A switch to convolutions and attention that are XLA's alone, for programs that go elsewhere.

The faster paths of `convolution`, `depthwise` and `vit` ask for sizes and for the platform while
they are traced. An exported program is one for all sizes and platforms, and converters know no
`platform_dependent`.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

_plain = ContextVar("csc_jax_plain_convolutions", default=False)


def is_on() -> bool:
    """Whether what is being traced is to hold plain convolutions and attention."""
    return _plain.get()


@contextlib.contextmanager
def convolutions() -> Iterator[None]:
    """Has what is traced inside take plain ones, of attention too; the same up to rounding."""
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)

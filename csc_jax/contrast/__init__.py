"""Consistency and separation regularisation for contrastive learning (paper, Sec. III-B and III-C).

Imports JAX alone and knows nothing of networks, data or optimizers: hand it features, labels and
predictions from any training loop. All functions are pure and run under `jit` with fixed shapes.
Shapes: A anchors (queries), B images, C classes, D feature size, N pixels of an image,
S bank entries per class, K new entries per class and image.
"""

from csc_jax.contrast.bank import (
    MemoryBank,
    bank_fill,
    bank_ready,
    consistency_step,
    enqueue,
    init_memory_bank,
)
from csc_jax.contrast.loss import contrastive_loss
from csc_jax.contrast.measures import class_separation, consistency, separation
from csc_jax.contrast.normalize import normalize
from csc_jax.contrast.sampling import (
    ClassOrder,
    Samples,
    gather,
    order_by_class,
    semi_hard_sample,
    take_random,
    take_semi_hard,
)
from csc_jax.contrast.update import gate, update_memory_bank

__all__ = [
    "ClassOrder",
    "MemoryBank",
    "Samples",
    "bank_fill",
    "bank_ready",
    "class_separation",
    "consistency",
    "consistency_step",
    "contrastive_loss",
    "enqueue",
    "gate",
    "gather",
    "init_memory_bank",
    "normalize",
    "order_by_class",
    "semi_hard_sample",
    "separation",
    "take_random",
    "take_semi_hard",
    "update_memory_bank",
]

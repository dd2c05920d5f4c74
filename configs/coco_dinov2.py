"""COCO, 81 classes, with UniMatch V2 on DINOv2-S and the DPT head (Yang et al., TPAMI 2025).

Command:    csc-jax train --config=coco_dinov2 --workdir=W \
                --config.data.root=DIR --config.model.pretrained=dinov2_vits14_pretrain.pth \
                --config.data.labeled_list=1_512/labeled.txt
            The lists are UniMatch V2's, unchanged. All other train images are unlabelled.
Hardware:   several GPUs; 8 + 8 images a step over all of them.
Run time:   not measured yet.
Expected:   as published for DINOv2-B at 1/512 / 1/256 / 1/128 / 1/64 / 1/32: mIoU
            47.9 / 55.8 / 58.7 / 60.4 / 63.3 %. Not trained yet by this project.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    voc = Path(__file__).with_name("pascal_voc_dinov2.py")
    c: ConfigDict = runpy.run_path(str(voc))["get_config"]()
    c.data.name = "coco"

    c.batch.labeled = 8  # UniMatch V2's code
    c.batch.unlabeled = 8
    c.optimizer.recipe_batch = 8

    c.train.epochs = 20.0
    return c

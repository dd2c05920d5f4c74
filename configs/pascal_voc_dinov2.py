"""Pascal VOC 2012 with UniMatch V2 on DINOv2-S and the DPT head (Yang et al., TPAMI 2025).

Command:    csc-jax train --config=pascal_voc_dinov2 --workdir=W \
                --config.data.root=DIR --config.model.pretrained=dinov2_vits14_pretrain.pth \
                --config.data.labeled_list=92/labeled.txt \
                --config.data.unlabeled_list=92/unlabeled.txt
            DIR holds VOCdevkit (docs/data.md); the lists are UniMatch V2's, unchanged. For
            DINOv2-B: --config.model.backbone=dinov2_base with its weights. For the module of the
            CSC paper on top: --config.method.contrast=csc; for CSC itself:
            --config.method.name=csc.
Hardware:   one GPU or several; 16 + 16 images a step over all of them. For a GPU with less memory:
            --config.model.remat=True.
Run time:   not measured yet by this project; the authors' log for 92 labels says 23 GPU hours.
Expected:   mIoU % of the EMA teacher on val, as published for DINOv2-S at 92 labels: 79.0; for
            DINOv2-B at 92 / 183 / 366 / 732 / 1464: 86.3 / 87.9 / 88.9 / 90.0 / 90.8. Not trained
            yet by this project.
"""

from ml_collections import ConfigDict

from csc_jax.config import default_config


def get_config() -> ConfigDict:
    c = default_config()
    c.data.name = "pascal_voc"
    c.data.crop_size = (518, 518)  # UniMatch V2's code; 37 patches of 14 px

    c.batch.labeled = 16  # UniMatch V2's code, 4 on each of 4 GPUs
    c.batch.unlabeled = 16
    c.batch.eval = 1  # every image has a size of its own

    c.model.backbone = "dinov2_small"
    c.model.dropout = 0.0  # its head has none
    c.model.projection_stride = 2  # 3.5 px of the image, the paper's map 4 (decisions.md 16)
    c.model.dtype = "bfloat16"  # its code: automatic mixed precision

    c.method.name = "unimatch_v2"
    c.method.ema_decay = 0.996  # UniMatch V2's code: min(1 - 1 / (t + 1), 0.996)
    c.method.unimatch_v2.threshold = 0.95
    # For --config.method.name=csc: strong views as UniMatch V2 has them.
    c.method.color_jitter = 0.8
    c.method.grayscale = 0.2
    c.method.blur = 0.5
    c.method.cutmix = 0.5
    c.method.pseudo_label.mode = "confidence"
    c.method.pseudo_label.threshold = 0.95
    c.contrast.views_per_class = 50  # decisions.md 14
    c.contrast.bank_size = 2000  # paper, Table VII

    c.loss.name = "cross_entropy"

    c.optimizer.name = "adamw"  # betas 0.9 and 0.999
    c.optimizer.learning_rate = 5e-6  # of the encoder
    c.optimizer.head_multiplier = 40.0
    c.optimizer.weight_decay = 0.01
    c.optimizer.recipe_batch = 16

    c.train.epochs = 60.0  # passes over the unlabelled list
    c.train.log_every = 50
    c.train.eval_every = 2000

    c.eval.mode = "whole"  # sides resized to the nearest multiple of 14
    return c

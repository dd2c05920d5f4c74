"""Cityscapes (2,975 / 500, 19 classes) with the paper's recipe.

Command:    csc-jax train --config=cityscapes --config.data.root=DIR --workdir=W
            DIR holds leftImg8bit/ and gtFine/, or the archives of both.
Hardware:   one GPU or several; a step on one H100 needs 7.3 GiB of its memory (planned). Not
            trained yet by this project.
Run time:   68 ms a step on one H100, images on the device (docs/performance.md)
Expected:   the paper has a teacher mIoU of 75.64 at 1/8, 372 labelled images (Table VIII), from a
            ResNet-101 pretrained on ImageNet. Without pretrained weights it will be well below.
"""

from ml_collections import ConfigDict

from csc_jax.config import default_config


def get_config() -> ConfigDict:
    c = default_config()
    c.data.name = "cityscapes"
    c.data.labeled_fraction = "1/8"
    c.data.crop_size = (640, 640)  # paper, Sec. IV-B

    c.batch.labeled = 2  # paper, Sec. IV-B
    c.batch.unlabeled = 2
    c.batch.eval = 1  # 1024 x 2048 px each

    c.model.backbone = "resnet101"
    c.model.dtype = "bfloat16"  # the paper does not say; docs/scaling.md has what stays float32

    c.method.name = "csc"
    c.method.lambda_u = 1.0  # paper (decisions.md 17)
    c.method.pseudo_label.mode = "adaptive"  # decisions.md 13
    c.method.pseudo_label.threshold = 0.0  # decisions.md 13
    c.method.cps.weight = 6.0  # Chen et al., Sec. 4
    c.contrast.weight = 1.0  # paper (decisions.md 17)
    c.contrast.top_n = 1  # paper, Table VI
    c.contrast.bank_size = 2000  # paper, Table VII
    c.contrast.pixels_per_class = 10  # paper, Table VII, read as in decisions.md 1

    c.loss.name = "ohem"  # decisions.md 21
    c.loss.aux_weight = 0.4  # decisions.md 21

    c.optimizer.name = "sgd"
    c.optimizer.learning_rate = 0.00125  # paper, Sec. IV-B
    c.optimizer.head_multiplier = 1.0  # decisions.md 24
    c.optimizer.weight_decay = 5e-4  # paper, Sec. IV-B

    c.train.epochs = 200.0  # paper, Sec. IV-B
    c.train.log_every = 50
    c.train.eval_every = 2000

    c.eval.mode = "sliding"  # decisions.md 25
    return c

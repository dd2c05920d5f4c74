"""Pascal VOC 2012, augmented annotations (10,582 / 1,449, 21 classes), with the paper's recipe.

Command:    csc-jax train --config=pascal_voc --config.data.root=DIR --workdir=W
            DIR holds VOCdevkit (docs/data.md).
Hardware:   one GPU or several; not run yet by this project.
Run time:   not measured yet.
Expected:   the paper has a teacher mIoU of 78.68 at 1/8, 1,323 labelled images (Table V), from a
            ResNet-101 pretrained on ImageNet. Without pretrained weights it will be well below.
"""

from ml_collections import ConfigDict

from csc_jax.config import default_config


def get_config() -> ConfigDict:
    c = default_config()
    c.data.name = "pascal_voc"
    c.data.labeled_fraction = "1/8"
    c.data.crop_size = (480, 480)  # paper, Sec. IV-B

    c.batch.labeled = 4  # paper, Sec. IV-B
    c.batch.unlabeled = 4
    c.batch.eval = 1  # every image has a size of its own

    c.model.backbone = "resnet101"
    c.model.dtype = "bfloat16"  # the paper does not say; docs/scaling.md has what stays float32

    c.method.name = "csc"
    c.method.supervised_only_epochs = 1.0  # decisions.md 19
    c.method.lambda_u = 1.0  # paper (decisions.md 17)
    c.method.pseudo_label.mode = "adaptive"  # decisions.md 13
    c.method.pseudo_label.threshold = 0.7  # decisions.md 13
    c.method.cps.weight = 1.5  # Chen et al., Sec. 4
    c.contrast.weight = 1.0  # paper (decisions.md 17)
    c.contrast.top_n = 1  # paper, Table VI
    c.contrast.bank_size = 2000  # paper, Table VII
    c.contrast.pixels_per_class = 10  # paper, Table VII, read as in decisions.md 1

    c.loss.name = "cross_entropy"  # decisions.md 21

    c.optimizer.name = "sgd"
    c.optimizer.learning_rate = 0.00025  # paper, Sec. IV-B
    c.optimizer.head_multiplier = 10.0  # decisions.md 24
    c.optimizer.weight_decay = 1e-4  # paper, Sec. IV-B

    c.train.epochs = 80.0  # paper, Sec. IV-B
    c.train.log_every = 50
    c.train.eval_every = 5000

    c.eval.mode = "whole"  # decisions.md 25
    c.eval.size_multiple = 64  # px; the images have hundreds of sizes. 1 is exact, and slow
    return c

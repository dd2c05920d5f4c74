"""Images and labels of your own (docs/own_images.md) on one GPU.

Command:    csc-jax train --config=folder --config.data.root=DIR --workdir=W
            DIR holds images/, labels/ and classes.txt.
            Crop, batch and steps are chosen from the data (docs/own_images.md).
Hardware:   meant for one GPU with 24 GB, on which this project has not run it yet.
Run time:   not measured on a GPU; 6 minutes of CPU time on one core for 120 steps of a small net
            on 80 images of 144 x 192 px (docs/own_images.md has the command).
Expected:   depends on the data; compare with --config.method.name=supervised. Those 120 steps, from
            12 labelled CamVid frames, came to a mIoU of 30.5 on 20 val images (seed 0, one run).
"""

from ml_collections import ConfigDict

from csc_jax.config import default_config


def get_config() -> ConfigDict:
    c = default_config()
    c.data.name = "folder"
    c.data.labeled_fraction = "1"  # every label there is; the other images are unlabelled
    c.data.crop_size = (0, 0)  # chosen from the data, as batch and steps are (docs/own_images.md)

    c.batch.labeled = 0
    c.batch.unlabeled = 0
    c.batch.eval = 1  # images may differ in size

    c.model.backbone = "resnet50"
    c.model.output_stride = 16

    c.method.name = "csc"
    c.method.supervised_only = 200  # an epoch of a small folder would be a few steps
    c.method.pseudo_label.mode = "adaptive"  # as on Pascal VOC (decisions.md 13)
    c.method.pseudo_label.threshold = 0.7

    c.optimizer.name = "sgd"
    c.optimizer.learning_rate = 0.001
    c.optimizer.scale_rate = True  # in proportion to the batch that is chosen
    c.optimizer.recipe_batch = 4
    c.optimizer.head_multiplier = 10.0

    c.train.steps = 0
    c.train.log_every = 50
    c.train.eval_every = 500
    return c

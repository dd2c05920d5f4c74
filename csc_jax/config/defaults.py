"""Every field of a run, with unit and source; a file in `configs/` changes the few it needs.

`decisions.md N` is point N of docs/decisions.md, `lineage` the family of public training codes that
the paper builds on (U2PL, ContrastiveSeg, AEL).
"""

import json
from typing import Any

from ml_collections import ConfigDict

from csc_jax.errors import UserError

RGB_MEAN, RGB_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # of ImageNet, 0..255


def default_config() -> ConfigDict:
    """Returns the full set of fields; values are those of a small run unless a source is named."""
    c = ConfigDict()
    c.seed = 0  # integer; labelled/unlabelled draw, initial weights, augmentation, sampling

    c.data = ConfigDict()
    c.data.name = "synthetic"  # synthetic, camvid, cityscapes, pascal_voc, ade20k, coco, folder
    c.data.root = ""  # folder the user downloaded; unused by synthetic
    c.data.cache_dir = ""  # where ArrayRecord files go; "" = ~/.cache/csc_jax
    c.data.labeled_fraction = (
        "1/8"  # 1/2 | 1/4 | 1/8 | 1/16 | 1, share of the train images that have a label
    )
    c.data.labeled_list = ""  # text file, one image a line (docs/data.md); replaces the draw
    c.data.unlabeled_list = ""  # text file of ids; "" = all train images not labelled
    c.data.image_size = (
        0,
        0,
    )  # (height, width) px every image is resized to first; (0, 0) = own size
    c.data.image_bits = 0  # bits that images of 16 bits use, 9..16; 0 = 16 (docs/data.md)
    # Channels of an image: 3 = RGB, 1 = grey, N = multispectral. Other than 3 for the data set
    # folder alone, and images then keep the values of their files (`keeps_values`, docs/data.md).
    c.data.bands = 3
    # Of images that keep their values: uint8 | uint16 | float32; "" = found while preparing, or
    # RGB images of 8 bits.
    c.data.pixel_type = ""
    # 0, here and in c.batch and c.train: chosen from the data (docs/own_images.md)
    c.data.crop_size = (64, 64)  # (height, width) px of a training crop; (0, 0) = chosen
    c.data.scale_range = (0.5, 2.0)  # random resize, ratio to the image (decisions.md 22)
    c.data.flip = True  # random horizontal flip (decisions.md 22)
    # Per band, in the units of the images: 0..255 for RGB images of 8 bits (lineage); also the
    # padding. () = measured on the train images while preparing, and so are these three numbers
    # where data.bands is not 3.
    c.data.mean = RGB_MEAN
    c.data.std = RGB_STD  # likewise
    c.data.threads = 0  # that read and decode, in each process; 0 = one for each CPU, all together
    c.data.prefetch = 0  # batches, labelled and unlabelled together, made ahead; 0 = 2 a thread
    c.data.workers = 0  # worker processes of the host pipeline, fixed for a run; 0 = threads only
    c.data.max_unreadable = 10  # train images damaged since they were prepared that a run endures
    c.data.cityscapes = ConfigDict()  # only read when data.name is cityscapes
    c.data.cityscapes.extra = False  # leftImg8bit/train_extra as unlabelled images as well
    c.data.pascal_voc = ConfigDict()  # only read when data.name is pascal_voc
    c.data.pascal_voc.pool = (
        "blender"  # labelled ones come from all 10,582 images | classic: from VOC's own 1,464
    )
    c.data.ade20k = ConfigDict()  # only read when data.name is ade20k
    c.data.ade20k.labels = (
        "auto"  # official: 0 unlabelled, classes from 1 | shifted: classes from 0, 255 unlabelled
    )
    c.data.folder = ConfigDict()  # only read when data.name is folder
    c.data.folder.classes = ""  # file of class names; "" = classes.txt or classes.json in data.root
    c.data.folder.label_values = ""  # class id of each stored value, as in "0:0,255:1"; "" = the id
    c.data.synthetic = ConfigDict()  # only read when data.name is synthetic
    c.data.synthetic.train = 192  # images
    c.data.synthetic.val = 64  # images
    c.data.synthetic.size = (64, 64)  # (height, width) px
    c.data.synthetic.weather = 1.0  # 0 = a clear day for all, 1 = all kinds of light, fog and noise
    c.data.synthetic.seed = 0  # of the scenes themselves; independent of the run's seed

    c.batch = ConfigDict()
    c.batch.labeled = 4  # images a step, all devices together; 0 = chosen
    c.batch.unlabeled = 4  # images a step, all devices together; 0 = chosen
    c.batch.eval = 8  # images a step in evaluation, all devices together; rounded up to divide

    c.model = ConfigDict()
    # DeepLabv3+ on resnet18 | resnet34 | resnet50 | resnet101 | efficientnet_lite0, or DPT on
    # dinov2_small | dinov2_base | dinov2_large, the same with _reg (registers), dinov3_small |
    # dinov3_base, or vit_tiny, which is for tests and demos
    c.model.backbone = "resnet18"
    c.model.pretrained = "none"  # none | FILE | hf:OWNER/REPO/FILE | pip:efficientnet-lite0
    c.model.stem = "deep"  # ResNets: deep (three 3x3, lineage) | 7x7 (torchvision)
    c.model.width = 64  # ResNets: channels of the first stage
    c.model.output_stride = 8  # DeepLabv3+: 8 (lineage) | 16 | 32
    c.model.multi_grid = (
        2,
        2,
        4,
    )  # ResNets: dilation multipliers of the last stage's blocks (lineage); () = off
    c.model.aspp_rates = (12, 24, 36)  # DeepLabv3+: dilations at output stride 8 (lineage)
    c.model.decoder_width = (
        256  # DeepLabv3+: channels of an ASPP branch and of both heads (lineage)
    )
    c.model.projection_dim = 256  # D, width of a pixel's contrastive feature (paper, Sec. III-B)
    c.model.projection_stride = 1  # DPT: 1 | 2 | 4 | 8, px of the logits (decisions.md 16)
    c.model.dropout = 0.1  # probability, ASPP and heads (lineage); DPT: fused map, 0 in UniMatch V2
    c.model.drop_path = (
        0.0  # transformers: probability that the last block's branches skip an image
    )
    c.model.freeze_backbone = False  # the backbone stays as pretrained: no gradient, no momentum
    c.model.dtype = "float32"  # compute type: float32 | bfloat16; parameters stay float32
    c.model.remat = False  # compute the backbone's blocks again for the gradient, to save memory

    c.method = ConfigDict()
    c.method.name = "csc"  # a file of csc_jax/methods, which says what it is
    c.method.contrast = "none"  # none | csc: the paper's module on top of any other method
    c.method.ema_decay = 0.99  # upper bound of the teacher's EMA decay (decisions.md 19)
    c.method.supervised_only = (
        0  # steps on labels alone before the teacher starts (decisions.md 19)
    )
    c.method.supervised_only_epochs = 0.0  # the same in epochs; replaces the steps where > 0
    c.method.lambda_u = 1.0  # weight of L_u (Eq. 1, decisions.md 17)
    c.method.unsupervised_mean = "kept"  # kept | all: pixels that L_u divides by (decisions.md 13a)
    c.method.cutmix = 1.0  # probability of CutMix per unlabelled image (decisions.md 23)
    c.method.color_jitter = 0.0  # probability of colour jitter, strong view (decisions.md 23)
    c.method.grayscale = 0.0  # probability of grey-scale, strong view (decisions.md 23)
    c.method.blur = 0.0  # probability of Gaussian blur, strong view (decisions.md 23)

    c.method.pseudo_label = ConfigDict()  # mask M of Eq. 4a (decisions.md 13)
    c.method.pseudo_label.mode = "confidence"  # adaptive | entropy | confidence
    c.method.pseudo_label.threshold = 0.7  # teacher's top probability (adaptive, confidence)
    c.method.pseudo_label.floor = 0.1  # lowest keep probability of a class (adaptive)
    c.method.pseudo_label.gamma = 1.0  # exponent of the keep rate (adaptive)
    c.method.pseudo_label.confidence_ema = (
        0.999  # decay of the class-wise confidence bank (adaptive)
    )
    c.method.pseudo_label.percentile = (
        80.0,
        100.0,
    )  # teacher entropy, first to last step (entropy)

    c.method.cct = ConfigDict()  # Ouali et al., CVPR 2020, and the values of their code
    c.method.cct.weight = 30.0  # omega_u, of the consistency loss
    c.method.cct.ramp_up = 0.1  # share of training
    c.method.cct.annealed = False  # annealed bootstrapped cross entropy as L_s (their Sec. 3.2)
    c.method.cct.background = 0  # class id that Con-Msk, Obj-Msk and G-Cutout take for no object
    c.method.cct.con_msk = 2  # auxiliary decoders under context masking
    c.method.cct.dropout = 6  # under spatial dropout
    c.method.cct.f_drop = 6  # under feature drop
    c.method.cct.f_noise = 6  # under feature noise
    c.method.cct.g_cutout = 6  # under guided cutout
    c.method.cct.i_vat = 2  # under the adversarial perturbation
    c.method.cct.obj_msk = 2  # under object masking
    c.method.cct.dropout_rate = 0.5  # probability of a channel (dropout)
    # Of gamma, a ratio of the most active pixel (f_drop); the paper's, their code has (0.7, 0.9)
    c.method.cct.drop_range = (0.6, 0.9)
    c.method.cct.noise = 0.3  # the noise is uniform in ± this, as a ratio of the feature (f_noise)
    c.method.cct.erase = 0.4  # sides of the hole, as a ratio of those of the object (g_cutout)
    c.method.cct.epsilon = 2.0  # norm of the perturbation of an image's features (i_vat)

    c.method.cps = ConfigDict()  # Chen et al., CVPR 2021
    c.method.cps.weight = 1.5  # lambda, of L_cps; 1.5 on VOC, 6 on Cityscapes (their Sec. 4)
    c.method.cps.cutmix = True  # their CPS + CutMix; False = CPS on the images as they are

    c.method.fixmatch = ConfigDict()  # Sohn et al., NeurIPS 2020
    c.method.fixmatch.threshold = 0.95  # probability that a pseudo-label must reach (UniMatch)

    c.method.gct = ConfigDict()  # Ke et al., ECCV 2020, and the values of their code
    c.method.gct.correction = 1.0  # weight of the flaw correction constraint
    c.method.gct.consistency = 100.0  # weight of the dynamic consistency constraint
    c.method.gct.ramp_up = 0.15  # of that weight, share of training (theirs: 3 of 20 epochs)
    c.method.gct.threshold = 0.6  # xi, flaw probability above which a prediction is bad
    c.method.gct.detector_weight = 10.0  # of the flaw detector's loss
    c.method.gct.detector_rate = 1e-4  # learning rate of the flaw detector at step 0, Adam
    c.method.gct.detector_width = 64  # channels of the flaw detector's first layer
    c.method.gct.repeats = 1  # nu, times that a flaw map is dilated and blurred again

    c.method.mean_teacher = ConfigDict()  # Tarvainen and Valpola, NeurIPS 2017, their Appendix B.1
    c.method.mean_teacher.weight = 100.0  # of the consistency loss
    c.method.mean_teacher.ramp_up = 0.25  # share of training (theirs: 40,000 of 150,000 steps)
    c.method.mean_teacher.noise = 0.15  # deviation of the input noise, after normalisation

    c.method.u2pl = ConfigDict()  # Wang et al., CVPR 2022
    c.method.u2pl.percentile = (80.0, 100.0)  # entropy of reliable pixels, first to last step
    c.method.u2pl.low_entropy = 20.0  # alpha_0, percent of anchors and negatives, falls to 0
    c.method.u2pl.anchor_probability = 0.3  # delta_p, that an anchor has for its class
    c.method.u2pl.ranks = (3, 20)  # r_l, r_h, ranks of a class for which a pixel is a negative
    c.method.u2pl.queue_size = 30_000  # negatives kept of each class
    c.method.u2pl.queue_size_first = 50_000  # of class 0
    c.method.u2pl.anchors = 256  # M, per class
    c.method.u2pl.negatives = 50  # N, per anchor
    c.method.u2pl.temperature = 0.5  # tau
    c.method.u2pl.weight = 1.0  # lambda_c

    c.method.unimatch = ConfigDict()  # Yang et al., CVPR 2023
    c.method.unimatch.threshold = 0.95  # probability that a pseudo-label must reach
    c.method.unimatch.feature_dropout = 0.5  # share of the channels (their Sec. 3.2)
    c.method.unimatch.strong_weight = 0.25  # of each of the two strong views
    c.method.unimatch.feature_weight = 0.5  # of the view with perturbed features

    # The strong view of fixmatch, unimatch and unimatch_v2, whatever the other methods have.
    c.method.unimatch_view = ConfigDict()  # UniMatch's code
    c.method.unimatch_view.color_jitter = 0.8  # probability of colour jitter
    c.method.unimatch_view.grayscale = 0.2  # probability of grey-scale
    c.method.unimatch_view.blur = 0.5  # probability of Gaussian blur
    c.method.unimatch_view.cutmix = 0.5  # probability of CutMix
    c.method.unimatch_view.cutmix_area = (0.02, 0.4)  # of the box, as a ratio of the image's area
    c.method.unimatch_view.cutmix_ratio = (0.3, 1 / 0.3)  # height of the box to its width

    c.method.unimatch_v2 = ConfigDict()  # Yang et al., TPAMI 2025
    c.method.unimatch_v2.threshold = 0.95  # probability that a pseudo-label must reach
    c.method.unimatch_v2.dropped = 0.5  # share of a batch's images that lose channels

    c.contrast = ConfigDict()  # the paper's module, part of csc; Tables I to IV switch its parts
    c.contrast.weight = 1.0  # lambda_c (Eq. 1, decisions.md 17)
    c.contrast.start = 0  # step from which L_p or L_c counts (decisions.md 11)
    c.contrast.halves = (
        "separate"  # separate | together: labelled and unlabelled (decisions.md 10a)
    )
    c.contrast.memory_bank = True  # Tables I, II; False = L_p over the mini-batch (Eq. 5)
    c.contrast.top_n = 1  # N of Eq. 6b (decisions.md 18); 0 = all positives
    # Queries of a half that are keys of its loss, evenly spaced; 0 = all, as in the paper. Time and
    # memory of the loss then grow with the batch and no longer with its square. Eq. 5 and 6 hold
    # over these keys and the bank: the sums over negatives have fewer terms, so the loss is lower,
    # and with top_n = 1 the nearest of fewer positives is less near (docs/scaling.md).
    c.contrast.max_keys = 0
    c.contrast.consistency = True  # Eq. 8 on the bank before each enqueue
    c.contrast.consistency_gate = "strict"  # strict | range | off (decisions.md 4)
    c.contrast.enqueue_gate = "range"  # strict | range | off (decisions.md 4)
    c.contrast.margin = 1.0  # x of the range gate, in units of Separ (decisions.md 4)
    c.contrast.class_mean = "per_image"  # per_image | pooled (decisions.md 6)
    c.contrast.bank_source = "student"  # student | teacher (decisions.md 8)
    c.contrast.bank_size = 2000  # S, features per class (decisions.md 2)
    c.contrast.pixels_per_class = 10  # U_f, per class and image and update (decisions.md 1)
    c.contrast.update_every = 1  # steps from one bank update to the next (decisions.md 1)
    c.contrast.views_per_class = 50  # queries per class and image (decisions.md 14)
    c.contrast.temperature = 0.1  # tau of Eq. 5b (decisions.md 12)
    c.contrast.min_fill = 1  # bank entries per class before L_c starts (decisions.md 11)
    c.contrast.absent_classes = ()  # class ids the data set lacks (decisions.md 11)

    c.loss = ConfigDict()
    c.loss.name = "cross_entropy"  # cross_entropy | ohem (decisions.md 21)
    c.loss.ohem_threshold = 0.7  # probability of the true class below which a pixel is hard
    c.loss.ohem_min_kept = 100_000  # pixels of a batch kept at least
    # Weight of each class in L_s: none | inverse_frequency | enet | numbers, one a class, "1,2.5,…"
    c.loss.class_weights = "none"  # the rules count the run's labelled images (docs/own_images.md)
    c.loss.focal_gamma = 0.0  # exponent of the focal loss (Lin et al. 2017: 2); 0 = cross entropy
    c.loss.dice_weight = 0.0  # weight of the soft Dice loss beside cross entropy in L_s; 0 = none
    c.loss.aux_weight = 0.0  # weight of the head on layer3; 0 = no such head (decisions.md 21)

    c.optimizer = ConfigDict()
    c.optimizer.name = "sgd"  # sgd | adamw
    c.optimizer.learning_rate = 1e-3  # at step 0, of the backbone
    c.optimizer.scale_rate = False  # True: learning_rate times batch.labeled / recipe_batch
    c.optimizer.recipe_batch = 0  # labelled images a step that the recipe's learning_rate is for
    c.optimizer.head_multiplier = 1.0  # learning rate of everything but the backbone, as a ratio
    c.optimizer.momentum = 0.9  # sgd only (decisions.md 24)
    c.optimizer.weight_decay = 1e-4  # every parameter (decisions.md 24); adamw decouples it
    c.optimizer.power = 0.9  # of the polynomial decay, per iteration (decisions.md 24)
    c.optimizer.warmup = 0  # steps of linear warm-up from 0
    c.optimizer.clip_norm = 0.0  # largest norm of a network's gradient; 0 = never clipped

    c.train = ConfigDict()
    c.train.steps = 0  # optimizer steps; 0 = take train.epochs instead
    c.train.epochs = 0.0  # passes over the unlabelled list where steps is 0 (decisions.md 20);
    # both 0 = the steps are chosen
    c.train.accumulate = 1  # parts of a batch, one after the other, to save memory (docs/faq.md)
    c.train.log_every = 10  # steps between progress lines and metric records
    c.train.eval_every = 100  # steps between evaluations; 0 = only at the end
    c.train.patience = 0  # evaluations without a higher val mIoU that end a run; 0 = never
    c.train.panels = 4  # val images drawn into W/plots at each evaluation
    c.train.report = True  # write W/report.html at the end, after one more pass over eval.split
    c.train.consistency_lag = 50  # T of Eq. 7, steps between the two feature maps of Cons
    c.train.max_rejected = 10  # steps in a row without finite loss and gradient that end a run

    c.eval = ConfigDict()
    c.eval.split = "val"  # split that is scored, or several as one, such as val+test
    c.eval.network = "teacher"  # teacher (decisions.md 19) | student
    c.eval.mode = "whole"  # whole | sliding | center_crop (decisions.md 25)
    c.eval.window = (0, 0)  # (height, width) px of window or centre crop; (0, 0) = data.crop_size
    c.eval.size_multiple = (
        1  # px; sides are padded to a multiple, to compile for few sizes; 1 = exact, each its own
    )
    c.eval.scales = (1.0,)  # ratios whose softmax outputs are averaged (mmsegmentation)
    c.eval.flip = False  # average with the mirrored image, too (mmsegmentation)
    c.eval.panels = 4  # worst and best images that evaluate draws, by their own mIoU; 0 = none

    c.checkpoint = ConfigDict()
    c.checkpoint.every = 0  # steps between checkpoints; 0 = at each evaluation
    c.checkpoint.keep = 2  # newest ones kept, besides the best by mIoU
    c.checkpoint.allow_new_unlabeled = False  # go on with other unlabelled images than before

    c.parallel = ConfigDict()
    c.parallel.devices = 0  # devices in the mesh; 0 = all that JAX sees
    c.parallel.fsdp = 1  # devices that share one copy of networks and optimizer state; 1 = none do

    c.debug = ConfigDict()
    c.debug.compilation_cache = True  # keep compiled programs in ~/.cache/csc_jax/xla between runs
    c.debug.nans = False  # jax's own checker: stops in the operation that makes a NaN; slow
    c.wandb = False  # also log to Weights & Biases; needs the package wandb
    return c


def resolve(config: ConfigDict, steps_per_epoch: int) -> ConfigDict:
    """Returns a copy with every length in steps (decisions.md 20) and the rate that counts.

    Args:
      config: a valid config.
      steps_per_epoch: steps of one pass over the unlabelled list.
    """
    config = config.copy_and_resolve_references()
    config.train.steps = config.train.steps or max(1, round(config.train.epochs * steps_per_epoch))
    config.train.epochs = 0.0
    if config.method.supervised_only_epochs:
        epochs = config.method.supervised_only_epochs
        config.method.supervised_only = round(epochs * steps_per_epoch)
        config.method.supervised_only_epochs = 0.0
    config.train.eval_every = config.train.eval_every or config.train.steps
    config.checkpoint.every = config.checkpoint.every or config.train.eval_every
    config.optimizer.learning_rate *= rate_scale(config)
    config.optimizer.scale_rate = False
    if not any(config.eval.window):
        config.eval.window = config.data.crop_size
    return config


def rate_scale(config: ConfigDict) -> float:
    """Returns what `resolve` multiplies the learning rate by: linear scaling, where it is on."""
    if not config.optimizer.scale_rate:
        return 1.0
    return float(config.batch.labeled / config.optimizer.recipe_batch)


def flatten(config: ConfigDict) -> dict[str, Any]:
    """Returns {"section.field": value} of all fields."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            flat |= {f"{name}.{field}": inner for field, inner in flatten(value).items()}
        else:
            flat[name] = value
    return flat


def to_plain(config: ConfigDict) -> dict[str, Any]:
    """Returns {"section.field": value} of what JSON can hold."""
    return json.loads(json.dumps(flatten(config)))


def from_plain(values: dict[str, Any]) -> ConfigDict:
    """Returns the config that `to_plain` was given; fields it lacks keep their defaults.

    Raises:
      UserError: it holds a field that this version does not know.
    """
    config = default_config()
    unknown = sorted(values.keys() - flatten(config).keys())
    if unknown:
        raise UserError(
            f"The stored config has the field {unknown[0]!r}, which this version of csc_jax does "
            "not know; use the version that wrote it, or pass --config=FILE."
        )
    config.update_from_flattened_dict(
        {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    )
    return config

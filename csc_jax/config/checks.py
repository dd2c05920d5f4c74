"""What a config may hold, and what of it may change from one part of a run to the next.

`defaults.py` has the fields themselves; one that is new there gets its choices or bounds here.
"""

import math
from typing import Any

from ml_collections import ConfigDict

from csc_jax import class_weights
from csc_jax.config import bands, changes, default_config, flatten, to_plain
from csc_jax.errors import UserError

_CHOICES: dict[str, tuple[Any, ...]] = {
    "data.labeled_fraction": ("1/2", "1/4", "1/8", "1/16", "1"),
    "data.pixel_type": ("", "uint8", "uint16", "float32"),
    "data.image_bits": (0, 9, 10, 11, 12, 13, 14, 15, 16),
    "data.pascal_voc.pool": ("blender", "classic"),
    "data.ade20k.labels": ("auto", "official", "shifted"),
    "model.output_stride": (8, 16, 32),
    "model.projection_stride": (1, 2, 4, 8),
    "model.dtype": ("float32", "bfloat16"),
    "method.contrast": ("none", "csc"),
    "method.unsupervised_mean": ("kept", "all"),
    "method.pseudo_label.mode": ("adaptive", "entropy", "confidence"),
    "contrast.halves": ("separate", "together"),
    "contrast.consistency_gate": ("strict", "range", "off"),
    "contrast.enqueue_gate": ("strict", "range", "off"),
    "contrast.class_mean": ("per_image", "pooled"),
    "contrast.bank_source": ("student", "teacher"),
    "loss.name": ("cross_entropy", "ohem"),
    "optimizer.name": ("sgd", "adamw"),
    "eval.network": ("teacher", "student"),
    "eval.mode": ("whole", "sliding", "center_crop"),
    "checkpoint.allow_new_unlabeled": (False, True),
}

# (lowest, highest) allowed value.
_RANGES: dict[str, tuple[float, float]] = {
    "data.bands": (1, bands.MOST),
    "data.threads": (0, math.inf),
    "data.prefetch": (0, math.inf),
    "data.workers": (0, math.inf),
    "data.max_unreadable": (0, math.inf),
    "data.synthetic.weather": (0, 1),
    "batch.labeled": (0, math.inf),
    "batch.unlabeled": (0, math.inf),
    "train.accumulate": (1, math.inf),
    "optimizer.recipe_batch": (0, math.inf),
    "batch.eval": (1, math.inf),
    "model.width": (1, math.inf),
    "model.decoder_width": (1, math.inf),
    "model.projection_dim": (1, math.inf),
    "model.dropout": (0, 0.999),
    "model.drop_path": (0, 0.999),
    "method.ema_decay": (0, 1),
    "method.supervised_only": (0, math.inf),
    "method.supervised_only_epochs": (0, math.inf),
    "method.lambda_u": (0, math.inf),
    "method.cutmix": (0, 1),
    "method.color_jitter": (0, 1),
    "method.grayscale": (0, 1),
    "method.blur": (0, 1),
    "method.pseudo_label.threshold": (0, 1),
    "method.pseudo_label.floor": (0, 1),
    "method.pseudo_label.gamma": (0, math.inf),
    "method.pseudo_label.confidence_ema": (0, 1),
    "method.cct.weight": (0, math.inf),
    "method.cct.ramp_up": (0, 1),
    "method.cct.con_msk": (0, math.inf),
    "method.cct.dropout": (0, math.inf),
    "method.cct.f_drop": (0, math.inf),
    "method.cct.f_noise": (0, math.inf),
    "method.cct.g_cutout": (0, math.inf),
    "method.cct.i_vat": (0, math.inf),
    "method.cct.obj_msk": (0, math.inf),
    "method.cct.dropout_rate": (0, 0.999),
    "method.cct.noise": (0, math.inf),
    "method.cct.erase": (0, 1),
    "method.cct.epsilon": (0, math.inf),
    "method.cps.weight": (0, math.inf),
    "method.fixmatch.threshold": (0, 1),
    "method.gct.correction": (0, math.inf),
    "method.gct.consistency": (0, math.inf),
    "method.gct.ramp_up": (0, 1),
    "method.gct.threshold": (0, 1),
    "method.gct.detector_weight": (0, math.inf),
    "method.gct.detector_rate": (0, math.inf),
    "method.gct.detector_width": (2, math.inf),
    "method.gct.repeats": (0, math.inf),
    "method.mean_teacher.weight": (0, math.inf),
    "method.mean_teacher.ramp_up": (0, 1),
    "method.mean_teacher.noise": (0, math.inf),
    "method.u2pl.low_entropy": (0, 100),
    "method.u2pl.anchor_probability": (0, 1),
    "method.u2pl.queue_size": (1, math.inf),
    "method.u2pl.queue_size_first": (1, math.inf),
    "method.u2pl.anchors": (1, math.inf),
    "method.u2pl.negatives": (1, math.inf),
    "method.u2pl.temperature": (1e-6, math.inf),
    "method.u2pl.weight": (0, math.inf),
    "method.unimatch.threshold": (0, 1),
    "method.unimatch.feature_dropout": (0, 0.999),
    "method.unimatch.strong_weight": (0, math.inf),
    "method.unimatch.feature_weight": (0, math.inf),
    "method.unimatch_view.color_jitter": (0, 1),
    "method.unimatch_view.grayscale": (0, 1),
    "method.unimatch_view.blur": (0, 1),
    "method.unimatch_view.cutmix": (0, 1),
    "method.unimatch_v2.threshold": (0, 1),
    "method.unimatch_v2.dropped": (0, 1),
    "contrast.weight": (0, math.inf),
    "contrast.start": (0, math.inf),
    "contrast.top_n": (0, math.inf),
    "contrast.max_keys": (0, math.inf),
    "contrast.bank_size": (1, math.inf),
    "contrast.pixels_per_class": (1, math.inf),
    "contrast.update_every": (1, math.inf),
    "contrast.views_per_class": (1, math.inf),
    "contrast.temperature": (1e-6, math.inf),
    "contrast.min_fill": (1, math.inf),
    "loss.ohem_threshold": (0, 1),
    "loss.ohem_min_kept": (1, math.inf),
    "loss.focal_gamma": (0, 10),
    "loss.dice_weight": (0, math.inf),
    "loss.aux_weight": (0, math.inf),
    "optimizer.learning_rate": (0, math.inf),
    "optimizer.momentum": (0, 1),
    "optimizer.weight_decay": (0, math.inf),
    "optimizer.warmup": (0, math.inf),
    "optimizer.clip_norm": (0, math.inf),
    "train.steps": (0, math.inf),
    "train.epochs": (0, math.inf),
    "train.log_every": (1, math.inf),
    "train.eval_every": (0, math.inf),
    "train.patience": (0, math.inf),
    "train.panels": (0, math.inf),
    "train.consistency_lag": (1, math.inf),
    "train.max_rejected": (1, math.inf),
    "eval.size_multiple": (1, math.inf),
    "eval.panels": (0, math.inf),
    "checkpoint.every": (0, math.inf),
    "checkpoint.keep": (1, math.inf),
    "parallel.devices": (0, math.inf),
    "parallel.fsdp": (1, math.inf),
}

# Fields that hold one number for each of a fixed set of axes.
_LENGTHS = {
    "data.image_size": 2,
    "data.crop_size": 2,
    "data.scale_range": 2,
    "data.synthetic.size": 2,
    "method.pseudo_label.percentile": 2,
    "method.u2pl.percentile": 2,
    "method.u2pl.ranks": 2,
    "method.cct.drop_range": 2,
    "method.unimatch_view.cutmix_area": 2,
    "method.unimatch_view.cutmix_ratio": 2,
    "eval.window": 2,
}

# Fields that hold the lowest and the highest value of a range, with the bounds of both.
_SPANS: dict[str, tuple[float, float]] = {
    "method.unimatch_view.cutmix_area": (0, 1),
    "method.unimatch_view.cutmix_ratio": (1e-3, 1e3),
}


def validate(config: ConfigDict) -> None:
    """Checks every field that can be checked without looking at data or devices.

    Raises:
      UserError: names the field, its value and what it takes.
    """
    fields = flatten(config)
    for name, choices in _CHOICES.items():
        if fields[name] not in choices:
            raise UserError(
                f"{name} is {fields[name]!r}; it takes one of {', '.join(map(repr, choices))}."
            )
    for name, (low, high) in _RANGES.items():
        if not low <= fields[name] <= high:
            bound = f"at least {low:g}" if math.isinf(high) else f"between {low:g} and {high:g}"
            raise UserError(f"{name} is {fields[name]}; it must be {bound}.")
    for name, length in _LENGTHS.items():
        if len(fields[name]) != length:
            raise UserError(
                f"{name} is {fields[name]}; it takes {length} numbers, as in "
                f"--config.{name}={','.join(['1'] * length)}."
            )
    for name, (low, high) in _SPANS.items():
        first, last = fields[name]
        if not low <= first <= last <= high:
            raise UserError(
                f"{name} is {fields[name]}; it takes the lowest and the highest value of a range "
                f"within {low:g} and {high:g}."
            )
    for name, default in flatten(default_config()).items():
        is_of_numbers = isinstance(default, tuple) and not any(isinstance(n, str) for n in default)
        if is_of_numbers and not all(isinstance(part, int | float) for part in fields[name]):
            raise UserError(f"{name} is {fields[name]}; it takes numbers with commas between them.")
        is_whole = is_of_numbers and default and all(isinstance(n, int) for n in default)
        if is_whole and not all(isinstance(part, int) for part in fields[name]):
            raise UserError(f"{name} is {fields[name]}; it takes whole numbers.")
    crop = tuple(config.data.crop_size)
    if any(crop) and min(crop) < 1:
        raise UserError(
            f"data.crop_size is {crop}; both sides must be at least 1 px, or both 0 to have them "
            "chosen from the data."
        )
    bands.check(config.data)
    scales = tuple(config.eval.scales)
    if not scales or min(scales) <= 0:
        raise UserError(
            f"eval.scales is {scales}; it takes one ratio above 0 or more, as in "
            "--config.eval.scales=0.75,1.0,1.25."
        )
    if config.train.patience and not config.train.eval_every:
        raise UserError(
            f"train.patience is {config.train.patience}, but train.eval_every is 0: the only "
            "evaluation is at the end. Give the steps between evaluations, as in "
            "--config.train.eval_every=500."
        )
    _check_loss(config)
    if config.optimizer.scale_rate and not config.optimizer.recipe_batch:
        raise UserError(
            "optimizer.scale_rate is on, but optimizer.recipe_batch is 0, so the batch that "
            "optimizer.learning_rate is meant for is not known. Give it, as in "
            "--config.optimizer.recipe_batch=16, or give the learning rate itself."
        )
    if not 0 <= config.optimizer.warmup <= config.train.steps and config.train.steps:
        raise UserError(
            f"optimizer.warmup is {config.optimizer.warmup} steps, more than the "
            f"{config.train.steps} of train.steps."
        )


def _check_loss(config: ConfigDict) -> None:
    """Checks what the parts of L_s are to each other."""
    loss = config.loss
    class_weights.given(loss.class_weights)
    if loss.focal_gamma and loss.name == "ohem":
        raise UserError(
            f"loss.name is 'ohem' and loss.focal_gamma is {loss.focal_gamma:g}: both make hard "
            "pixels count more, the one by leaving out the others, the other by their weight. Set "
            "--config.loss.focal_gamma=0 or --config.loss.name=cross_entropy."
        )
    changed = [
        name
        for name, off in (("class_weights", "none"), ("focal_gamma", 0.0), ("dice_weight", 0.0))
        if loss[name] != off
    ]
    if changed and config.method.name == "cct" and config.method.cct.annealed:
        raise UserError(
            f"loss.{changed[0]} is {loss[changed[0]]}, but method.cct.annealed is True: L_s is "
            "then CCT's annealed cross entropy alone. Set --config.method.cct.annealed=False."
        )


# What may change from one part of a run to the next: none of it alters the state.
_MAY_CHANGE = (
    *("data.root", "data.cache_dir", "data.threads", "data.prefetch", "data.max_unreadable"),
    *("batch.eval", "train.steps", "train.log_every", "train.eval_every", "train.panels"),
    *(
        "train.patience",
        "model.remat",
        "train.max_rejected",
        "train.report",
        "eval.",
        "checkpoint.",
        "parallel.",
        "debug.",
        "wandb",
    ),
)


# What may change besides where the images themselves are compared (`training.identity`).
_SAY_WHICH_IMAGES = ("data.labeled_list", "data.unlabeled_list", "data.labeled_fraction")


def check_resumed(
    stored: dict[str, Any], config: ConfigDict, version: str, *, images_compared: bool = False
) -> list[str]:
    """Compares the config of a checkpoint with the one that is to continue it.

    Args:
      stored: `to_plain` of the resolved config in the checkpoint.
      config: resolved.
      version: of this package, that wrote the checkpoint.
      images_compared: whether the checkpoint says which images it was trained on, so that fields
        that choose them may change as long as they choose the same.

    Returns:
      One line for each field that differs and may.

    Raises:
      UserError: fields differ that make it another run; it names each with both values. Or it
        cannot be continued by this version (`changes`).
    """
    now, defaults = to_plain(config), to_plain(default_config())
    before = defaults | stored  # a version before may have had fewer fields
    before = before | changes.fields_before(before, version) | stored
    changed = [name for name in now if now[name] != before[name]]
    lines = {name: f"{name}: {before[name]} before, {now[name]} now" for name in changed}
    may_change = _MAY_CHANGE + (_SAY_WHICH_IMAGES if images_compared else ())
    refused = [name for name in changed if not name.startswith(may_change)]
    if refused:
        raise UserError(
            f"The work directory holds a run of another config: "
            f"{'; '.join(lines[name] for name in refused)}. Give these fields their old values to "
            "continue it, or choose another --workdir."
        )
    return list(lines.values())

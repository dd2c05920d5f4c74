"""PyTorch's names and layouts of weights, and ours: in, out, and into a run's first state."""

import dataclasses
import functools
import logging
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from csc_jax.errors import UserError
from csc_jax.models import first_layer, transformer_weights, weight_files
from csc_jax.models.resnet import DEPTHS, Bottleneck
from csc_jax.models.weight_files import StateDict, locate, read_weights, unwrap

log = logging.getLogger("csc_jax")

# Where a file holds several networks, the first of these; UniMatch V2's teacher is `model_ema`.
TEACHER = ("teacher_state", "model_ema", *weight_files.TEACHER)
STUDENT = (*weight_files.STUDENT, "model_ema")

Path = tuple[str, ...]  # (collection, *modules, leaf) of one of our arrays
Rules = tuple[tuple[str, str], ...]  # (layer in PyTorch, module here); {x} stands for a number

_RESNET: Rules = (
    ("layer{s}.{b}.conv{n}", "backbone/layer{s}_{b}/conv{n}/conv"),
    ("layer{s}.{b}.bn{n}", "backbone/layer{s}_{b}/conv{n}/bn"),
    ("layer{s}.{b}.downsample.0", "backbone/layer{s}_{b}/downsample/conv"),
    ("layer{s}.{b}.downsample.1", "backbone/layer{s}_{b}/downsample/bn"),
)
_PLAIN_STEM: Rules = (
    ("conv1", "backbone/stem1/conv"),
    ("bn1", "backbone/stem1/bn"),
)
_DEEP_STEM: Rules = (
    ("conv1.0", "backbone/stem1/conv"),
    ("conv1.1", "backbone/stem1/bn"),
    ("conv1.3", "backbone/stem2/conv"),
    ("conv1.4", "backbone/stem2/bn"),
    ("conv1.6", "backbone/stem3/conv"),
    ("bn1", "backbone/stem3/bn"),
)
_EFFICIENTNET_LITE: Rules = (
    ("_conv_stem", "backbone/stem"),
    ("_bn0", "backbone/stem/bn"),
    ("_blocks.{b}._expand_conv", "backbone/block{b}/expand"),
    ("_blocks.{b}._bn0", "backbone/block{b}/expand/bn"),
    ("_blocks.{b}._depthwise_conv", "backbone/block{b}/depthwise"),
    ("_blocks.{b}._bn1", "backbone/block{b}/depthwise/bn"),
    ("_blocks.{b}._project_conv", "backbone/block{b}/project"),
    ("_blocks.{b}._bn2", "backbone/block{b}/project/bn"),
)
_DECODER: Rules = (  # of the lineage (U2PL)
    ("decoder.low_conv.0", "low_level/conv"),
    ("decoder.low_conv.1", "low_level/bn"),
    ("decoder.aspp.conv1.1", "aspp/pool/conv"),
    ("decoder.aspp.conv1.2", "aspp/pool/bn"),
    ("decoder.aspp.conv2.0", "aspp/point/conv"),
    ("decoder.aspp.conv2.1", "aspp/point/bn"),
    ("decoder.aspp.conv3.0", "aspp/atrous0/conv"),
    ("decoder.aspp.conv3.1", "aspp/atrous0/bn"),
    ("decoder.aspp.conv4.0", "aspp/atrous1/conv"),
    ("decoder.aspp.conv4.1", "aspp/atrous1/bn"),
    ("decoder.aspp.conv5.0", "aspp/atrous2/conv"),
    ("decoder.aspp.conv5.1", "aspp/atrous2/bn"),
    ("decoder.head.0", "fuse/conv"),
    ("decoder.head.1", "fuse/bn"),
    ("decoder.classifier.0", "classifier/conv1/conv"),
    ("decoder.classifier.1", "classifier/conv1/bn"),
    ("decoder.classifier.4", "classifier/conv2/conv"),
    ("decoder.classifier.5", "classifier/conv2/bn"),
    ("decoder.classifier.8", "classifier/out"),
    ("decoder.representation.0", "projection/conv1/conv"),
    ("decoder.representation.1", "projection/conv1/bn"),
    ("decoder.representation.4", "projection/conv2/conv"),
    ("decoder.representation.5", "projection/conv2/bn"),
    ("decoder.representation.8", "projection/out"),
    ("auxor.aux.0", "auxiliary/conv1/conv"),
    ("auxor.aux.1", "auxiliary/conv1/bn"),
    ("auxor.aux.4", "auxiliary/out"),
)


@dataclasses.dataclass(frozen=True)
class Family:
    """A way to name the layers of a network."""

    name: str
    marker: str  # a layer by which the family is recognised
    rules: Rules
    unused: tuple[str, ...] = ()  # layers without a place here: the classifier of a backbone
    whole: bool = False  # backbone and decoder; otherwise a backbone alone


_BACKBONES = (
    Family("ResNet with a 7x7 stem", "conv1", _PLAIN_STEM + _RESNET, ("fc",)),
    Family("ResNet with a deep stem", "conv1.0", _DEEP_STEM + _RESNET, ("fc",)),
    Family("EfficientNet-Lite", "_conv_stem", _EFFICIENTNET_LITE, ("_conv_head", "_bn1", "_fc")),
)
_NETWORKS = tuple(
    Family(
        f"DeepLabv3+ on {family.name}",
        f"encoder.{family.marker}",
        tuple((f"encoder.{layer}", module) for layer, module in family.rules) + _DECODER,
        tuple(f"encoder.{layer}" for layer in family.unused),
        whole=True,
    )
    for family in _BACKBONES
)

_LEAVES = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
_TORCH_LEAVES = {ours: theirs for theirs, ours in _LEAVES.items()}
_HEADS = {  # some methods lack them
    "projection": ("decoder.representation.", "head.projection."),
    "auxiliary": ("auxor.",),
}


def convert_torch_state_dict(
    state_dict: Mapping[str, Any], variables: Mapping[str, Any], strict: bool = True
) -> dict[str, Any]:
    """Returns `variables` with the values of a PyTorch state dict, float32.

    A state dict of a backbone leaves the rest of `variables` as it is.

    Args:
      state_dict: name -> array, with or without the prefix "module." of DistributedDataParallel,
        itself or under one of `TEACHER`.
      variables: {"params", "batch_stats"} of a network, as arrays or as their shapes.
      strict: False lets both sides have arrays that the other lacks, or has in another shape;
        they keep the value in `variables` and are listed in the log.

    Raises:
      UserError: it is of no known family, or, if `strict`, does not fit; names every array. A
        first convolution of RGB fits a network of any number of bands (`first_layer.adapt`).
    """
    state: dict[str, Any] = {
        k.removeprefix("module."): v for k, v in unwrap(state_dict, TEACHER).items()
    }
    if transformer_weights.recognizes(state) and transformer_weights.is_transformer(variables):
        converted, problems, theirs = transformer_weights.convert(state, variables)
        if problems:
            ours = transformer_weights.describe(_shapes(variables))
            _refuse(_reason(theirs, ours), problems, strict)
        return converted
    family = _family_of(state)
    leaves = flatten_dict(dict(variables))
    first = ("params", *str(_rename(family.marker, family.rules)).split("/"), "kernel")
    if first in leaves:
        kernel = f"{family.marker}.weight"
        state[kernel] = first_layer.adapt(state[kernel], leaves[first].shape[2])
    wanted = {p: leaf.shape for p, leaf in leaves.items() if family.whole or p[1] == "backbone"}
    found: dict[Path, np.ndarray] = {}
    problems = []
    for name, value in state.items():
        layer, _, leaf = name.rpartition(".")
        if layer in family.unused or leaf == "num_batches_tracked":
            continue
        module = _rename(layer, family.rules)
        if module is None or leaf not in _LEAVES:
            problems.append(f"{name} {value.shape} is not of the family {family.name}")
            continue
        path, array = _to_ours(module, leaf, value)
        found[path] = array
        if path not in wanted:
            problems.append(f"{name} {value.shape} has no place in the network")
        elif array.shape != wanted[path]:
            problems.append(
                f"{name} is {array.shape} in our layout, {'/'.join(path)} is {wanted[path]}"
            )
    problems += [
        f"{'/'.join(path)} {wanted[path]} is not in the weights"
        for path in sorted(wanted.keys() - found.keys())
    ]
    if problems:
        theirs = _describe({path: array.shape for path, array in found.items()})
        _refuse(_reason(theirs, _describe(wanted)), problems, strict)
    fitting = {p: a for p, a in found.items() if p in wanted and a.shape == wanted[p]}
    return unflatten_dict(leaves | fitting)


def to_torch_state_dict(variables: Mapping[str, Any], names: str = "") -> StateDict:
    """Returns a network's arrays, float32, under published names and in PyTorch's layouts.

    A DeepLabv3+ gets those of the lineage (U2PL), a transformer with its head those of UniMatch V2.
    `num_batches_tracked` is left out; `load_state_dict` does without it.

    Args:
      variables: {"params", "batch_stats"} of a network.
      names: "" for these; meta, transformers or timm for a transformer alone, without its head.

    Raises:
      UserError: there are no such names, or none for a layer, such as a fourth branch of ASPP.
    """
    if transformer_weights.is_transformer(variables):
        return transformer_weights.to_state_dict(variables, names or "unimatch_v2")
    if names not in ("", "u2pl"):
        raise UserError(f"names is {names!r}, but a DeepLabv3+ has those of U2PL alone; leave it.")
    leaves = flatten_dict(dict(variables))
    modules = {"/".join(path[1:-1]) for path in leaves}
    for family in _NETWORKS:
        rules = tuple((module, layer) for layer, module in family.rules)
        layers = {module: _rename(module, rules) for module in modules}
        unnamed = sorted(module for module, layer in layers.items() if layer is None)
        if not unnamed:
            break
    else:
        raise UserError(f"PyTorch's DeepLabv3+ of the lineage has no name for {unnamed}.")
    state = {}
    for path, value in leaves.items():
        layer = layers["/".join(path[1:-1])]
        array = np.asarray(value, np.float32)
        if path[-1] == "kernel":
            state[f"{layer}.weight"] = np.ascontiguousarray(array.transpose(3, 2, 0, 1))
        else:
            state[f"{layer}.{_TORCH_LEAVES[path[-1]]}"] = array
    return state


def load_pretrained(source: str, variables: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the part of `variables` that pretrained weights have, as float32 arrays of NumPy.

    Args:
      source: `model.pretrained`, other than "none".
      variables: {"params", "batch_stats"} of the network that is to start from them; shapes do.

    Raises:
      UserError: no such file, or weights that do not fit the network or are not finite.
    """
    path = locate(source)
    state = drop_absent_heads(read_weights(path, TEACHER), variables)
    try:
        with np.errstate(over="ignore"):  # what overflows is infinite, and named below
            converted = convert_torch_state_dict(state, variables)
    except UserError as error:
        raise UserError(f"model.pretrained is {source!r}. {error}") from error
    leaves = flatten_dict(converted)
    taken = {path: leaf for path, leaf in leaves.items() if isinstance(leaf, np.ndarray)}
    broken = sorted("/".join(at) for at, leaf in taken.items() if not np.isfinite(leaf).all())
    if broken:
        raise UserError(
            f"model.pretrained is {source!r}, and {len(broken)} of its {len(taken)} arrays hold "
            f"NaN or infinity in float32, the first of them {broken[0]}. The training that wrote "
            "it had diverged, or the file is damaged; take an earlier one or download it again."
        )
    log.info("%d of %d arrays of the network come from %s", len(taken), len(leaves), path.name)
    return unflatten_dict(taken)


def drop_absent_heads(
    state_dict: Mapping[str, Any], variables: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns a state dict without the projection or auxiliary head that the network lacks."""
    absent = (names for head, names in _HEADS.items() if head not in variables["params"])
    prefixes = tuple(name for names in absent for name in names)
    return {
        name: value
        for name, value in state_dict.items()
        if not name.removeprefix("module.").startswith(prefixes)
    }


def overlay(variables: Mapping[str, Any], part: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `variables` with the arrays that `part` has in the same places."""
    leaves, new = flatten_dict(dict(variables), keep_empty_nodes=True), flatten_dict(dict(part))
    return unflatten_dict({path: new.get(path, leaf) for path, leaf in leaves.items()})


def _family_of(state: Mapping[str, Any]) -> Family:
    for family in (*_BACKBONES, *_NETWORKS):
        if f"{family.marker}.weight" in state:
            return family
    if transformer_weights.recognizes(state):
        raise UserError(
            "The weights are a vision transformer's, and the network is a DeepLabv3+. Set "
            "--config.model.backbone to the transformer, such as dinov2_small."
        )
    known = ", ".join(family.name for family in (*_BACKBONES, *_NETWORKS))
    known += ", DINOv2, DINOv3 and UniMatch V2 on them"
    raise UserError(
        f"The weights are of no known family ({known}): their names begin with "
        f"{', '.join(list(state)[:3]) or 'nothing'}."
    )


def _rename(name: str, rules: Rules) -> str | None:
    for source, target in rules:
        match = _pattern(source).fullmatch(name)
        if match:
            return target.format(**match.groupdict())
    return None


@functools.cache
def _pattern(template: str) -> re.Pattern[str]:
    """Turns "{x}" into a named group of digits."""
    return re.compile(re.sub(r"\\{(\w)\\}", r"(?P<\1>\\d+)", re.escape(template)))


def _to_ours(module: str, leaf: str, value: np.ndarray) -> tuple[Path, np.ndarray]:
    array = np.asarray(value, np.float32)
    leaf = _LEAVES[leaf]
    if array.ndim == 4:
        leaf, array = "kernel", np.ascontiguousarray(array.transpose(2, 3, 1, 0))
    collection = "batch_stats" if leaf in ("mean", "var") else "params"
    return (collection, *module.split("/"), leaf), array


def _refuse(reason: str, problems: list[str], strict: bool) -> None:
    message = f"The weights do not fit the network. {reason}" + "\n  ".join(["", *problems])
    if strict:
        raise UserError(message)
    log.warning("%s", message)


def _shapes(variables: Mapping[str, Any]) -> dict[Path, tuple[int, ...]]:
    return {path: leaf.shape for path, leaf in flatten_dict(dict(variables)).items()}


def _reason(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """Says in which fields of config.model the two backbones differ."""
    different = {field: value for field, value in theirs.items() if ours.get(field) != value}
    if not different:
        return "Their backbone is the same, these arrays are not:"
    flags = " ".join(f"--config.model.{field}={value}" for field, value in different.items())
    held = ", ".join(f"{field} {ours[field]}" for field in different if field in ours)
    return f"They are for {flags}, the network has {held}:"


def _describe(shapes: Mapping[Path, Any]) -> dict[str, Any]:
    """Returns the fields of config.model that tell one backbone from another."""
    if ("params", "backbone", "blocks", "qkv", "kernel") in shapes:
        return transformer_weights.describe(shapes)
    modules = {path[2:4] for path in shapes if path[1] == "backbone"}
    blocks = {first for first, _ in modules}
    if "block0" in blocks:
        return {"backbone": "efficientnet_lite0"}
    bottleneck = ("layer1_0", "conv3") in modules
    depths = tuple(sum(b.startswith(f"layer{s}_") for b in blocks) for s in range(1, 5))
    names = (
        name
        for name, (block, known) in DEPTHS.items()
        if known == depths and (block is Bottleneck) == bottleneck
    )
    described: dict[str, Any] = {
        "backbone": next(names, f"(ResNet of {depths} blocks)"),
        "stem": "deep" if "stem3" in blocks else "7x7",
    }
    kernel = ("params", "backbone", "layer1_0", "conv1", "conv", "kernel")
    return described | ({"width": shapes[kernel][-1]} if kernel in shapes else {})

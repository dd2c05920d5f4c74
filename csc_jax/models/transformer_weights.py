"""Published names and layouts of vision transformers, and ours.

Every naming is first brought to that of UniMatch V2's checkpoints: Meta's names after "backbone.",
and the DPT head's after "head.". The projection head, which theirs lacks, is "head.projection".
"""

import dataclasses
import logging
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from csc_jax.errors import UserError
from csc_jax.models import first_layer
from csc_jax.models.vit import FORMS, resize_positions

log = logging.getLogger("csc_jax")

State = Mapping[str, np.ndarray]
Path = tuple[str, ...]  # (collection, *modules, leaf) of one of our arrays

# How the axes of a PyTorch array are put to ours, and back.
_AXES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "as it is": ((0,), (0,)),
    "linear": ((1, 0), (1, 0)),
    "convolution": ((2, 3, 1, 0), (3, 2, 0, 1)),
    "transposed convolution": ((2, 3, 0, 1), (2, 3, 0, 1)),
    "tokens": ((0, 1), (0, 1)),  # one axis more there, in front
    "token": ((0, 1), (0, 1)),
}


class _Rule(NamedTuple):
    theirs: str  # {b} stands for the number of a block, whose arrays are stacked here
    ours: str
    layout: str


def _both(theirs: str, ours: str, layout: str) -> tuple[_Rule, _Rule]:
    """The rules of a layer's weight and bias."""
    leaf = "scale" if layout == "as it is" else "kernel"
    return (
        _Rule(f"{theirs}.weight", f"{ours}/{leaf}", layout),
        _Rule(f"{theirs}.bias", f"{ours}/bias", "as it is"),
    )


def _encoder() -> tuple[_Rule, ...]:
    block, ours = "backbone.blocks.{b}", "backbone/blocks"
    return (
        _Rule("backbone.cls_token", "backbone/cls_token", "tokens"),
        _Rule("backbone.pos_embed", "backbone/pos_embed", "tokens"),
        _Rule("backbone.register_tokens", "backbone/register_tokens", "tokens"),
        _Rule("backbone.mask_token", "backbone/mask_token", "token"),
        *_both("backbone.patch_embed.proj", "backbone/patch_embed", "convolution"),
        *_both(f"{block}.norm1", f"{ours}/norm1", "as it is"),
        *_both(f"{block}.attn.qkv", f"{ours}/qkv", "linear"),
        *_both(f"{block}.attn.proj", f"{ours}/proj", "linear"),
        _Rule(f"{block}.ls1.gamma", f"{ours}/scale1/scale", "as it is"),
        *_both(f"{block}.norm2", f"{ours}/norm2", "as it is"),
        *_both(f"{block}.mlp.fc1", f"{ours}/fc1", "linear"),
        *_both(f"{block}.mlp.fc2", f"{ours}/fc2", "linear"),
        _Rule(f"{block}.ls2.gamma", f"{ours}/scale2/scale", "as it is"),
        *_both("backbone.norm", "backbone/norm", "as it is"),
    )


def _head() -> tuple[_Rule, ...]:
    rules: list[_Rule] = []
    convolution = "convolution"
    for i in (1, 2, 3, 4):
        rules += _both(f"head.projects.{i - 1}", f"assemble{i}/project", convolution)
        resize = f"head.resize_layers.{i - 1}", f"assemble{i}/resize"
        if i != 3:
            rules += _both(*resize, convolution if i == 4 else "transposed convolution")
        reduce = f"head.scratch.layer{i}_rn.weight", f"assemble{i}/reduce/kernel"
        rules.append(_Rule(*reduce, convolution))
        fusion = f"head.scratch.refinenet{i}"
        rules += _both(f"{fusion}.out_conv", f"fuse{i}/out", convolution)
        for u in (1, 2):
            for n in (1, 2):
                theirs = f"{fusion}.resConfUnit{u}.conv{n}"
                rules += _both(theirs, f"fuse{i}/unit{u}/conv{n}", convolution)
    for theirs, ours in (
        ("head.scratch.output_conv", "classifier"),
        ("head.projection", "projection"),
    ):
        rules += _both(f"{theirs}.0", f"{ours}/conv1", convolution)
        rules += _both(f"{theirs}.2", f"{ours}/out", convolution)
    return tuple(rules)


_RULES = {rule.ours: rule for rule in (*_encoder(), *_head())}

# transformers, as files on its Hub have them and, since version 5, its networks: (theirs, ours).
_TRANSFORMERS = (
    (r"embeddings\.(cls_token|mask_token|register_tokens)", r"\1"),
    (r"embeddings\.position_embeddings", r"pos_embed"),
    (r"embeddings\.patch_embeddings(?:\.projection)?\.(weight|bias)", r"patch_embed.proj.\1"),
    (r"(?:encoder\.|model\.)?layer\.(\d+)\.(norm[12])\.(weight|bias)", r"blocks.\1.\2.\3"),
    (
        r"(?:encoder\.|model\.)?layer\.(\d+)\.attention\.(?:output\.dense|o_proj)\.(weight|bias)",
        r"blocks.\1.attn.proj.\2",
    ),
    (
        r"(?:encoder\.|model\.)?layer\.(\d+)\.attention\.(?:attention\.)?"
        r"(?:(q)uery|(k)ey|(v)alue|(q)_proj|(k)_proj|(v)_proj)\.(weight|bias)",
        r"blocks.\1.attn.\2\3\4\5\6\7.\8",
    ),
    (r"(?:encoder\.|model\.)?layer\.(\d+)\.layer_scale([12])\.lambda1", r"blocks.\1.ls\2.gamma"),
    (
        r"(?:encoder\.|model\.)?layer\.(\d+)\.mlp\.(?:fc1|up_proj)\.(weight|bias)",
        r"blocks.\1.mlp.fc1.\2",
    ),
    (
        r"(?:encoder\.|model\.)?layer\.(\d+)\.mlp\.(?:fc2|down_proj)\.(weight|bias)",
        r"blocks.\1.mlp.fc2.\2",
    ),
    (r"(?:layernorm|norm)\.(weight|bias)", r"norm.\1"),
)
_OTHERS = (  # timm's and Meta's own name of DINOv3's registers
    (r"reg_token|storage_tokens", r"register_tokens"),
)
_MARKERS = (
    "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.weight",
    "embeddings.patch_embeddings.weight",
)
_PREFIXES = ("", "backbone.", "dinov2.", "dinov2_with_registers.", "dinov3_vit.")
# Of the pretraining, of a classifier, or computed: nothing here learns from them.
_UNUSED = re.compile(r"(?:head|fc|classifier|fc_norm)\.(?:weight|bias)|rope_embed\..*|.*bias_mask")
# Without an effect on any output, so that a file may lack it (timm).
_OPTIONAL = ("backbone.mask_token",)

NAMINGS = ("unimatch_v2", "meta", "transformers", "timm")  # what `to_state_dict` takes


def recognizes(state: Mapping[str, Any]) -> bool:
    """Whether a state dict, without the prefix "module.", is of a transformer."""
    return _prefix_of(state) is not None


def is_transformer(variables: Mapping[str, Any]) -> bool:
    """Whether a network's arrays, or their shapes, are a transformer's."""
    return "blocks" in variables["params"].get("backbone", {})


def convert(
    state: State, variables: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str], dict[str, Any]]:
    """Returns `variables` with the values that fit, what does not, and what the file is for.

    An encoder alone leaves the rest of `variables` as it is. A file without a projection head
    leaves that; a learnt grid of positions of another size is resized.

    Args:
      state: name -> array, without the prefix "module."; `recognizes` it.
      variables: {"params"} of a DPT, as arrays or as their shapes.

    Returns:
      The arrays, float32; a line for each one that is missing, left over or of another shape; and
      {"backbone": name}, the field of config.model that would fit.
    """
    given, origin = _to_canonical(state)
    whole = any(name.startswith("head.") for name in given)
    leaves = flatten_dict(dict(variables))
    places = {
        name: place
        for name, place in _places(leaves).items()
        if name.startswith("backbone.")
        or (whole and (not name.startswith("head.projection.") or name in given))
    }
    given = _resized_positions(given, places)
    kernel = "backbone.patch_embed.proj.weight"
    if kernel in given and kernel in places:
        given[kernel] = first_layer.adapt(given[kernel], places[kernel].shape[1])
    problems = []
    arrays: dict[Path, dict[int | None, np.ndarray]] = {}
    for name, value in given.items():
        theirs = origin.get(name, name)
        if name not in places:
            problems.append(f"{theirs} {value.shape} has no place in the network")
            continue
        place = places[name]
        if not _fits(value.shape, place):
            problems.append(f"{theirs} is {value.shape}, the network has {place.shape}")
            continue
        array = np.asarray(value, np.float32).reshape(place.shape)
        arrays.setdefault(place.path, {})[place.block] = _to_ours(array, place.rule.layout)
    problems += [
        f"{name} {places[name].shape} is not in the weights"
        for name in sorted(places.keys() - given.keys())
        if name not in _OPTIONAL
    ]
    for path, parts in arrays.items():
        if None in parts:
            leaves[path] = parts[None]
        elif len(parts) == leaves[path].shape[0]:
            leaves[path] = np.stack([parts[b] for b in range(len(parts))])
    return unflatten_dict(leaves), problems, describe_names(given)


def to_state_dict(variables: Mapping[str, Any], naming: str = "unimatch_v2") -> dict[str, Any]:
    """Returns a DPT's arrays, float32, under published names and in PyTorch's layouts.

    Args:
      variables: {"params"} of a DPT.
      naming: unimatch_v2, the whole network; or the encoder alone: meta, as DINOv2 and DINOv3
        publish it; transformers, as its Hub has it; timm, which has DINOv2 in this form.

    Raises:
      UserError: no such naming, or one without names for this encoder.
    """
    if naming not in NAMINGS:
        raise UserError(f"names is {naming!r}; it takes one of {', '.join(NAMINGS)}.")
    leaves = flatten_dict(dict(variables))
    state = {}
    for name, place in _places(leaves).items():
        value = np.asarray(leaves[place.path], np.float32)
        value = value if place.block is None else value[place.block]
        _, back = _AXES[place.rule.layout]
        state[name] = np.ascontiguousarray(value.transpose(back)).reshape(place.shape)
    if naming == "unimatch_v2":
        return state
    encoder = {
        name.removeprefix("backbone."): value
        for name, value in state.items()
        if name.startswith("backbone.")
    }
    rotary = "pos_embed" not in encoder
    if naming == "transformers":
        return _to_transformers(encoder, rotary)
    if naming == "timm":
        if rotary:
            raise UserError("timm has no DINOv3 under these names; take meta or transformers.")
        return _to_timm(encoder)
    if rotary:
        encoder["storage_tokens"] = encoder.pop("register_tokens")
    return encoder


def describe(shapes: Mapping[Path, Any]) -> dict[str, Any]:
    """Returns the field of config.model that tells this transformer from another.

    Args:
      shapes: of our arrays, by path.
    """
    named = {
        name: np.broadcast_to(np.float32(0), place.shape)
        for name, place in _places(shapes, shapes_only=True).items()
    }
    return describe_names(named)


def describe_names(given: State) -> dict[str, Any]:
    """Returns {"backbone": name} of arrays under canonical names."""
    kernel = given.get("backbone.patch_embed.proj.weight")
    blocks = [re.match(r"backbone\.blocks\.(\d+)\.", name) for name in given]
    depth = 1 + max((int(found[1]) for found in blocks if found), default=-1)
    if kernel is None or kernel.ndim != 4:
        return {"backbone": f"(a transformer of {depth} blocks)"}
    width, _, _, patch = kernel.shape
    registers = given.get("backbone.register_tokens")
    has = {
        "width": width,
        "depth": depth,
        "patch": patch,
        "registers": 0 if registers is None else registers.shape[-2],
    }
    rotary = "backbone.pos_embed" not in given
    for name, form in FORMS.items():
        if has.items() <= dataclasses.asdict(form).items() and rotary == (not form.grid):
            return {"backbone": name}
    return {
        "backbone": f"(a transformer of {depth} blocks and {width} channels, patches of {patch} px)"
    }


class _Place(NamedTuple):
    """Where an array under a canonical name belongs."""

    path: Path
    block: int | None
    rule: _Rule
    shape: tuple[int, ...]  # in PyTorch's layout


def _places(leaves: Mapping[Path, Any], *, shapes_only: bool = False) -> dict[str, _Place]:
    """Returns the places of a network's arrays by canonical name."""
    places = {}
    for path, leaf in leaves.items():
        shape = tuple(leaf) if shapes_only else tuple(leaf.shape)
        rule = _RULES["/".join(path[1:])]
        stacked = "{b}" in rule.theirs
        inner = shape[1:] if stacked else shape
        _, back = _AXES[rule.layout]
        inner = (1, *inner) if rule.layout == "tokens" else tuple(inner[axis] for axis in back)
        for block in range(shape[0]) if stacked else (None,):
            places[rule.theirs.format(b=block)] = _Place(path, block, rule, inner)
    return places


def _to_ours(array: np.ndarray, layout: str) -> np.ndarray:
    axes, _ = _AXES[layout]
    array = array[0] if layout == "tokens" else array
    return np.ascontiguousarray(array.transpose(axes))


def _fits(shape: tuple[int, ...], place: _Place) -> bool:
    """Tokens may come with any number of axes in front."""
    if place.rule.layout.startswith("token"):
        return shape[-2:] == place.shape[-2:] and math.prod(shape) == math.prod(place.shape)
    return shape == place.shape


def _prefix_of(state: Mapping[str, Any]) -> str | None:
    for prefix in _PREFIXES:
        if any(prefix + marker in state for marker in _MARKERS):
            return prefix
    return None


def _to_canonical(state: State) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Returns arrays under canonical names, and the name that each has in the file."""
    prefix = _prefix_of(state)
    assert prefix is not None
    given: dict[str, np.ndarray] = {}
    origin: dict[str, str] = {}
    of_head = prefix == "backbone." and any(name.startswith("head.projects.") for name in state)
    for name, value in state.items():
        if of_head and name.startswith("head."):
            given[name] = value
            continue
        inner = name.removeprefix(prefix)
        if not name.startswith(prefix) and not _UNUSED.fullmatch(name):
            given[name] = value  # of no known kind
            continue
        if _UNUSED.fullmatch(inner):
            continue
        canonical = f"backbone.{_renamed(inner)}"
        given[canonical], origin[canonical] = value, name
    return _with_joined_keys(given, origin), origin


def _renamed(name: str) -> str:
    for pattern, ours in (*_TRANSFORMERS, *_OTHERS):
        match = re.fullmatch(pattern, name)
        if match:
            return match.expand(ours)
    return name


def _with_joined_keys(
    given: dict[str, np.ndarray], origin: dict[str, str]
) -> dict[str, np.ndarray]:
    """Makes one array of queries, keys and values; DINOv3's keys have no bias, which is 0 here."""
    joined: dict[str, np.ndarray] = {}
    rotary = "backbone.pos_embed" not in given
    for name, value in given.items():
        match = re.fullmatch(r"(backbone\.blocks\.\d+\.attn\.)([qkv])\.(weight|bias)", name)
        if not match:
            joined[name] = value
            continue
        start, _, leaf = match.groups()
        parts = [given.get(f"{start}{part}.{leaf}") for part in "qkv"]
        if rotary and parts[1] is None and leaf == "bias" and parts[0] is not None:
            parts[1] = np.zeros_like(parts[0])
        whole = f"{start}qkv.{leaf}"
        known = [part for part in parts if part is not None]
        if len(known) == 3 and len({part.shape for part in known}) == 1:
            joined[whole] = np.concatenate(known)
            origin[whole] = f"{origin[name]} with its fellows"
        else:
            joined[name] = value  # will be listed as one without a place
    return joined


def _resized_positions(given: State, places: Mapping[str, _Place]) -> dict[str, np.ndarray]:
    """Returns the arrays with position embeddings of the network's grid.

    timm's are without a row for the class token where there are registers; it is 0 here.
    """
    name = "backbone.pos_embed"
    given = dict(given)
    if name not in given or name not in places or given[name].ndim != 3:
        return given
    learnt, wanted = np.asarray(given[name], np.float32)[0], places[name].shape[1]
    if math.isqrt(len(learnt)) ** 2 == len(learnt):
        learnt = np.concatenate([np.zeros_like(learnt[:1]), learnt])
    side, ours = math.isqrt(len(learnt) - 1), math.isqrt(wanted - 1)
    if side * side != len(learnt) - 1:
        return given
    if side != ours:
        log.info(
            "position embeddings of %d x %d patches are resized to %d x %d", *2 * [side], ours, ours
        )
        grid = learnt[1:].reshape(side, side, -1)
        smooth = "backbone.register_tokens" in places  # as that network does with any grid
        grid = np.asarray(resize_positions(grid, (ours, ours), 0.0, smooth))
        learnt = np.concatenate([learnt[:1], grid.reshape(ours * ours, -1)])
    given[name] = learnt[None]
    return given


def _to_transformers(encoder: State, rotary: bool) -> dict[str, np.ndarray]:
    """Names of the files on the Hub, which every version of transformers reads."""
    renamed: dict[str, np.ndarray] = {}
    layer = "layer" if rotary else "encoder.layer"
    of_query = ("attention.{}_proj" if rotary else "attention.attention.{}").format
    keys = ("q", "k", "v") if rotary else ("query", "key", "value")
    inside = {
        "attn.proj": "attention.o_proj" if rotary else "attention.output.dense",
        "mlp.fc1": "mlp.up_proj" if rotary else "mlp.fc1",
        "mlp.fc2": "mlp.down_proj" if rotary else "mlp.fc2",
    }
    for name, value in encoder.items():
        match = re.fullmatch(r"blocks\.(\d+)\.(.*)\.(weight|bias|gamma)", name)
        if match is None:
            renamed |= _outside_blocks(name, value, rotary)
            continue
        start, module, leaf = f"{layer}.{match[1]}.", match[2], match[3]
        if module == "attn.qkv":
            for key, part in zip(keys, np.split(value, 3), strict=True):
                if not (rotary and key == "k" and leaf == "bias"):
                    renamed[f"{start}{of_query(key)}.{leaf}"] = part
        elif leaf == "gamma":
            renamed[f"{start}layer_scale{module[-1]}.lambda1"] = value
        else:
            renamed[f"{start}{inside.get(module, module)}.{leaf}"] = value
    return renamed


def _outside_blocks(name: str, value: np.ndarray, rotary: bool) -> dict[str, np.ndarray]:
    if name.startswith("norm."):
        return {name if rotary else f"layer{name}": value}
    if name.startswith("patch_embed.proj."):
        projection = "" if rotary else "projection."
        return {f"embeddings.patch_embeddings.{projection}{name.rpartition('.')[2]}": value}
    if name == "mask_token" and rotary:
        value = value[None]
    return {f"embeddings.{'position_embeddings' if name == 'pos_embed' else name}": value}


def _to_timm(encoder: State) -> dict[str, np.ndarray]:
    renamed = {name: value for name, value in encoder.items() if name != "mask_token"}
    if "register_tokens" in renamed:
        renamed["reg_token"] = renamed.pop("register_tokens")
        renamed["cls_token"] = renamed["cls_token"] + renamed["pos_embed"][:, :1]
        renamed["pos_embed"] = np.ascontiguousarray(renamed["pos_embed"][:, 1:])
    return renamed

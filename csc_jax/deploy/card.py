"""The model card of a bundle: what is known of the network, and what its owner has to add."""

import json
import re
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from csc_jax import config as config_lib
from csc_jax.config import bands
from csc_jax.deploy.description import Description
from csc_jax.text import name as printable_name

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>()#+.!|~$&-])")
_FRONT = """\
---
library_name: csc_jax
pipeline_tag: image-segmentation
tags: [semantic-segmentation, semi-supervised, jax]
# license: the owner's choice, such as apache-2.0; mind that of the data and of pretrained weights
---
"""


def write(description: Description, scores: list[dict[str, Any]]) -> str:
    """Returns README.md as Markdown.

    Args:
      description: of the network.
      scores: reports of `--mode=evaluate` for this network and step; see `find_scores`.
    """
    config = description.config
    field = config_lib.flatten(config)
    lines = [
        f"# {escaped(config.method.name)} on {escaped(config.data.name)}",
        "",
        f"A segmentation network trained with csc\\_jax {escaped(description.version)}.",
        "",
        "```python",
        "import csc_jax",
        "",
        'model = csc_jax.load("FOLDER or hf:OWNER/REPO")',
        'result = model.predict("image.jpg")',
        "result.classes, result.confidence, result.overlay()",
        "```",
        "",
        "## Training",
        "",
        "| | |",
        "|---|---|",
    ]
    rows = {
        "method": field["method.name"],
        "contrastive module on top": field["method.contrast"],
        "network": f"{field['model.backbone']}, {config.eval.network}",
        "pretrained weights": field["model.pretrained"],
        "data": field["data.name"],
        "share of the training images with a label": field["data.labeled_fraction"],
        "images": _images(config.data),
        "images are resized to (height, width)": _size(field["data.image_size"]),
        "training crop (height, width)": _size(field["data.crop_size"]),
        "step": description.step,
        "seed": field["seed"],
    }
    if field["data.labeled_list"]:
        rows["share of the training images with a label"] = "a list of the owner's"
    lines += [f"| {name} | {escaped(value)} |" for name, value in rows.items()]
    lines += ["", "## Scores", ""]
    if scores:
        lines += ["| split | manner | images | mIoU |", "|---|---|---|---|"]
        lines += [
            f"| {escaped(s['split'])} | {escaped(s['manner'])} | {escaped(s['images'])} | "
            f"{100 * s['miou']:.1f}% |"
            for s in scores
        ]
    else:
        lines += ["None: `csc-jax evaluate` had not been run on this step."]
    lines += ["", "## Classes", "", "| id | name | IoU | colour |", "|---|---|---|---|"]
    of_class = scores[0]["iou"] if scores else {}
    for index, (name, color) in enumerate(
        zip(description.class_names, description.palette, strict=True)
    ):
        iou = of_class.get(name)
        score = f"{100 * iou:.1f}%" if isinstance(iou, float) else ""
        lines += [f"| {index} | {escaped(name)} | {score} | {' '.join(map(str, color))} |"]
    lines += [
        "",
        "## Licence and intended use",
        "",
        "<!-- For the owner: licence, what the network is meant for, and what it is not. -->",
        "Not stated.",
        "",
    ]
    return _FRONT + "\n".join(lines)


def find_scores(workdir: Path, network: str, step: int) -> list[dict[str, Any]]:
    """Returns what `--mode=evaluate` has left in a run about one network at one step.

    Reports that cannot be read are left out.
    """
    found = []
    for path in sorted((workdir / "evaluation").glob(f"*_{network}_{step}_*.json")):
        split, _, manner = path.stem.partition(f"_{network}_{step}_")
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
            found.append(
                {
                    "split": split,
                    "manner": manner,
                    "images": int(report["images"]),
                    "miou": float(report["miou"]),
                    "iou": {k[4:]: v for k, v in report.items() if k.startswith("iou/")},
                }
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue
    return found


def escaped(text: object) -> str:
    """Returns text on one line in which Markdown and HTML see nothing of theirs."""
    return _SPECIAL.sub(r"\\\1", printable_name(text))


def _images(data: ConfigDict) -> str:
    if not bands.keeps_values(data):
        return "RGB of 8 bits"
    return f"{data.bands} band{'s' * (data.bands > 1)} of {data.pixel_type}, values as in the files"


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]} px" if any(size) else "their own size"

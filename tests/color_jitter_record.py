"""What torchvision makes of an image by colour jitter, for tests that lack it.

`python tests/color_jitter_record.py` writes it; torchvision 0.28.0 made what is there.
"""

from itertools import permutations
from pathlib import Path

import numpy as np
from parity_torchvision import load_torchvision

RECORD = Path(__file__).parent / "golden" / "color_jitter.npz"
DRAWS = 500  # of torchvision's random ColorJitter


def jittered(image, order, factors, hue):
    """The image, (H, W, 3) float32 on [0, 1], after torchvision's four changes in this order."""
    functional = load_torchvision().transforms.functional
    changes = (
        lambda x: functional.adjust_brightness(x, factors[0]),
        lambda x: functional.adjust_contrast(x, factors[1]),
        lambda x: functional.adjust_saturation(x, factors[2]),
        lambda x: functional.adjust_hue(x, hue),
    )
    x = _to_tensor(image)
    for i in order:
        x = changes[i](x)
    return _to_array(x)


def statistics(before, after):
    """Median change in grey levels and share of clipped values, images on [0, 1]."""
    return 255 * np.median(np.abs(after - before)), np.mean((after <= 0) | (after >= 1))


def record():
    """Returns the arrays of the record, drawn and computed anew."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (8, 12, 3)).astype(np.uint8)
    image[0, :4] = [[0, 0, 0], [255, 255, 255], [90, 90, 90], [200, 200, 20]]  # no hue, two hues
    order = np.array(list(permutations(range(4))))
    factors = rng.uniform(0.5, 1.5, (len(order), 3)).astype(np.float32)
    hue = rng.uniform(-0.25, 0.25, len(order)).astype(np.float32)
    # Each change alone, as far as it goes: 1 and 0 change nothing.
    alone = np.array([[0.5, 1, 1], [1.5, 1, 1], [1, 0.5, 1], [1, 1.5, 1], [1, 1, 0.5], [1, 1, 1.5]])
    order = np.concatenate([order, np.tile([0, 1, 2, 3], (8, 1))])
    factors = np.concatenate([factors, alone, np.ones((2, 3))]).astype(np.float32)
    hue = np.concatenate([hue, np.zeros(6), [-0.25, 0.25]]).astype(np.float32)
    pixels = np.float32(image) / np.float32(255)
    after = [
        jittered(pixels, *case) for case in zip(order, factors.tolist(), hue.tolist(), strict=True)
    ]

    import torch

    torch.manual_seed(0)
    jitter = load_torchvision().transforms.ColorJitter(0.5, 0.5, 0.5, 0.25)  # UniMatch's
    drawn = (_to_array(jitter(_to_tensor(pixels))) for _ in range(DRAWS))
    change, clipped = np.transpose([statistics(pixels, x) for x in drawn])
    return {
        **{"image": image, "order": order, "factors": factors, "hue": hue},
        **{"after": np.stack(after), "change": change, "clipped": clipped},
    }


def _to_tensor(image):
    import torch

    return torch.from_numpy(image.copy()).permute(2, 0, 1)


def _to_array(tensor):
    return tensor.permute(1, 2, 0).numpy()


if __name__ == "__main__":
    np.savez_compressed(RECORD, **record())

"""torchvision, for the tests that compare with it."""

import pytest


def load_torchvision():
    """Returns the module; skips the test where it or PyTorch is not installed."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    try:
        return pytest.importorskip("torchvision", reason="torchvision is not installed")
    except RuntimeError:
        # Beside a PyTorch for the CPU alone, its compiled operators lack the CUDA libraries. It
        # does without them, but describes two, which must exist then; no test calls them.
        for name in ("nms", "qnms"):
            signature = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(f"torchvision::{name}", signature)
        import torchvision

        return torchvision

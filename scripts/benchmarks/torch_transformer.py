"""DINOv2 and the DPT head in PyTorch, under the layer names of UniMatch V2's checkpoints.

Written from the papers, with `scaled_dot_product_attention`; the head resizes before its 1x1
convolutions, as the published one does. The tests hold our network against it, `benchmark.py model`
times both.
"""

import torch
from torch import nn
from torch.nn import functional

from csc_jax.models.dpt import SIZES
from csc_jax.models.vit import FORMS, Form


class Attention(nn.Module):
    """Self-attention of all tokens, (B, N, K)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        images, tokens, width = x.shape
        parts = self.qkv(x).reshape(images, tokens, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)  # (B, T, N, K / T) each
        y = functional.scaled_dot_product_attention(query, key, value)
        mixed: torch.Tensor = self.proj(y.transpose(1, 2).reshape(images, tokens, width))
        return mixed


class Perceptron(nn.Module):
    """Two linear layers with GELU between."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.fc2(functional.gelu(self.fc1(x)))
        return y


class LayerScale(nn.Module):
    """A factor for each channel."""

    def __init__(self, width: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gamma


class Block(nn.Module):
    """Attention and perceptron, each with LayerNorm before, LayerScale behind and a shortcut."""

    def __init__(self, form: Form):
        super().__init__()
        self.norm1 = nn.LayerNorm(form.width, form.epsilon)
        self.attn = Attention(form.width, form.heads)
        self.ls1 = LayerScale(form.width)
        self.norm2 = nn.LayerNorm(form.width, form.epsilon)
        self.mlp = Perceptron(form.width)
        self.ls2 = LayerScale(form.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        y: torch.Tensor = x + self.ls2(self.mlp(self.norm2(x)))
        return y


class PatchEmbedding(nn.Module):
    """(B, 3, H, W) image to (B, K, r, c) patches."""

    def __init__(self, form: Form):
        super().__init__()
        self.proj = nn.Conv2d(3, form.width, form.patch, form.patch)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.proj(x)
        return y


class DINOv2(nn.Module):
    """(B, 3, H, W) image -> the levels that the head reads, (B, K, r, c) each."""

    def __init__(self, form: Form):
        super().__init__()
        self.form = form
        self.patch_embed = PatchEmbedding(form)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, form.width))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + form.grid**2, form.width))
        self.mask_token = nn.Parameter(torch.zeros(1, form.width))  # of the pretraining alone
        if form.registers:
            self.register_tokens = nn.Parameter(0.02 * torch.randn(1, form.registers, form.width))
        self.blocks = nn.ModuleList(Block(form) for _ in range(form.depth))
        self.norm = nn.LayerNorm(form.width, form.epsilon)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        form = self.form
        x = self.patch_embed(x)
        images, rows, columns = len(x), *x.shape[2:]
        places = self._positions(rows, columns)
        first = [(self.cls_token + places[:, :1]).expand(images, -1, -1)]
        if form.registers:
            first.append(self.register_tokens.expand(images, -1, -1))
        x = torch.cat([*first, x.flatten(2).transpose(1, 2) + places[:, 1:]], dim=1)
        levels = []
        for i, block in enumerate(self.blocks, start=1):
            x = block(x)
            if i in form.levels:
                patches = self.norm(x)[:, -rows * columns :]
                levels.append(patches.transpose(1, 2).reshape(images, -1, rows, columns))
        return levels

    def _positions(self, rows: int, columns: int) -> torch.Tensor:
        form = self.form
        if (rows, columns) == (form.grid, form.grid):
            return self.pos_embed
        grid = self.pos_embed[:, 1:].reshape(1, form.grid, form.grid, -1).permute(0, 3, 1, 2)
        factors = [(n + form.offset) / form.grid for n in (rows, columns)]
        grid = functional.interpolate(
            grid, scale_factor=factors, mode="bicubic", antialias=form.antialias
        )
        return torch.cat([self.pos_embed[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)


class Residual(nn.Module):
    """Two 3x3 convolutions, each after a ReLU, with a shortcut."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = x + self.conv2(torch.relu(self.conv1(torch.relu(x))))
        return y


class Fusion(nn.Module):
    """Adds a level to what the deeper ones have become, and enlarges both."""

    def __init__(self, width: int):
        super().__init__()
        self.out_conv = nn.Conv2d(width, width, 1)
        self.resConfUnit1 = Residual(width)  # of the deepest level, without a use
        self.resConfUnit2 = Residual(width)

    def forward(
        self, deeper: torch.Tensor | None, level: torch.Tensor, size: torch.Size | tuple[int, int]
    ) -> torch.Tensor:
        x = level if deeper is None else deeper + self.resConfUnit1(level)
        x = self.resConfUnit2(x)
        x = functional.interpolate(x, size, mode="bilinear", align_corners=True)
        y: torch.Tensor = self.out_conv(x)
        return y


class Head(nn.Module):
    """Logits and projection at 8 pixels a patch from four levels."""

    def __init__(self, form: Form, num_classes: int, projection_dim: int):
        super().__init__()
        width, sizes = SIZES[form.width]
        self.projects = nn.ModuleList(nn.Conv2d(form.width, size, 1) for size in sizes)
        self.resize_layers = nn.ModuleList(
            [
                nn.ConvTranspose2d(sizes[0], sizes[0], 4, 4),
                nn.ConvTranspose2d(sizes[1], sizes[1], 2, 2),
                nn.Identity(),
                nn.Conv2d(sizes[3], sizes[3], 3, 2, 1),
            ]
        )
        self.scratch = nn.Module()
        for i, size in enumerate(sizes, start=1):
            reduce = nn.Conv2d(size, width, 3, padding=1, bias=False)
            setattr(self.scratch, f"layer{i}_rn", reduce)
            setattr(self.scratch, f"refinenet{i}", Fusion(width))
        self.scratch.output_conv = _output(width, num_classes)
        self.projection = _output(width, projection_dim)

    def forward(self, levels: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        maps = [
            getattr(self.scratch, f"layer{i}_rn")(resize(project(level)))
            for i, (level, project, resize) in enumerate(
                zip(levels, self.projects, self.resize_layers, strict=True), start=1
            )
        ]
        sizes = [each.shape[2:] for each in maps]
        sizes.insert(0, torch.Size(2 * side for side in sizes[0]))
        fused = None
        for i in range(len(maps), 0, -1):
            fuse = getattr(self.scratch, f"refinenet{i}")
            fused = fuse(fused, maps[i - 1], sizes[i - 1])
        return self.scratch.output_conv(fused), self.projection(fused)


class DPT(nn.Module):
    """(B, 3, H, W) normalised image, sides multiples of a patch -> logits and projection.

    Of the forms with learnt positions: DINOv2's, not DINOv3's.
    """

    def __init__(self, num_classes: int, backbone: str, projection_dim: int = 256):
        super().__init__()
        form = FORMS[backbone]
        self.backbone = DINOv2(form)
        self.head = Head(form, num_classes, projection_dim)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        outputs: tuple[torch.Tensor, torch.Tensor] = self.head(self.backbone(x))
        return outputs


def _output(width: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, outputs, 1)
    )

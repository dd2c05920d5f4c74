"""What the readers of user folders share: the first look at `data.root`."""

from pathlib import Path

from csc_jax.data.builder import Pair
from csc_jax.errors import UserError


def existing_root(root: str, layout: str) -> Path:
    """Returns `data.root` as an absolute path; if missing, UserError says what belongs in it."""
    if not root:
        raise UserError(
            f"data.root is not set; pass --config.data.root=DIR, a folder with {layout}."
        )
    folder = Path(root).expanduser().resolve()
    if not folder.is_dir():
        raise UserError(f"data.root {root} is not a folder; it must be one with {layout}.")
    return folder


def checked(splits: dict[str, list[Pair]], folder: Path, pattern: str) -> dict[str, list[Pair]]:
    """Returns `splits`; UserError if one has no image, or two images under one id."""
    empty = [split for split, pairs in splits.items() if not pairs]
    if empty:
        raise UserError(
            f"data.root {folder} has no images for {', '.join(empty)}; expected {pattern} there."
        )
    for split, pairs in splits.items():
        seen: dict[str, Path] = {}
        for pair in pairs:
            if pair.id in seen:
                raise UserError(
                    f"data.root {folder} has two images {pair.id} in {split}, {seen[pair.id]} and "
                    f"{pair.image}; keep one of them."
                )
            seen[pair.id] = pair.image
    return splits

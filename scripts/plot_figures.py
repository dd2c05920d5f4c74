"""Draws the paper's Figures 1, 2, 4 and 5 from one or more runs.

Command:    python scripts/plot_figures.py --workdir=W [--compare W2 W3 …] [--names ours baseline …]
Writes:     fig1_separ.png  Separ of the bank over training (lower is better separated)
            fig2_cons.png   Cons of the features over training (higher is more consistent)
            fig4_class_separation.png  mean cosine of each class's mean feature to the others'
            fig5_examples.png  image, prediction of every run, ground truth
Runs without a memory bank are left out of Figures 1 and 4, those without features out of 2.
Figure 5 reads the data set that the first run was trained on.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from csc_jax import contrast, data, stored_config
from csc_jax.errors import UserError
from csc_jax.evaluation import score
from csc_jax.reporting import visualize, writers
from csc_jax.state import TrainState
from csc_jax.text import printable
from csc_jax.training.experiment import Experiment


def run() -> int:
    """Draws the figures; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True, help="of a training run")
    parser.add_argument("--compare", type=Path, nargs="*", default=[], help="further runs")
    parser.add_argument("--names", nargs="*", default=[], help="of the runs, for the legend")
    parser.add_argument("--checkpoint", default="latest", help="latest, best or a step")
    parser.add_argument("--images", type=int, default=4, help="rows of Figure 5")
    parser.add_argument("--out", type=Path, help="folder; default: WORKDIR/plots")
    options = parser.parse_args()
    folders = [options.workdir, *options.compare]
    if options.names and len(options.names) != len(folders):
        parser.error(f"--names gives {len(options.names)} names for {len(folders)} runs")
    names = options.names or [folder.name for folder in folders]
    if len(set(names)) < len(names):
        parser.error(f"two runs share a name ({', '.join(names)}): tell them apart by --names")
    try:
        draw(
            dict(zip(names, folders, strict=True)),
            options.checkpoint,
            options.images,
            options.out or options.workdir / "plots",
        )
    except UserError as error:
        print(f"error: {printable(error)}", file=sys.stderr)
        return 2
    return 0


def draw(folders: dict[str, Path], checkpoint: str, images: int, out: Path) -> None:
    """Writes the four PNGs.

    Args:
      folders: name of a run -> its work directory.
      checkpoint: latest | best | a step, for Figures 4 and 5.
      images: rows of Figure 5.
      out: folder.

    Raises:
      UserError: a folder that holds no run, or runs of different data sets.
    """
    restored = {
        name: score.restore(stored_config.get_config(str(folder)), folder, checkpoint)
        for name, folder in folders.items()
    }
    experiments = [experiment for experiment, _ in restored.values()]
    for name, (experiment, _) in restored.items():
        if experiment.class_names != experiments[0].class_names:
            first = next(iter(folders.values()))
            raise UserError(f"{folders[name]} was trained on other classes than {first}.")

    data_set = experiments[0].config.data.name
    separ, cons = f"Separ (Eq. 9) on {data_set}", f"Cons (Eq. 7) on {data_set}"
    _lines(folders, "train/separation", f"{separ}, lower is better", out / "fig1_separ.png")
    _lines(folders, "train/consistency", f"{cons}, higher is better", out / "fig2_cons.png")
    _bars(restored, out / "fig4_class_separation.png")
    _examples(restored, images, out / "fig5_examples.png")


def _lines(folders: dict[str, Path], key: str, title: str, path: Path) -> None:
    series = {}
    for name, folder in folders.items():
        points = [
            (record["step"], record[key])
            for record in filter(writers.bank_was_ready, writers.read_metrics(folder))
            if record.get(key) is not None
        ]
        if points:
            series[name] = tuple(zip(*points, strict=True))
    if series:
        visualize.save_lines(path, series, title)
    _report(path, bool(series))


def _bars(restored: dict[str, tuple[Experiment, TrainState]], path: Path) -> None:
    series = {
        name: np.asarray(contrast.class_separation(state.bank)).tolist()
        for name, (_, state) in restored.items()
        if state.bank is not None
    }
    if series:
        experiment = next(iter(restored.values()))[0]
        data_set = experiment.config.data.name
        title = f"Cosine of a class's mean feature to the others' on {data_set}, lower is better"
        visualize.save_bars(path, series, experiment.class_names, title)
    _report(path, bool(series))


def _examples(restored: dict[str, tuple[Experiment, TrainState]], images: int, path: Path) -> None:
    experiment = next(iter(restored.values()))[0]
    config = experiment.config
    source = data.load(config.data).source(config.eval.split)
    chosen = [source[i] for i in source.spread(images)]
    columns = {"image": [example["image"] for example in chosen]}
    for name, (experiment, state) in restored.items():
        network = getattr(state, experiment.config.eval.network)
        columns[name] = [experiment.predict_image(network, example["image"]) for example in chosen]
    columns["ground truth"] = [example["label"] for example in chosen]
    title = f"{config.eval.split} of {config.data.name}"
    visualize.save_panel(path, columns, experiment.palette, experiment.class_names, title)
    _report(path, True)


def _report(path: Path, drawn: bool) -> None:
    print(path if drawn else f"{path.name}: none of the runs has recorded what it shows")


if __name__ == "__main__":
    sys.exit(run())

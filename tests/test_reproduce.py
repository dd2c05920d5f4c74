"""csc-jax reproduce: which runs it starts, and the tables that it makes of their scores."""

import csv
import json
import statistics
from pathlib import Path

import pytest

from csc_jax import methods
from csc_jax.commands import reproduce
from csc_jax.commands.tables import TABLES
from csc_jax.config import default_config, flatten

ROOT = Path(__file__).parents[1]
VOC, SYNTHETIC = (str(ROOT / "configs" / f"{name}.py") for name in ("pascal_voc", "synthetic"))


@pytest.fixture
def trained(monkeypatch):
    """Runs started, in order; each ends at once with mIoU 70 + seed, or with a status."""
    runs, statuses = [], {}

    def train(run):
        runs.append(run)
        if status := statuses.get(run.row, 0):
            return status
        run.workdir.mkdir(parents=True, exist_ok=True)
        result = {"command": run.command, "miou": 70.0 + run.seed}
        result |= {"classes": {"road": 90.0, "tram": None}, "minutes": 5.0}
        (run.workdir / reproduce.RESULT).write_text(json.dumps(result))
        return 0

    monkeypatch.setattr(reproduce, "_train", train)
    runs_and_statuses = runs, statuses
    return runs_and_statuses


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_a_table_of_the_paper(trained, tmp_path, capsys):
    runs, _ = trained
    arguments = [f"--config={VOC}", "--table=6", "--seeds=3", f"--out={tmp_path}"]
    assert reproduce.main(arguments) == 0
    assert [run.row for run in runs[:4]] == ["N=1", "N=3", "N=5", "N=10"]
    assert [run.seed for run in runs] == [0] * 4 + [1] * 4 + [2] * 4
    assert "--config.contrast.top_n=3" in runs[1].command
    first = rows_of(tmp_path / "pascal_voc" / "table6.csv")[0]
    assert (first["mean"], first["std"], first["paper"]) == ("71.00", "1.00", "78.47")
    assert (first["difference"], first["scores"]) == ("-7.47", "70.00 71.00 72.00")
    text = (tmp_path / "pascal_voc" / "table6.md").read_text()
    assert "| N=1 | 71.00 ± 1.00 | 78.47 | -7.47 |" in text
    assert " ".join(runs[0].command) in text
    assert "N=1   3 of 3" in capsys.readouterr().out
    last = rows_of(tmp_path / "pascal_voc" / "table6_runs.csv")[-1]
    assert list(last) == ["row", "partition", "seed", "miou", "road", "tram", "minutes"]
    assert list(last.values())[2:] == ["2", "72.00", "90.00", "", "5.00"]
    # What is done is not done again, but a changed command is another run.
    reproduce.main(arguments)
    assert len(runs) == 12
    reproduce.main([*arguments, "--set", "train.epochs=40"])
    assert len(runs) == 24


def test_the_papers_figures_stand_only_beside_its_own_data_set(trained, tmp_path):
    reproduce.main([f"--config={SYNTHETIC}", "--table=3", f"--out={tmp_path}"])
    text = (tmp_path / "synthetic" / "table3.md").read_text()
    assert "| baseline | 70.00 |" in text
    assert "not comparable" in text
    assert "75.64" not in text


def test_a_run_of_an_older_version_is_listed_without_its_classes(trained, tmp_path):
    arguments = [f"--config={SYNTHETIC}", "--rows=supervised,csc", f"--out={tmp_path}"]
    reproduce.main(arguments)
    path = tmp_path / "synthetic" / "csc" / "1_8" / "seed0" / reproduce.RESULT
    result = json.loads(path.read_text())
    del result["classes"], result["minutes"]
    path.write_text(json.dumps(result))
    reproduce.main(arguments)
    new, old = rows_of(tmp_path / "synthetic" / "comparison_runs.csv")
    assert (new["road"], new["minutes"]) == ("90.00", "5.00")
    assert (old["row"], old["miou"], old["road"], old["minutes"]) == ("csc", "70.00", "", "")


def test_shards_share_the_runs(trained, tmp_path):
    runs, _ = trained
    arguments = [f"--config={SYNTHETIC}", "--rows=supervised,csc", "--seeds=2"]
    arguments += ["--partitions=1/4,1/8", f"--out={tmp_path}"]
    reproduce.main([*arguments, "--shard=2/3"])
    text = (tmp_path / "synthetic" / "comparison.md").read_text()
    assert "70.00 (1 of 2 seeds)" in text
    reproduce.main([*arguments, "--shard=1/3"])
    reproduce.main([*arguments, "--shard=3/3"])
    assert len({run.workdir for run in runs}) == len(runs) == 8
    assert "seeds)" not in (tmp_path / "synthetic" / "comparison.md").read_text()


def test_a_failed_run_is_named_and_an_interruption_ends_it_all(trained, tmp_path, capsys):
    runs, statuses = trained
    arguments = [f"--config={SYNTHETIC}", "--rows=supervised,csc", f"--out={tmp_path}"]
    statuses["supervised"] = 2
    assert reproduce.main(arguments) == 1
    assert "failed: " in capsys.readouterr().err
    assert [run.row for run in runs] == ["supervised", "csc"]
    statuses["supervised"] = 75
    assert reproduce.main(arguments) == 75


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows=scs"], "there is no row 'scs'"),
        (["--rows=csc+cps"], r"there is no row 'csc\+cps'"),
        (["--table=3", "--shard=5/4"], "'5/4' is not I/N"),
        ([], "give --table"),
    ],
)
def test_bad_arguments_are_explained(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        reproduce.main([f"--config={SYNTHETIC}", *arguments])
    assert message.replace("\\", "") in capsys.readouterr().err


def test_rows_change_fields_that_exist():
    fields = flatten(default_config())
    for table in TABLES.values():
        assert table.rows.keys() == table.paper.keys()
        for changes in table.rows.values():
            assert changes.keys() <= fields.keys()
            assert changes["method.name"] in methods.available()


@pytest.mark.slow
def test_a_real_run_is_scored_and_continued(tmp_path):
    sizes = ["data.synthetic.train=16", "data.synthetic.val=4", "data.synthetic.size=32,32"]
    sizes += ["data.crop_size=32,32", "data.image_size=0,0", "model.backbone=resnet18"]
    sizes += ["model.width=4", "model.decoder_width=8", "train.steps=2", "train.panels=0"]
    sizes += ["train.log_every=1", "train.eval_every=1", "parallel.devices=1"]
    sizes += [f"data.cache_dir={tmp_path / 'cache'}"]
    arguments = [f"--config={SYNTHETIC}", "--rows=supervised", f"--out={tmp_path}"]
    assert (
        reproduce.main([*arguments, "--set", *sizes, "batch.labeled=2", "batch.unlabeled=2"]) == 0
    )
    (row,) = rows_of(tmp_path / "synthetic" / "comparison.csv")
    workdir = tmp_path / "synthetic" / "supervised" / "1_8" / "seed0"
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    scores = [r["val/teacher_miou"] for r in records if "val/teacher_miou" in r]
    assert len(scores) == 2
    assert row["mean"] == f"{100 * scores[-1]:.2f}"
    (run,) = rows_of(tmp_path / "synthetic" / "comparison_runs.csv")
    assert run["road"] == f"{100 * records[-1]['val/teacher_iou/road']:.2f}"
    rates = [r["train/images_per_second"] for r in records if "train/images_per_second" in r]
    result = json.loads((workdir / reproduce.RESULT).read_text())
    assert result["minutes"] == pytest.approx(2 * 4 / statistics.median(rates) / 60)

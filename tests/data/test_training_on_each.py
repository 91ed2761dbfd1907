"""`fer train` and `fer eval` on a small tree of every data set: splits, folds and classes fit together."""

import pytest
import trees

from fer_models.cli import main
from fer_models.data import DATASETS


@pytest.mark.parametrize("name", trees.TREES)
def test_train_and_eval(name, tmp_path, capsys):
    root, run = trees.TREES[name](tmp_path / "data"), tmp_path / "run"
    folds = ("--data-options", "folds=2", "fold=0") if DATASETS[name].by_subject else ()
    arguments = [
        *("train", "--model", "face2nodes_nano", "--data", name, "--root", str(root), "--out", str(run)),
        *("--model-options", "dims=[32]", "depths=[1]", "stride=4", "--size", "32"),
        *("--epochs", "1", "--batch-size", "2", "--workers", "0", *folds),
    ]
    assert main(arguments) == 0, capsys.readouterr().err
    assert main(["eval", str(run), "--workers", "0"]) == 0, capsys.readouterr().err
    assert (run / "explain.png").is_file()

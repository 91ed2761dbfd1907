"""What a user types, right and wrong: one line of explanation, and the exit code."""

import csv
import json
import pickle
import resource
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

import fer_kernels
from fer_models import create_model
from fer_models.cli import main
from fer_models.data import DATASETS, EMOTIONS, SyntheticFaces
from fer_models.layers.label_graph import (
    adjacency_from,
    build_adjacency,
    conditional_relation,
    spearman_relation,
)
from fer_models.losses import Targets
from fer_models.train.checkpoint import load_checkpoint, save_checkpoint
from fer_models.train.config import TrainConfig, recipes
from fer_models.train.engine import Trainer
from fer_models.train.evaluate import input_side

TINY = (
    *("--model", "face2nodes_nano", "--data", "synthetic"),
    *("--epochs", "1", "--batch-size", "16", "--workers", "0", "--size", "32"),
    *("--data-options", "length=64", "size=32", "--model-options", "dims=[32]", "depths=[1]", "stride=4"),
)


def fails(capsys, *arguments: str) -> str:
    assert main(arguments) == 2
    text = capsys.readouterr().err
    assert text.startswith("fer: ") and text.count("\n") == 1, text
    return text


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    assert main(["train", *TINY, "--out", str(folder)]) == 0
    return folder


def test_train_writes_what_it_says(run, capsys):
    for name in ("config.yaml", "log.csv", "metrics.json", "best.safetensors", "last.safetensors", "last.pt"):
        assert (run / name).is_file(), name
    for name in ("curves.png", "confusion.png"):
        assert (run / name).read_bytes()[:4] == b"\x89PNG"
    model, about = load_checkpoint(run / "best.safetensors")
    assert about["classes"][:2] == ["neutral", "happy"] and model(torch.zeros(1, 3, 32, 32)).shape == (1, 8)


@pytest.mark.parametrize(
    "options",
    [
        ("head=label_graph", "head_options={adjacency: spearman, threshold: 0.05}"),
        ("head=label_graph", "head_options={adjacency: conditional, va_nodes: false}"),
    ],
)
def test_a_label_graph_of_the_training_data(options, tmp_path):
    """Loading the checkpoint needs no data: it holds the graph."""
    assert main(["train", *TINY, *options, "--out", str(tmp_path)]) == 0
    model, about = load_checkpoint(tmp_path / "best.safetensors")
    data = SyntheticFaces(None, "train", length=64, size=32)
    known = Targets(
        torch.tensor(data.labels), None, torch.tensor([(r.valence, r.arousal) for r in data.records])
    )
    if "spearman" in options[1]:
        expected = adjacency_from(spearman_relation(known, 8), threshold=0.05)
    else:
        expected = adjacency_from(conditional_relation(known, 8, va_nodes=False))
    torch.testing.assert_close(model.head.adjacency, expected.float())
    assert not torch.equal(model.head.adjacency, build_adjacency("auto", 8, labels=data.classes).float())
    assert about["options"]["head_options"]["adjacency"] == model.head.adjacency.tolist()


def test_a_run_that_starts_from_another(run, tmp_path):
    """It is made, saved and loaded with the other's options, of which some have no tensor."""
    first, tuned = tmp_path / "first", tmp_path / "tuned"
    options = (*TINY, "k=3", "head=label_graph", "head_options={adjacency: identity}")
    assert main(["train", *options, "--out", str(first)]) == 0
    seven = [word.replace("length=64", "classes=7").replace("size=32", "length=64") for word in TINY]
    seven = seven[: seven.index("--model-options")]
    weights = ("--pretrained", str(first / "best.safetensors"))
    assert main(["train", *seven, *weights, "--out", str(tuned)]) == 0
    model, about = load_checkpoint(tuned / "best.safetensors")
    assert [block.grapher.graph_conv.dynamic_graph.k for block in model.stages[0].blocks] == [3]
    assert about["options"]["stride"] == 4 and about["options"]["num_classes"] == 7
    assert model.head.adjacency.shape == (9, 9)


def test_vectors_of_a_file_stay_with_the_checkpoint(tmp_path):
    words = [*EMOTIONS, "valence", "arousal"]
    glove = tmp_path / "glove.txt"
    glove.write_text("".join(f"{word} {index} 1.5 -2\n" for index, word in enumerate(words)))
    head = ("head=label_graph", f"head_options={{embeddings: {glove}}}")
    assert main(["train", *TINY, *head, "--out", str(tmp_path / "run")]) == 0
    glove.unlink()
    model, _ = load_checkpoint(tmp_path / "run" / "best.safetensors")
    assert model.head.vectors[3].tolist() == [3, 1.5, -2]


def test_eval_agrees_with_training(run, tmp_path, capsys):
    report = tmp_path / "report.json"
    assert main(["eval", str(run), "--workers", "0", "--json", str(report)]) == 0
    assert "accuracy" in capsys.readouterr().out
    found = json.loads(report.read_text())[str(run)]["metrics"]
    trained = json.loads((run / "metrics.json").read_text())
    assert found == trained
    assert main(["eval", str(run), str(run), "--workers", "0", "--flip"]) == 0
    assert "difference in accuracy +0.0000" in capsys.readouterr().out


def test_seeds(tmp_path, capsys):
    assert main(["train", *TINY, "--out", str(tmp_path / "runs"), "--seeds", "1", "2"]) == 0
    summary = json.loads((tmp_path / "runs" / "summary.json").read_text())
    assert set(summary["runs"]) == {"seed-1", "seed-2"} and "accuracy" in summary["summary"]
    assert "±" in capsys.readouterr().out


def test_wrong_configurations(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("learning_rate: 0.1\nmodle: vig_ti\n")
    assert "unknown key 'learning_rate'" in fails(capsys, "train", str(recipe))
    recipe.write_text("modle: vig_ti\n")
    assert "did you mean 'model'?" in fails(capsys, "train", str(recipe))
    recipe.write_text("epochs: many\n")
    assert "epochs must be a whole number, got 'many'" in fails(capsys, "train", str(recipe))
    recipe.write_text("- 1\n- 2\n")
    assert "must hold keys and values" in fails(capsys, "train", str(recipe))
    recipe.write_text("a: [\n")
    assert "is not YAML" in fails(capsys, "train", str(recipe))
    assert "recipes are" in fails(capsys, "train", "no_such_recipe")
    out = ("--out", str(tmp_path / "run"))
    assert "did you mean 'face2nodes_nano'" in fails(capsys, "train", "--model", "face2nodes_nanu", *out)
    assert "expected one of" in fails(capsys, "train", "--data", "ferplos", *out)
    assert "unknown schedule 'cosin'" in fails(capsys, "train", "--schedule", "cosin", *out)
    assert "KEY=VALUE" in fails(capsys, "train", "--model-options", "dims", *out)
    assert "fewer than batch_size" in fails(capsys, "train", *TINY, "--batch-size", "128", *out)
    assert "needs root" in fails(capsys, "train", "--data", "ferplus", *out)
    assert "optimizer = 'adamv'" in fails(capsys, "train", *TINY, "--optimizer", "adamv", *out)
    wrong = ("--data", "synthetic", "--data-options", "length=abc")
    assert "length='abc'" in fails(capsys, "train", *wrong, *out)
    assert not (tmp_path / "run" / "config.yaml").exists()  # nothing of runs that could not start
    assert (
        "no CUDA device" in fails(capsys, "train", *TINY, "--device", "cuda", *out)
        or torch.cuda.is_available()
    )
    assert "nothing to resume" in fails(capsys, "train", *TINY, "--resume", "must", *out)


def test_a_mistake_leaves_no_folder(tmp_path, capsys):
    out = tmp_path / "run"
    for wrong in (("--model", "vig_tii"), ("--optimizer", "adamv"), ("--model-options", "depth=[1]")):
        assert main(["train", *TINY, *wrong, "--out", str(out)]) == 2
        assert not out.exists()
    assert "has no option 'depth'; did you mean 'depths'?" in capsys.readouterr().err
    assert "unknown select 'acc'" in fails(capsys, "train", *TINY, "--select", "acc", "--out", str(out))
    assert "runs on cpu, cuda" in fails(capsys, "train", *TINY, "--device", "meta", "--out", str(out))
    assert f"no file {out}.yaml" in fails(capsys, "train", f"{out}.yaml")


def test_a_mistake_leaves_no_parents(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fails(capsys, "train", "--model", "nosuch", "--data", "synthetic")
    assert not list(tmp_path.iterdir())
    fails(capsys, "train", "--model", "nosuch", "--data", "synthetic", "--out", "a/b/c")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, hint",
    [
        (("train", "--modle", "vig_ti"), "arguments: --modle; did you mean --model?"),
        (("predict", "a.png", "--bacth-size=3"), "did you mean --batch-size?"),
        (("data", "speed", "x", "--wrokers", "2"), "did you mean --workers?"),
        (("train", "--foo"), "unrecognized arguments: --foo\n"),
    ],
)
def test_misspelt_options(arguments, hint, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2 and hint in capsys.readouterr().err


def test_resuming_by_the_folder_alone(run, tmp_path, capsys, monkeypatch):
    """The run's own configuration; without --out the last run that has a checkpoint, not the last folder."""
    folder = tmp_path / "runs" / "face2nodes_nano-synthetic-1"
    shutil.copytree(run, folder)
    (tmp_path / "runs" / "face2nodes_nano-synthetic-2").mkdir()
    (folder / "curves.png").unlink()
    monkeypatch.chdir(tmp_path)
    for arguments in (["--out", str(folder)], TINY):
        assert main(["train", *arguments, "--resume", "auto"]) == 0
        assert "face2nodes_nano-synthetic-1 after step 4" in capsys.readouterr().out
        (folder / "curves.png").unlink()
    text = fails(capsys, "train", "--out", str(folder), "--resume", "auto", "--lr", "0.5")
    assert "another configuration: lr 0.001 -> 0.5; to go on with it, name the folder" in text


def test_folders_with_contempt(tmp_path, capsys):
    """The files say how many classes there are, those of either split."""
    faces = SyntheticFaces(None, "train", length=64, size=32)
    for split, names in (("train", EMOTIONS), ("test", EMOTIONS[:7])):
        for label, name in enumerate(names):
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(2):
                face = faces.draw(8 * index + label).permute(1, 2, 0).numpy()
                Image.fromarray(face).save(tmp_path / split / name / f"{index}.png")
    tiny = [*TINY, "--data", "folder", "--root", str(tmp_path)]
    del tiny[tiny.index("--data-options") + 1 : tiny.index("--model-options")]
    tiny.remove("--data-options")
    assert "--valid-split test" in fails(capsys, "train", *tiny, "--out", str(tmp_path / "run"))
    assert main(["train", *tiny, "--valid-split", "test", "--out", str(tmp_path / "run")]) == 0
    model, about = load_checkpoint(tmp_path / "run" / "best.safetensors")
    assert model.num_classes == len(about["classes"]) == 8
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "run")]) == 0
    assert "contempt" in capsys.readouterr().out


def test_unwritable_folder(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    text = fails(capsys, "train", *TINY, "--out", str(tmp_path / "file" / "run"))
    assert "cannot write to the run folder" in text


def test_full_disk(tmp_path, capsys, monkeypatch):
    """The limit on a file's size stands for it: from the second epoch on, files end in the middle."""
    folder, names = tmp_path / "run", ("best.safetensors", "last.safetensors", "last.pt")
    arguments = ("train", *TINY, "--epochs", "2", "--out", str(folder))
    limits, before = resource.getrlimit(resource.RLIMIT_FSIZE), {}
    validate = Trainer.validate

    def fills_the_disk(self):
        if self.epoch == 1:
            before.update({name: (folder / name).read_bytes() for name in names})
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        return validate(self)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "validate", fills_the_disk)
        try:
            code = main(arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code != 0 and "what was there is intact" in capsys.readouterr().err
    assert before and {name: (folder / name).read_bytes() for name in names} == before
    assert not [path for path in folder.iterdir() if path.name.endswith(".tmp")]
    assert main([*arguments, "--resume", "must"]) == 0


def test_predict_and_explain(run, tmp_path, capsys):
    from fer_models.data import SyntheticFaces

    images = tmp_path / "images"
    images.mkdir()
    for index in range(2):
        face = SyntheticFaces(None, "valid", length=2).draw(index)
        Image.fromarray(face.permute(1, 2, 0).numpy()).save(images / f"{index}.png")
    (images / "2.png").write_bytes(b"no image")
    table, picture = tmp_path / "out.csv", tmp_path / "explain.png"
    assert main(["predict", str(images), "--model", str(run), "--csv", str(table)]) == 0
    assert "3 rows in" in capsys.readouterr().out
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == ["0.png", "1.png", "2.png"]
    assert rows[0]["label"] and not rows[0]["error"] and "not an image" in rows[2]["error"]
    assert main(["predict", str(images / "0.png"), "--model", str(run)]) == 0
    assert rows[0]["label"] in capsys.readouterr().out
    assert main(["explain", str(images / "0.png"), "--model", str(run), "--out", str(picture)]) == 0
    assert picture.read_bytes()[:4] == b"\x89PNG" and (run / "explain.png").read_bytes()[:4] == b"\x89PNG"
    assert "not an image" in fails(capsys, "explain", str(images / "2.png"), "--model", str(run))
    assert "does not exist" in fails(capsys, "predict", str(tmp_path / "none"), "--model", str(run))
    assert "no folder" in fails(
        capsys, "explain", str(images / "0.png"), "--model", str(run), "--out", str(tmp_path / "no" / "a.png")
    )
    assert main(["predict", str(images / "2.png"), "--model", str(run)]) == 2
    # One of several that cannot be used does not cost the others
    several = [str(images / "0.png"), str(tmp_path / "none"), str(images / "1.png")]
    assert main(["predict", *several, "--model", str(run), "--csv", str(table)]) == 0
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [bool(row["label"]) for row in rows] == [True, False, True] and "does not exist" in rows[1][
        "error"
    ]
    both = [str(tmp_path / "images"), "--model", str(run)]
    assert "is a folder; name a file" in fails(capsys, "predict", *both, "--csv", str(tmp_path))
    assert "is a folder; name an image" in fails(capsys, "explain", *both)
    one = [str(images / "0.png"), "--model", str(run)]
    assert "must end in .png" in fails(capsys, "explain", *one, "--out", str(tmp_path / "why.xyz"))
    assert "there is no folder" in fails(
        capsys, "eval", str(run), "--picture", str(tmp_path / "no" / "a.png")
    )
    with fer_kernels.use_backend("triton"):
        text = fails(capsys, "predict", *one)
    assert "backend 'triton' cannot take this call" in text or torch.cuda.is_available()
    nowhere = str(tmp_path / "no" / "out.csv")
    assert "there is no folder" in fails(capsys, "predict", *several, "--model", str(run), "--csv", nowhere)


def test_wrong_checkpoints(run, tmp_path, capsys):
    assert "no checkpoint" in fails(capsys, "eval", str(tmp_path / "none"))
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes((run / "best.safetensors").read_bytes()[:5000])
    assert "not a readable safetensors file" in fails(capsys, "eval", str(broken))
    other, about = load_checkpoint(run / "best.safetensors")
    wrong = tmp_path / "wrong.safetensors"
    save_checkpoint(wrong, other, {**about, "model": "face2nodes_xs"})
    assert "are not those of face2nodes_xs" in fails(capsys, "eval", str(wrong), "--data", "synthetic")
    seven = ("--data", "synthetic", "--data-options", "classes=7", "size=32", "length=16")
    assert "knows 8 classes" in fails(capsys, "eval", str(run / "best.safetensors"), *seven)


class Malice:
    def __reduce__(self):
        return (print, ("executed",))


def test_nothing_is_unpickled(tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    with open(folder / "last.pt", "wb") as file:
        pickle.dump({"model": Malice()}, file)
    text = fails(capsys, "train", *TINY, "--out", str(folder), "--resume", "auto")
    assert "not loaded" in text and "executed" not in text


def test_stops_at_a_loss_that_is_not_finite(tmp_path, capsys):
    folder = tmp_path / "run"
    assert main(["train", *TINY, "--lr", "1e30", "--warmup-epochs", "0", "--epochs", "3", "--clip", "0",
                 "--optimizer", "sgd", "--out", str(folder)]) == 1  # fmt: skip
    assert "no longer finite" in capsys.readouterr().err


def test_help_shows_examples(capsys):
    for arguments in ([], ["train"], ["eval"], ["bench"], ["data", "check"], ["data", "preview"], ["info"],
                      ["predict"], ["explain"], ["data", "speed"]):  # fmt: skip
        with pytest.raises(SystemExit) as end:
            main([*arguments, "--help"])
        assert end.value.code == 0
        assert "fer " in capsys.readouterr().out.split("usage:")[1].split("\n", 1)[1]


def test_data_commands(tmp_path, capsys):
    out = tmp_path / "faces.png"
    assert main(["data", "preview", "synthetic", "--out", str(out), "--data-options", "length=32"]) == 0
    assert out.read_bytes()[:4] == b"\x89PNG"
    assert main(["data", "list"]) == 0 and "ferplus" in capsys.readouterr().out
    quick = ("--data-options", "length=32", "--seconds", "0.1", "--workers", "0", "--size", "32")
    assert main(["data", "speed", "synthetic", *quick]) == 0
    assert "images a second at 32 pixels" in capsys.readouterr().out
    assert "unknown augment 'weak'" in fails(capsys, "data", "speed", "synthetic", "--augment", "weak")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert main(["data", "check", str(empty)]) == 2
    assert "empty" in capsys.readouterr().out


@pytest.mark.parametrize("name", recipes())
def test_recipes(name):
    """Each names a data set and a model that takes its options and an image of its size."""
    config = TrainConfig.read(name)
    assert config.data in DATASETS
    options = {"num_classes": config.data_options.get("classes", 8), **config.model_options}
    if config.size:
        options["img_size"] = config.size
    model = create_model(config.model, **options).eval()
    side = config.size or input_side(model)
    with torch.no_grad():
        assert model(torch.randn(1, 3, side, side)).shape == (1, options["num_classes"])

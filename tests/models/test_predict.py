"""Prediction: what goes in, what comes out, and what is refused."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import fer_models
from fer_models import Predictor
from fer_models.data import DataError, SyntheticFaces
from fer_models.data.labels import EMOTIONS
from fer_models.predict import to_pixels, weights_file
from fer_models.train.checkpoint import save_checkpoint


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    made = fer_models.create_model("face2nodes_nano", num_classes=8, depths=(2,), valence_arousal=True)
    with torch.no_grad():  # statistics of their own, and an output that depends on the input
        made.train()(torch.randn(32, 3, 64, 64))
    return made.eval()


@pytest.fixture(scope="module")
def faces():
    data = SyntheticFaces(None, "valid", length=8)
    return [data.draw(index) for index in range(8)]


@pytest.fixture(scope="module")
def predictor(model):
    return Predictor(model, "cpu")


def array(face):
    return face.permute(1, 2, 0).numpy()


def test_a_result(predictor, model, faces):
    (result,) = predictor(faces[0])
    assert tuple(result.probabilities) == EMOTIONS
    assert sum(result.probabilities.values()) == pytest.approx(1, abs=1e-6)
    assert result.label == max(result.probabilities, key=result.probabilities.get)
    assert -1 <= result.valence <= 1 and -1 <= result.arousal <= 1
    assert result.embedding.shape == (model.num_features,) and result.box is None
    assert result.note == "taken as a face crop"
    with torch.no_grad():
        expected = model(predictor.transform(faces[0])[None]).softmax(1)[0]
    np.testing.assert_allclose(list(result.probabilities.values()), expected, atol=1e-6)


def test_no_valence_and_other_classes():
    made = fer_models.create_model("face2nodes_nano", num_classes=3, depths=(1,))
    (result,) = Predictor(made, "cpu")(np.zeros((64, 64, 3), np.uint8))
    assert result.valence is None and result.arousal is None
    assert tuple(result.probabilities) == ("class 0", "class 1", "class 2")
    assert tuple(Predictor(made, "cpu", classes="abc")(np.zeros((8, 8), np.uint8))[0].probabilities) == tuple(
        "abc"
    )


def test_every_form_gives_the_same(predictor, faces, tmp_path):
    face = faces[1]
    path = tmp_path / "face.png"
    Image.fromarray(array(face)).save(path)
    forms = [face, array(face), Image.fromarray(array(face)), path, str(path)]
    forms += [face.float() / 255, face.float(), array(face).astype(np.float64) / 255]
    results = predictor(forms)
    assert [result.image for result in results] == list(range(len(forms)))
    assert len({tuple(result.probabilities.values()) for result in results}) == 1
    stacked = predictor(np.stack([array(face)] * 2)) + predictor(torch.stack([face] * 2))
    assert {result.label for result in stacked} == {results[0].label} and len(stacked) == 4


def test_one_scale_for_a_batch_of_floats(predictor, faces):
    """A dark image among brighter ones is not stretched, and overshoot by resizing is clamped."""
    batch = torch.stack([torch.zeros(3, 64, 64), torch.full((3, 64, 64), 200.0)])
    batch[0, :, 0, 0] = 1
    dark, bright = predictor(batch)
    alone = predictor(batch.to(torch.uint8))
    assert [dark.probabilities, bright.probabilities] == [result.probabilities for result in alone]
    above = faces[1].float() / 255
    above[0, 0, 0] = 1.0004
    assert predictor(above)[0].probabilities == predictor(above.clamp(max=1))[0].probabilities


@pytest.mark.parametrize("kind", ["16 bits", "transparent", "rotated"])
def test_a_pil_image_is_its_file(kind, faces, tmp_path):
    path = tmp_path / "face.png"
    if kind == "16 bits":
        Image.fromarray(faces[0][0].numpy().astype(np.uint16) * 256).save(path)
    elif kind == "transparent":
        alpha = np.full((*array(faces[0]).shape[:2], 1), 100, np.uint8)
        Image.fromarray(np.concatenate([array(faces[0]), alpha], 2)).save(path)
    else:
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.fromarray(array(faces[0])).save(path, exif=exif)
    assert torch.equal(to_pixels(Image.open(path)), to_pixels(path))
    cut = tmp_path / "cut.png"
    cut.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(DataError, match="damaged image"):
        to_pixels(Image.open(cut))


def test_models_that_cannot_predict_and_others_that_can(faces):
    with pytest.raises(ValueError, match="no classifier"):
        Predictor(fer_models.create_model("face2nodes_nano", num_classes=0), "cpu")
    small = {"num_classes": 3, "depths": (1,)}
    with pytest.raises(ValueError, match="3 classes, got the names a, a, b"):
        Predictor(fer_models.create_model("face2nodes_nano", **small), "cpu", classes="aab")
    labels = {"head": "label_graph", "head_options": {"labels": ["fear", "anger", "bored"]}}
    model = fer_models.create_model("face2nodes_nano", **small, **labels)
    assert Predictor(model, "cpu").classes == ("fear", "anger", "bored")
    assert Predictor(model.bfloat16(), "cpu")(faces[0])[0].embedding.dtype == np.float32


def test_a_batch_is_its_images(predictor, faces):
    batch = predictor(faces)
    for face, together in zip(faces, batch, strict=True):
        alone = predictor(face)[0]
        np.testing.assert_allclose(
            list(alone.probabilities.values()), list(together.probabilities.values()), atol=1e-5
        )
        np.testing.assert_allclose(alone.embedding, together.embedding, atol=1e-4)


def test_images_of_several_sizes(predictor):
    sizes = [(48, 48), (300, 200), (1, 1)]
    assert len(predictor([np.full((h, w, 3), 100, np.uint8) for h, w in sizes])) == 3


def test_flip_is_the_mean_of_both(model, faces):
    both = Predictor(model, "cpu", flip=True)(faces[2])[0].probabilities
    once = Predictor(model, "cpu")([faces[2], faces[2].flip(2)])
    mean = [np.mean([result.probabilities[name] for result in once]) for name in both]
    np.testing.assert_allclose(list(both.values()), mean, atol=1e-6)


@pytest.mark.parametrize(
    "image, message",
    [
        (np.full((8, 8, 3), 300.0), r"image 0: floats must lie in \[0, 1\] or in \[0, 255\], got 300 to 300"),
        (np.full((8, 8, 3), -0.1), "got -0.1 to -0.1"),
        (np.full((8, 8, 3), np.nan), "got nan"),
        (np.zeros((8, 8, 4), np.uint8), r"an array must be \(H, W, 3\) or \(H, W\), got \(8, 8, 4\)"),
        (np.zeros((3, 8, 8), np.uint8), r"an array must be \(H, W, 3\)"),
        (np.zeros((8, 8, 3), np.int64), "pixels must be uint8 or floating point, got torch.int64"),
        (torch.zeros(8, 8, 3, dtype=torch.uint8), r"a tensor must be \(3, H, W\)"),
        (torch.zeros(3, 0, 8), "without pixels"),
        (np.full((8, 8, 3), 1.5), r"1.5 to 1.5 could be either; clamp them or pass uint8"),
        (Image.new("RGB", (0, 0)), "without pixels"),
        (".", "is a folder, and this takes images"),
        (7, "expected a path, a PIL image, an array or a tensor, got int"),
        ("missing.png", "missing.png: no such file"),
    ],
)
def test_refused(predictor, image, message):
    with pytest.raises((ValueError, TypeError, DataError), match=message):
        predictor([image])


def test_the_message_says_which_image(predictor, faces):
    with pytest.raises(TypeError, match="image 1"):
        predictor([faces[0], None])


@pytest.mark.filterwarnings("error")
def test_an_array_that_cannot_be_written_to(predictor, faces):
    image = array(faces[0])
    image.flags.writeable = False
    assert predictor(image)[0].probabilities == predictor(faces[0])[0].probabilities


def test_nothing_gives_nothing(predictor):
    assert predictor([]) == []


def test_a_folder(predictor, faces, tmp_path):
    (tmp_path / "sub").mkdir()
    for name, face in (("a.png", faces[0]), ("sub/c.jpg", faces[1])):
        Image.fromarray(array(face)).save(tmp_path / name)
    (tmp_path / "b.png").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "._a.png").write_bytes(b"a system's own")
    rows = predictor.rows(tmp_path, progress=False)
    assert [row["image"] for row in rows] == ["a.png", "b.png", "sub/c.jpg"]
    assert rows[1]["error"] == "0 bytes" and rows[1]["label"] == "" and rows[1]["happy"] is None
    assert rows[0]["error"] == "" and rows[0]["label"] == predictor(faces[0])[0].label
    table = predictor.table(tmp_path, progress=False)
    assert list(table.columns) == list(rows[0]) and len(table) == 3
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has no images"):
        predictor.rows(tmp_path / "empty")
    (tmp_path / "empty" / "film.mp4").touch()
    with pytest.raises(DataError, match=r"has no images .*; name videos themselves, such as .*film.mp4"):
        predictor.rows(tmp_path / "empty")
    shutil.copy(tmp_path / "a.png", tmp_path / "empty")
    with pytest.warns(UserWarning, match="1 videos in .* are left out"):
        assert len(predictor.rows(tmp_path / "empty", progress=False)) == 1
    with pytest.raises(FileNotFoundError, match="does not exist"):
        predictor.rows(tmp_path / "nowhere")


def test_more_images_than_a_batch(model, faces, tmp_path):
    small = Predictor(model, "cpu", batch_size=3)
    assert [result.label for result in small(faces)] == [r.label for r in Predictor(model, "cpu")(faces)]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"detector": "mtcnn"}, "unknown detector 'mtcnn': expected one of None, 'opencv'"),
        ({"faces": "first"}, "unknown faces 'first'"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"classes": ["a"]}, "the model has 8 classes, got the names a"),
    ],
)
def test_options(model, options, message):
    with pytest.raises(ValueError, match=message):
        Predictor(model, "cpu", **options)


def test_checkpoints_and_names(model, tmp_path):
    about = {
        "model": "face2nodes_nano",
        "options": {"num_classes": 8, "depths": [2], "valence_arousal": True},
        "classes": list("abcdefgh"),
        "size": 48,
    }
    run = tmp_path / "run"
    run.mkdir()
    save_checkpoint(run / "best.safetensors", model, about, half=True)
    for where in (run, run / "best.safetensors", str(run)):
        loaded = Predictor(where, "cpu")
        assert loaded.size == 48 and loaded.classes == tuple("abcdefgh")
    with pytest.raises(ValueError, match="neither a file nor a model: 'face2nodes_xz'; did you mean"):
        weights_file("face2nodes_xz")
    with pytest.raises(ValueError, match=r"neither a file nor a model: 'face2node_xs\.ferplus'"):
        weights_file("face2node_xs.ferplus")
    with pytest.raises(
        ValueError, match=f"no run folder: it has no best.safetensors; it holds the runs {run.name}"
    ):
        weights_file(tmp_path)
    with pytest.raises(ValueError, match="no weights of vig_b come with this installation"):
        weights_file("vig_b")


def test_detector(model, faces, tmp_path):
    cv2 = pytest.importorskip("cv2")
    if not hasattr(cv2, "CascadeClassifier"):
        pytest.skip("this OpenCV has no cascades")
    look = Predictor(model, "cpu", detector="opencv")
    assert look.detect(torch.zeros(3, 80, 80, dtype=torch.uint8)) == []
    with pytest.raises(DataError, match="image 1: no face found; without a detector it is taken as it is"):
        faceless = np.zeros((80, 80, 3), np.uint8)
        look.detect = lambda image: [] if image.max() == 0 else [(0, 0, 8, 8)]
        look([faces[0], faceless])
    Image.fromarray(faceless).save(tmp_path / "a.png")
    Image.fromarray(array(faces[0])).save(tmp_path / "b.png")
    rows = look.rows(tmp_path, progress=False)
    assert [row["error"] for row in rows] == ["no face found", ""] and rows[0]["label"] == ""
    look.detect = lambda image: [(10, 10, 30, 30), (60, 60, 20, 20)]  # the cascade is not what is tested
    image = torch.randint(0, 255, (3, 100, 100), dtype=torch.uint8)
    (largest,) = look(image)
    assert largest.box == (10, 10, 30, 30) and largest.note == "the largest of 2 faces"
    expected = Predictor(model, "cpu")(image[:, 10:40, 10:40])[0]
    assert largest.probabilities == pytest.approx(expected.probabilities, abs=1e-6)
    look.faces = "all"
    assert [result.note for result in look([image])] == ["face 1 of 2", "face 2 of 2"]


def write_video(path, faces, cv2):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10, (64, 64))
    for face in faces:
        writer.write(np.ascontiguousarray(array(face)[:, :, ::-1]))
    writer.release()


def test_video(predictor, faces, tmp_path):
    cv2 = pytest.importorskip("cv2")
    path = tmp_path / "film.avi"
    write_video(path, faces, cv2)
    rows = predictor.rows(path, progress=False)
    assert [row["frame"] for row in rows] == list(range(8)) and rows[3]["seconds"] == 0.3
    assert not any(row["error"] for row in rows)
    assert [row["frame"] for row in predictor.rows(path, every=3, progress=False)] == [0, 3, 6]
    alone = predictor(faces[0])[0].probabilities  # the same colours, but for the video's compression
    assert max(abs(rows[0][name] - alone[name]) for name in alone) < 0.1
    cut = tmp_path / "cut.avi"
    data = path.read_bytes()
    cut.write_bytes(data[: len(data) // 2])
    rows = predictor.rows(cut, progress=False)
    assert 0 < len(rows) < 9 and not rows[0]["error"]
    empty = tmp_path / "empty.mp4"
    empty.write_bytes(b"")
    with pytest.raises(DataError, match="not a video that can be read"):
        predictor.rows(empty)


def test_to_pixels_keeps_what_is_right(faces):
    assert torch.equal(to_pixels(faces[0]), faces[0])
    gray = to_pixels(np.arange(64, dtype=np.uint8).reshape(8, 8))
    assert gray.shape == (3, 8, 8) and torch.equal(gray[0], gray[2])

"""check and preview."""

import pytest
import trees
from PIL import Image

from fer_models.data import SyntheticFaces, check, create_dataset, preview


@pytest.mark.parametrize("name", trees.TREES)
def test_recognised(name, tmp_path):
    report = check(trees.TREES[name](tmp_path))
    assert report.name == name and report.ok and not report.error
    dataset = create_dataset(name, tmp_path)
    assert report.splits[0].counts == dataset.class_counts()
    text = str(report)
    assert f"{dataset.classes[1]:8} " in text and "sizes: " in text


def test_forms_are_recognised(tmp_path):
    assert check(trees.affectnet_npy(tmp_path / "a")).options == {"form": "npy"}
    report = check(trees.ferplus_csv(tmp_path / "b"), protocol="argmax8")
    assert report.options == {"form": "csv", "protocol": "argmax8"} and report.splits[0].samples == 8


def test_finds_damage(tmp_path):
    root = trees.rafdb(tmp_path)
    images = root / "basic/Image/aligned"
    (images / "train_00001_aligned.jpg").write_bytes(b"")
    (images / "train_00002_aligned.jpg").unlink()
    trees.write_image(images / "train_00003_aligned.jpg", 3, (12, 12))
    trees.write_image(images / "train_00004_aligned.jpg", 4, (300, 100))
    Image.new("RGB", (100, 100), "red").save(images / "train_00005_aligned.jpg")
    (images / "train_00006_aligned.jpg").write_bytes((images / "train_00000_aligned.jpg").read_bytes())
    (images / "test_0001_aligned.jpg").write_bytes((images / "train_00000_aligned.jpg").read_bytes())
    report = check(root)
    train = report.splits[0]
    assert not report.ok
    assert sorted(train.unreadable.values()) == ["0 bytes", "missing"]
    assert sorted(train.suspicious.values()) == [
        "12 x 12 pixels, small for a face",
        "300 x 100 pixels, long for a face",
        "all pixels are equal",
    ]
    assert (train.copies, train.contradictions) == (1, 1)
    assert report.shared == {("train", "test"): 1}
    text = str(report)
    assert "2 unreadable:" in text and "1 images of test are in train too" in text


def test_says_what_is_missing(tmp_path):
    root = trees.rafdb(tmp_path / "tree")
    (root / "basic/EmoLabel").rename(tmp_path / "away")
    text = str(check(root))
    assert "looks like rafdb (Image/aligned found)" in text and "list_patition_label.txt" in text
    assert "\n" not in text
    assert str(check(tmp_path / "no")).endswith("no: no such file or folder")
    (tmp_path / "empty").mkdir()
    assert str(check(tmp_path / "empty")).endswith("empty: empty, no files at all")
    trees.write_text(tmp_path / "other/readme.txt", "")
    assert "no layout of a known data set (rafdb, " in str(check(tmp_path / "other"))
    with pytest.raises(ValueError, match=r"no data set 'rafbd'.*did you mean 'rafdb'"):
        check(root, "rafbd")


def test_preview(tmp_path):
    dataset = create_dataset("rafdb", trees.rafdb(tmp_path / "tree"))
    (tmp_path / "tree/basic/Image/aligned/train_00001_aligned.jpg").write_bytes(b"")
    sheet = preview(dataset, tmp_path / "out/sheet.png", columns=4, side=32)
    assert sheet.size == (120 + 4 * 34, 7 * 34)
    assert Image.open(tmp_path / "out/sheet.png").size == sheet.size
    faces = SyntheticFaces(length=16, size=32)
    assert preview(faces, columns=2, side=32).tobytes() == preview(faces, columns=2, side=32).tobytes()
    with pytest.raises(ValueError, match="columns = 0"):
        preview(faces, columns=0)

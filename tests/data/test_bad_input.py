"""What is wrong on disk ends in one line that names class, path, what came and what was expected."""

import io
import warnings

import numpy as np
import pytest
import torch
import trees
from PIL import Image

from fer_models.data import DATASETS, DataError, ImageError, Source, create_dataset, decode_image


def encoded(image, form, **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


GRAY16 = Image.fromarray(np.full((8, 8), 0x8040, np.uint16))
BAD_IMAGES = {
    "zero bytes": (b"", "^0 bytes$"),
    "text": (b"Not an image at all", r"not an image \(starts with b'Not an i'\)"),
    "truncated png": (trees.png_bytes()[:3000], r"damaged image of 3000 bytes"),
    "truncated jpeg": (
        encoded(Image.effect_noise((64, 64), 50), "JPEG")[:900],
        r"damaged image of 900 bytes \(.*truncated",
    ),
    "20,000 pixels wide": (
        encoded(Image.new("L", (20000, 2)), "PNG"),
        "20000 x 2 pixels, more than 10000 on a side",
    ),
    "float": (encoded(Image.fromarray(np.zeros((8, 8), np.float32)), "TIFF"), "floating-point pixels"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_unusable_images(name):
    data, message = BAD_IMAGES[name]
    with pytest.raises(ImageError, match=message) as caught:
        decode_image(data)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (encoded(GRAY16, "PNG"), (128, 128, 128)),
        (encoded(GRAY16, "TIFF"), (128, 128, 128)),
        (encoded(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "TIFF"), (0, 255, 255)),
        (encoded(Image.new("RGBA", (8, 8), (200, 100, 50, 0)), "PNG"), (0, 0, 0)),
        (encoded(Image.new("RGBA", (8, 8), (200, 100, 50, 255)), "PNG"), (200, 100, 50)),
        (encoded(Image.new("LA", (8, 8), (77, 255)), "PNG"), (77, 77, 77)),
        (encoded(Image.new("1", (8, 8), 1), "PNG"), (255, 255, 255)),
        (encoded(Image.new("P", (8, 8), 0), "PNG", transparency=0), (0, 0, 0)),
        (encoded(Image.new("L", (8, 8), 9), "BMP"), (9, 9, 9)),
    ],
    ids=["png16", "tiff16", "cmyk", "transparent", "opaque", "gray-alpha", "1-bit", "palette", "gray"],
)
def test_unusual_images(data, expected):
    image = decode_image(data)
    assert image.shape == (3, 8, 8) and image.dtype == torch.uint8 and image.is_contiguous()
    assert tuple(image[:, 3, 3].tolist()) == expected


def test_cmyk_jpeg():
    image = decode_image(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG"))
    assert image[0].min() > 200 and image[1:].max() < 60


def test_exif_rotation():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_image(encoded(Image.new("RGB", (20, 10)), "JPEG", exif=exif)).shape == (3, 20, 10)


@pytest.mark.parametrize("name", trees.TREES)
def test_wrong_path(name, tmp_path):
    with pytest.raises(DataError, match=f"{DATASETS[name].__name__}: .*nowhere: no such file or folder"):
        create_dataset(name, tmp_path / "nowhere")


@pytest.mark.parametrize("name", trees.TREES)
def test_empty_folder(name, tmp_path):
    with pytest.raises(DataError) as caught:
        create_dataset(name, tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{DATASETS[name].__name__}: {tmp_path}") and "\n" not in message
    assert "missing" in message


@pytest.mark.parametrize("name", trees.TREES)
def test_no_archive(name, tmp_path):
    path = trees.write_text(tmp_path / "a.zip", "text")
    with pytest.raises(DataError, match=r"neither a folder nor a readable zip archive \(4 bytes\)"):
        create_dataset(name, path)


@pytest.mark.parametrize(
    ("name", "lost", "message"),
    [
        (
            "rafdb",
            "basic/EmoLabel",
            r"RAFDB: .*EmoLabel/list_patition_label\.txt is missing .*; found Image/al",
        ),
        ("rafdb", "basic/Image/aligned", r"Image/aligned is missing .*; found EmoLabel/list_pati"),
        (
            "ferplus",
            "FER2013Train/label.csv",
            r"FERPlus: .*FER2013Train/label\.csv is missing .*; found FER2013V",
        ),
        ("affectnet", "Manually_Annotated_Images", r"Manually_Annotated_Images is missing"),
        ("affwild2", "cropped_aligned", r"cropped_aligned is missing .one folder of frames"),
        ("affwild2", "EXPR_Classification_Challenge", r"EXPR_Classification_Challenge/Train_Set or EXPR_Set"),
        ("ckplus", "Emotion", r"Emotion is missing .the labels.*; found cohn-kanade-images"),
        ("sfew", "Train", r"Train_Aligned_Faces is missing"),
        ("folder", "train", r"the folder train is missing; the root holds val"),
    ],
)
def test_half_a_layout(name, lost, message, tmp_path):
    root = trees.TREES[name](tmp_path / "tree")
    (root / lost).rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=message) as caught:
        create_dataset(name, root)
    assert "\n" not in str(caught.value)


RAF = "basic/EmoLabel/list_patition_label.txt"
AFFECT = "Manually_Annotated_file_lists/training.csv"
EXPR = "EXPR_Classification_Challenge/Train_Set/12-24_left.txt"
CK = "Emotion/S001/000/S001_000_00000005_emotion.txt"
VA = "VA_Estimation_Challenge/Train_Set/12-24_left.txt"


@pytest.mark.parametrize(
    ("name", "file", "old", "new", "message"),
    [
        ("rafdb", RAF, "00002.jpg 3", "00002.jpg 9", r"line 3: label 9 is out"),
        ("rafdb", RAF, "00002.jpg 3", "00002.jpg", r"line 3: 'train_00002.jpg'"),
        ("fer2013", "fer2013.csv", "\n3,", "\n7,", r"fer2013\.csv line 5: label 7 is out of range, expected"),
        ("fer2013", "fer2013.csv", "emotion,", "Emotion,", r"the columns are 'Emotion,pixels,Usage', exp"),
        ("fer2013", "fer2013.csv", "Training\n1", "Trainig\n1", r"line 2: 3 columns ending in 'Trainig'"),
        ("affectnet", AFFECT, ",3,-0.2", ",11,-0.2", r"line 5: label 11 is out"),
        ("affectnet", AFFECT, ",3,-0.2", ",3,-1.5", r"'-1\.5', expected -1"),
        ("affectnet", AFFECT, "1.0;2.0,", "", r"line 2: 8 columns, expected 9"),
        ("affwild2", EXPR, "\n6", "\n8", r"line 8: label '8' is"),
        ("affwild2", EXPR, "Neutral", "x", r"header 'x,Anger"),
        ("affwild2", VA, "0.5,", "5,", r"line 2: '5,-0\.25', exp"),
        ("ckplus", CK, "3.0", "8.0", r"label 8\.0 is out of range"),
    ],
)  # fmt: skip
def test_wrong_labels(name, file, old, new, message, tmp_path):
    root = trees.TREES[name](tmp_path)
    text = (root / file).read_text()
    assert old in text
    (root / file).write_text(text.replace(old, new))
    with pytest.raises(DataError, match=message) as caught:
        create_dataset(name, root)
    assert DATASETS[name].__name__ in str(caught.value) and "\n" not in str(caught.value)


def test_unreadable_image_is_reported_once_and_skipped(tmp_path):
    dataset = create_dataset("rafdb", trees.rafdb(tmp_path))
    (tmp_path / "basic/Image/aligned/train_00002_aligned.jpg").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"train_00002_aligned\.jpg: 0 bytes; skipped"):
        sample = dataset[2]
    assert sample["index"] == 3 and sample["label"] == dataset.labels[3]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dataset[2]["index"] == 3
    (tmp_path / "basic/Image/aligned/train_00004_aligned.jpg").write_bytes(b"x")
    with (
        pytest.warns(UserWarning),
        pytest.raises(DataError, match=r"2 images cannot be read, more than skip_lim"),
    ):
        dataset[4]


def test_missing_images(tmp_path):
    root = trees.rafdb(tmp_path)
    (root / "basic/Image/aligned/train_00002_aligned.jpg").unlink()
    with pytest.warns(UserWarning, match=r"1 of 8 images are missing, skipped; the first: basic/Image"):
        assert len(create_dataset("rafdb", root)) == 7
    with pytest.raises(DataError, match=r"1 of 8 images are missing, more than skip_limit = 0; the first: "):
        create_dataset("rafdb", root, skip_limit=0)


def test_names_cannot_leave_the_root(tmp_path):
    root = trees.rafdb(tmp_path / "tree")
    trees.write_image(tmp_path / "secret_aligned.jpg")
    labels = root / "basic/EmoLabel/list_patition_label.txt"
    labels.write_text(labels.read_text() + "train_/../../../../../secret.jpg 1\n")
    with pytest.warns(UserWarning, match="1 of 9 images are missing"):
        assert len(create_dataset("rafdb", root)) == 8


def test_contradicting_duplicates(tmp_path):
    root = trees.rafdb(tmp_path)
    labels = root / "basic/EmoLabel/list_patition_label.txt"
    labels.write_text(labels.read_text() + "train_00001.jpg 2\n")
    assert create_dataset("rafdb", root).notes == ["1 rows repeat an image"]
    labels.write_text(labels.read_text() + "train_00003.jpg 1\n")
    dataset = create_dataset("rafdb", root)
    assert len(dataset) == 8 and not any("00003" in record.image for record in dataset.records)
    with pytest.raises(DataError, match=r"1 are listed more than once with different labels, more than skip"):
        create_dataset("rafdb", root, skip_limit=0)


def test_damaged_zip(tmp_path):
    path = trees.zipped(trees.rafdb(tmp_path / "tree"), tmp_path / "data.zip")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="neither a folder nor a readable zip archive"):
        create_dataset("rafdb", path)
    # Beside other files it is named where something is missing
    (tmp_path / "tree").rename(tmp_path / ".away")
    with pytest.raises(
        DataError, match=r"list_patition_label\.txt is missing .*could not look into .*damaged zip"
    ):
        create_dataset("rafdb", tmp_path)
    # One damaged member is one unreadable image
    start = whole.index(b"train_00005_aligned.jpg") + 1000
    path.write_bytes(whole[:start] + bytes(8) + whole[start + 8 :])
    dataset = create_dataset("rafdb", path)
    with pytest.warns(UserWarning, match=r"cannot be read \(Bad CRC-32"):
        bad = [i for i in range(len(dataset)) if dataset[i]["index"] != i]
    assert bad == [5]


def test_links_in_a_circle(tmp_path):
    trees.rafdb(tmp_path)
    (tmp_path / "basic/loop").symlink_to(tmp_path)
    assert len(create_dataset("rafdb", tmp_path)) == 8


def test_binary_label_file(tmp_path):
    root = trees.rafdb(tmp_path)
    (root / "basic/EmoLabel/list_patition_label.txt").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(DataError, match=r"list_patition_label\.txt: not a text file"):
        create_dataset("rafdb", root)


def test_source_finds_the_nearest(tmp_path):
    for name in ("b/x/label.csv", "a/label.csv", "label.txt"):
        trees.write_text(tmp_path / name, "")
    source = Source(tmp_path)
    assert source.find("label.csv") == "a/label.csv"
    assert source.find("x/label.csv") == "b/x/label.csv"
    assert source.find("l*.txt") == "label.txt" and source.find("abel.txt") is None
    assert source.folders() == ["a", "b"] and source.files("a", (".csv",)) == ["label.csv"]
    assert not source.exists("../a") and source.exists("a")

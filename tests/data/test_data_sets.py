"""Every data set on a small tree in its official layout."""

import math
import pickle
from collections import Counter

import pytest
import torch
import trees
from torch.utils.data import DataLoader

from fer_models.data import (
    DATASETS,
    EMOTIONS,
    UNLABELLED,
    AffectNet,
    AffWild2,
    CKPlus,
    DataError,
    ImageFolder,
    create_dataset,
    emotion_index,
)

from fer_models.data import affectnet, affwild2, ckplus, fer2013, jaffe, mmi, oulu_casia, rafdb, sfew  # isort: skip

N, H, SA, SU, F, D, A, C = range(8)


def by_name(dataset):
    """Label of each image by the last part of its name."""
    return {record.image.rpartition("/")[2]: record.label for record in dataset.records}


def test_canonical_order():
    assert EMOTIONS == ("neutral", "happy", "sad", "surprise", "fear", "disgust", "anger", "contempt")
    for spelling, label in {"Happiness": H, "ANGRY": A, "Surprised": SU, " sad ": SA, "joy": H}.items():
        assert emotion_index(spelling) == label
    with pytest.raises(ValueError, match=r"'hapy' names no emotion.*did you mean 'happy'\?"):
        emotion_index("hapy")


@pytest.mark.parametrize(
    "codes",
    [rafdb.CODES, fer2013.CODES, ckplus.CODES, jaffe.CODES, sfew.CODES, mmi.CODES, oulu_casia.CODES],
)
def test_maps_name_emotions(codes):
    assert set(codes.values()) <= set(EMOTIONS)


@pytest.mark.parametrize("archive", [False, True], ids=["folder", "zip"])
@pytest.mark.parametrize("name", trees.TREES)
def test_samples(name, archive, tmp_path):
    """The contract of a sample, batches by the default collate, from a folder and from a zip."""
    root = trees.TREES[name](tmp_path / "tree")
    if archive:
        root = trees.zipped(root, tmp_path / "tree.zip", "some/where/")
    dataset = create_dataset(name, root)
    assert len(dataset) == sum(dataset.class_counts())
    batch = next(iter(DataLoader(dataset, 3)))
    assert batch["image"].shape[:2] == (3, 3) and batch["image"].dtype == torch.float32
    assert batch["image"].min() >= 0 and 0.5 < batch["image"].max() <= 1
    assert batch["label"].tolist() == dataset.labels[:3]
    assert batch["distribution"].shape == (3, dataset.num_classes)
    torch.testing.assert_close(batch["distribution"].sum(1), torch.ones(3))
    assert batch["valence_arousal"].shape == (3, 2)
    assert batch["index"].tolist() == [0, 1, 2]
    with pytest.raises(IndexError):
        dataset[len(dataset)]


@pytest.mark.parametrize("name", trees.TREES)
def test_pickled(name, tmp_path):
    """As a spawned worker gets it."""
    dataset = create_dataset(name, trees.TREES[name](tmp_path))
    other = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(other[1]["image"], dataset[1]["image"]) and repr(other) == repr(dataset)


def test_zip_in_forked_workers(tmp_path):
    """Each process reads through a handle of its own, though the parent has one open."""
    root = trees.zipped(trees.rafdb(tmp_path / "tree"), tmp_path / "tree.zip")
    dataset = create_dataset("rafdb", root)
    expected = torch.stack([dataset[i]["image"] for i in range(len(dataset))])
    loader = DataLoader(dataset, 1, num_workers=2, multiprocessing_context="fork")
    for _ in range(3):
        assert torch.equal(torch.cat([batch["image"] for batch in loader]), expected)


def test_rafdb(tmp_path):
    root = trees.rafdb(tmp_path)
    train = create_dataset("rafdb", root)
    assert train.labels == [SU, F, D, H, SA, A, N, H]
    assert train[0]["image"].shape == (3, 100, 100)
    assert create_dataset("rafdb", root, aligned=False)[0]["image"].shape == (3, 90, 120)
    assert create_dataset("rafdb", root, "test").labels == [N]


def test_fer2013(tmp_path):
    root = trees.fer2013(tmp_path)
    assert create_dataset("fer2013", root).labels == [A, D, F, H, SA, SU, N]
    assert [len(create_dataset("fer2013", root, split)) for split in ("valid", "test")] == [2, 3]
    assert create_dataset("fer2013", root)[2]["image"].shape == (3, 48, 48)


def test_affectnet_csv(tmp_path):
    root = trees.affectnet_csv(tmp_path)
    for split in ("train", "valid"):
        dataset = AffectNet(root, split)
        assert dataset.labels == list(range(8))  # none, uncertain and no face are left out
        assert dataset[3]["image"].shape == (3, 30, 40)  # the face's box
        torch.testing.assert_close(dataset[3]["valence_arousal"], torch.tensor([-0.2, 0.25]))
    seven = AffectNet(root, classes=7, cut=False)
    assert seven.labels == list(range(7)) and seven.num_classes == 7
    assert seven[0]["image"].shape == (3, 60, 80)


def test_affectnet_unknown_affect(tmp_path):
    root = trees.affectnet_csv(tmp_path)
    path = root / "Manually_Annotated_file_lists/validation.csv"
    path.write_text(path.read_text().replace("0,-0.5,0.25", "0,-2,-2"))
    assert AffectNet(root, "valid")[0]["valence_arousal"].isnan().all()


def test_affectnet_npy(tmp_path):
    root = trees.affectnet_npy(tmp_path)
    for split in ("train", "valid"):
        dataset = AffectNet(root, split, form="npy")
        assert dataset.labels == list(range(8))
        assert dataset.records[4].image.endswith("images/12.jpg")
        assert dataset[4]["valence_arousal"].tolist() == [-0.5, 0.125]


def test_affectnet_never_unpickles(tmp_path):
    root = trees.affectnet_npy(tmp_path)

    class Harm:
        def __reduce__(self):
            return (pytest.fail, ("unpickled",))

    import numpy as np

    np.save(root / "train_set/annotations/3_exp.npy", np.array(Harm(), dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match=r"3_exp\.npy: not a plain array"):
        AffectNet(root, form="npy")


@pytest.mark.parametrize("other", [False, True])
def test_affwild2(other, tmp_path):
    root = trees.affwild2(tmp_path, other=other)
    dataset = AffWild2(root)
    frames = ["00001", "00002", "00004", "00005", "00006", "00007"] + ([] if other else ["00009"])
    assert [record.image[-9:-4] for record in dataset.records] == frames  # 3 has no image, 8 no label
    assert dataset.labels == [N, A, F, H, SA, SU] + ([] if other else [N])
    assert dataset[0]["valence_arousal"].tolist() == [0.5, -0.25]
    assert dataset.subjects[0] == "12-24_left"
    affect = AffWild2(root, "valid", task="va")
    assert len(affect) == 14  # two videos, frame 3 without an image, frame 9 invalid
    assert affect.labels.count(UNLABELLED) == 8 and len(AffWild2(root, stride=2)) < len(dataset)
    assert affect[13]["distribution"].sum() == 0


def test_affwild2_other_as_class(tmp_path):
    dataset = AffWild2(trees.affwild2(tmp_path), other="class")
    assert dataset.classes[7] == "other" and dataset.labels == [N, A, F, H, SA, SU, 7]
    assert math.isnan(dataset.records[-1].valence)
    assert affwild2.AffWild2 is AffWild2 and affectnet.AffectNet is AffectNet


def test_ckplus(tmp_path):
    root = trees.ckplus(tmp_path)
    dataset = CKPlus(root)
    assert len(dataset) == 7 * 3  # seven labelled sequences, their last three frames
    assert [r.image[-6:-4] for r in dataset.records[:3]] == ["03", "04", "05"]
    assert Counter(dataset.labels) == dict.fromkeys([A, D, F, H, SA, SU], 3) | {A: 6}
    assert C not in dataset.labels  # its sequence is the unlabelled one
    neutral = CKPlus(root, neutral=True, frames=1)
    assert len(neutral) == 14 and neutral.class_counts()[N] == 7
    parts = [set(CKPlus(root, "valid", fold=fold, folds=4).subjects) for fold in range(4)]
    assert sorted(s for part in parts for s in part) == ["S000", "S001", "S002", "S003"]
    assert set(CKPlus(root, "train", fold=1, folds=4).subjects).isdisjoint(parts[1])


def test_jaffe(tmp_path):
    dataset = create_dataset("jaffe", trees.jaffe(tmp_path))
    assert dataset.class_counts() == [3] * 7 and set(dataset.subjects) == {"KA", "KL", "KM"}
    assert by_name(dataset)["KA.HA1.42.tiff"] == H
    assert set(create_dataset("jaffe", tmp_path, "valid", fold=2, folds=3).subjects) == {"KM"}


@pytest.mark.parametrize("base", ["OriginalImg", "B_OriginalImg"])
def test_oulu_casia(base, tmp_path):
    root = trees.oulu_casia(tmp_path, base)
    dataset = create_dataset("oulu_casia", root)
    assert dataset.class_counts() == [0] + [9] * 6 and set(dataset.subjects) == {"P001", "P002", "P003"}
    assert create_dataset("oulu_casia", root, neutral=True).class_counts()[N] == 18
    with pytest.raises(DataError, match=r"NI/Strong is missing"):
        create_dataset("oulu_casia", root, spectrum="NI")


def test_sfew(tmp_path):
    root = trees.sfew(tmp_path)
    for split in ("train", "valid"):
        dataset = create_dataset("sfew", root, split)
        assert dataset.class_counts() == [1] * 7 and dataset.subjects[0] == "Bridget_Jones"


def test_sfew_from_its_archives(tmp_path):
    """The official parts as downloaded: one zip each in a folder."""
    tree = trees.sfew(tmp_path / "tree")
    trees.zipped(tree / "Train", tmp_path / "Train_Aligned_Faces.zip")
    trees.zipped(tree / "Val", tmp_path / "Val_Aligned_Faces_new.zip")
    (tmp_path / "tree").rename(tmp_path / ".hidden")
    assert len(create_dataset("sfew", tmp_path)) == len(create_dataset("sfew", tmp_path, "valid")) == 7


def test_mmi(tmp_path):
    root = trees.mmi(tmp_path)
    dataset = create_dataset("mmi", root)
    assert dataset.class_counts() == [0] + [3] * 6  # emotions 7 and 8 are none of the basic ones
    assert [r.image[-8:] for r in dataset.records[:3]] == ["0004.png", "0005.png", "0006.png"]
    assert dataset.records[0].subject == "S000"
    for folder in (root / "Sessions").iterdir():
        for frame in folder.rglob("*.png"):
            frame.unlink()
    with pytest.raises(DataError, match=r"6 videos but no frames; extract them: .*ffmpeg -i"):
        create_dataset("mmi", root)


def test_folder(tmp_path):
    root = trees.image_folder(tmp_path)
    assert ImageFolder(root).class_counts() == [3, 1, 0, 0, 0, 0, 2]
    assert len(ImageFolder(root, "valid")) == 6
    assert ImageFolder(root / "train", "all").class_counts() == ImageFolder(root).class_counts()
    trees.write_image(root / "train/contempt/x.png")
    assert ImageFolder(root).num_classes == 8 and ImageFolder(root, classes=7).num_classes == 7
    trees.write_image(root / "train/hapy/x.png")
    with pytest.raises(DataError, match=r"'hapy' names no emotion.*did you mean 'happy'"):
        ImageFolder(root)


def test_registry(tmp_path):
    assert list(DATASETS) == [*trees.TREES, "synthetic"]
    with pytest.raises(ValueError, match=r"no data set 'ferpuls', expected .*did you mean 'ferplus'\?"):
        create_dataset("ferpuls", tmp_path)
    with pytest.raises(ValueError, match=r"ferplus has no option 'protocoll'.*did you mean 'protocol'\?"):
        create_dataset("ferplus", tmp_path, protocoll="majority")
    with pytest.raises(ValueError, match="rafdb needs root"):
        create_dataset("rafdb")
    with pytest.raises(ValueError, match=r"RAFDB: split = 'tests', expected one of .*did you mean 'test'\?"):
        create_dataset("rafdb", trees.rafdb(tmp_path), "tests")


def test_subset(tmp_path):
    dataset = create_dataset("rafdb", trees.rafdb(tmp_path))
    part = dataset.subset([1, 3], transform=lambda image: image[:, :2, :2])
    assert part.labels == [F, H] and part[1]["image"].shape == (3, 2, 2) and len(dataset) == 8
    assert dataset[0]["image"].shape == (3, 100, 100)

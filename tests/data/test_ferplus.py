"""FERPlus: its protocols on chosen votes, its two forms, and the counts of the real data if present."""

import os
from pathlib import Path

import pytest
import torch
import trees

from fer_models.data import DataError, FERPlus
from fer_models.data.ferplus import COLUMNS, PROTOCOLS, apply_protocol

DATA = Path(os.environ.get("FER_DATA", Path(__file__).parents[3] / "shared/data"))

# The table in the data's README
COUNTS = {
    ("folder", "train"): (25045, 27947, 28385, 28556),
    ("folder", "valid"): (3191, 3508, 3555, 3579),
    ("csv", "train"): (25060, 27956, 28389, 28559),
    ("csv", "valid"): (3199, 3505, 3553, 3579),
}


@pytest.fixture(scope="session")
def real_data():
    if not (DATA / "ferplus_trainval.zip").exists():
        pytest.skip(f"FERPlus is not at {DATA} (FER_DATA names another folder)")
    return DATA


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(("form", "split"), COUNTS)
def test_counts(real_data, form, split, protocol):
    dataset = FERPlus(real_data, split, form=form, protocol=protocol)
    assert len(dataset) == COUNTS[form, split][PROTOCOLS.index(protocol)]


def test_majority_classes(real_data):
    dataset = FERPlus(real_data)
    counts = dict(zip(dataset.classes, dataset.class_counts(), strict=True))
    assert [counts[name] for name in COLUMNS] == [8733, 7284, 3136, 3022, 2098, 116, 536, 120]
    assert dataset[0]["image"].shape == (3, 48, 48)


def test_real_test_split_is_absent(real_data):
    if (real_data / "FER2013Test").exists():
        pytest.skip("the test split is there")
    with pytest.raises(
        DataError, match=r"FER2013Test/label\.csv is missing .*; found FER2013Train/label\.csv"
    ):
        FERPlus(real_data, "test")


@pytest.mark.parametrize("which", range(len(PROTOCOLS)), ids=PROTOCOLS)
def test_protocols(which):
    for votes, expected in trees.VOTES:
        kept = apply_protocol(votes, PROTOCOLS[which])
        assert (kept and kept.index(max(kept))) == expected[which], votes


def test_probability_gives_unknown_back():
    # Unknown comes second: it is given back, and what came before covers six of ten
    assert apply_protocol((6, 0, 0, 0, 0, 0, 0, 0, 4, 0), "probability") == [6] + [0] * 7
    # The single vote is dropped, two emotions cover three quarters of the rest
    assert apply_protocol((4, 0, 0, 3, 1, 0, 0, 0, 2, 0), "probability") == [4, 0, 0, 3, 0, 0, 0, 0]


def test_forms_agree(tmp_path):
    folders, table = trees.ferplus(tmp_path / "a"), trees.ferplus_csv(tmp_path / "b")
    for protocol in PROTOCOLS:
        for split in ("train", "valid", "test"):
            one = FERPlus(folders, split, protocol=protocol)
            other = FERPlus(table, split, form="csv", protocol=protocol)
            assert one.labels == other.labels
            assert [r.distribution for r in one.records] == [r.distribution for r in other.records]
    # Row 1 was removed, so the second image is row 2 of the pixels
    assert (FERPlus(table, form="csv")[1]["image"] * 255).unique().tolist() == [2]


def test_csv_with_image_folders(tmp_path):
    trees.ferplus(tmp_path)
    trees.ferplus_csv(tmp_path)
    (tmp_path / "fer2013.csv").unlink()
    rows = (tmp_path / "fer2013new.csv").read_text().splitlines()[1]
    (tmp_path / "fer2013new.csv").write_text(f"{rows}\n{rows}\n")
    dataset = FERPlus(tmp_path, form="csv")
    assert len(dataset) == 2 and dataset.notes == ["1 rows repeat an image"]  # published counts include it
    for image in tmp_path.rglob("*.png"):
        image.unlink()
    with pytest.raises(
        DataError, match=r"holds votes only; the images are missing, either .* or fer2013\.csv"
    ):
        FERPlus(tmp_path, form="csv")


def test_distribution(tmp_path):
    dataset = FERPlus(trees.ferplus(tmp_path), protocol="argmax8")
    torch.testing.assert_close(dataset[1]["distribution"], torch.tensor([0, 0.6, 0, 0, 0, 0, 0, 0.4]))
    seven = FERPlus(tmp_path, protocol="argmax8", classes=7)
    torch.testing.assert_close(seven[1]["distribution"], torch.tensor([0, 1.0, 0, 0, 0, 0, 0]))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f"a.png,{trees.BOX},1,2,3", r"label\.csv line 1: 5 columns, expected 12"),
        (f"a.png,{trees.BOX},11,0,0,0,0,0,0,0,0,0", r"line 1: votes 11,0.*expected numbers from 0 to 10"),
        (f"a.png,{trees.BOX},x,0,0,0,0,0,0,0,0,0", r"line 1: votes x,0"),
    ],
)
def test_wrong_lines(line, message, tmp_path):
    trees.ferplus(tmp_path)
    (tmp_path / "FER2013Train/label.csv").write_text(line + "\n")
    with pytest.raises(DataError, match=message):
        FERPlus(tmp_path)


def test_options(tmp_path):
    with pytest.raises(ValueError, match=r"FERPlus: protocol = 'majorty', .* did you mean 'majority'\?"):
        FERPlus(tmp_path, protocol="majorty")

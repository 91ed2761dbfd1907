"""SyntheticFaces: determinism, balance, the meaning of its numbers, and that pixels alone do not tell."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from fer_models.data import ACTION_UNITS, EMOTIONS, SyntheticFaces, create_dataset


def test_deterministic():
    one, other = SyntheticFaces(length=40, size=32), SyntheticFaces(length=24, size=32)
    for index in (0, 7, 23):
        assert torch.equal(one.draw(index), other.draw(index))  # whatever the length
    assert one.records[:24] == other.records
    assert not torch.equal(one.draw(0), SyntheticFaces(length=1, size=32, seed=1).draw(0))
    assert not torch.equal(one.draw(0), SyntheticFaces(split="valid", length=1, size=32).draw(0))


def test_workers_and_cache_agree():
    plain, cached = SyntheticFaces(length=16, size=32), SyntheticFaces(length=16, size=32, cache=True)
    batches = list(DataLoader(plain, 4, num_workers=2))
    images = torch.cat([batch["image"] for batch in batches])
    assert torch.equal(images, torch.stack([cached[i]["image"] for i in range(16)]))


@pytest.mark.parametrize("classes", [7, 8])
def test_balanced(classes):
    dataset = create_dataset("synthetic", split="valid", classes=classes, length=classes * 5)
    assert dataset.class_counts() == [5] * classes and dataset.classes == EMOTIONS[:classes]
    assert len(dataset) == classes * 5


def test_sample():
    sample = create_dataset("synthetic", length=3, size=48)[2]
    assert sample["image"].shape == (3, 48, 48) and sample["label"] == 2
    assert sample["distribution"].tolist() == [0, 0, 1, 0, 0, 0, 0, 0]
    assert sample["valence_arousal"].isfinite().all()


def test_affect_follows_expression_and_intensity():
    dataset = SyntheticFaces(length=4000, size=16)
    labels = np.array(dataset.labels)
    affect = np.array([(r.valence, r.arousal) for r in dataset.records])
    strength = dataset.strength
    assert np.abs(affect[labels == 0]).max() < 0.05
    assert (affect[labels == 1, 0] > 0.4).all() and (affect[labels == 2] < 0).all()
    assert np.corrcoef(strength[labels == 4], affect[labels == 4, 1])[0, 1] > 0.9
    units = dataset.action_units
    assert units.shape == (4000, len(ACTION_UNITS)) and units.min() >= 0 and units.max() <= 1
    jaw = next(i for i, name in enumerate(ACTION_UNITS) if name.startswith("AU26"))
    assert units[labels == 3, jaw].mean() > 0.5 > 0.2 > units[labels == 0, jaw].mean()


def test_contempt_is_on_either_side():
    dataset = SyntheticFaces(length=800, size=16)
    left, right = (next(i for i, n in enumerate(ACTION_UNITS) if n.startswith(f"AU12{s}")) for s in "LR")
    units = dataset.action_units[np.array(dataset.labels) == 7]
    share = (units[:, left] > units[:, right]).mean()
    assert 0.3 < share < 0.7 and (np.abs(units[:, left] - units[:, right]) > 0.3).all()


def test_people_are_not_shared():
    subjects = [set(SyntheticFaces(split=split, length=200).subjects) for split in ("train", "valid", "test")]
    assert all(len(s) > 50 for s in subjects) and not set.intersection(*subjects)


def test_difficulty():
    """Without pose, light and noise two smiles differ less than with them; labels stay."""
    spread = {}
    for difficulty in (0, 1):
        dataset = SyntheticFaces(length=400, size=24, people=1, difficulty=difficulty)
        smiles = [dataset.draw(i)[:, 6:18, 6:18].float() for i in range(1, 400, 8)]
        spread[difficulty] = torch.stack(smiles).std(0).mean().item()
    assert spread[0] < 0.7 * spread[1]
    assert dataset.labels == SyntheticFaces(length=400, difficulty=0.3).labels


@pytest.mark.parametrize("size", [16, 33, 224])
def test_sizes(size):
    dataset = SyntheticFaces(length=8, size=size)
    for index in range(8):
        image = dataset.draw(index)
        assert image.shape == (3, size, size) and image.dtype == torch.uint8
        assert image.float().std() > 5


def test_bad_options():
    with pytest.raises(ValueError, match="size = 8"):
        SyntheticFaces(size=8)
    with pytest.raises(ValueError, match="difficulty = 2"):
        SyntheticFaces(difficulty=2)
    with pytest.raises(ValueError, match="intensity = "):
        SyntheticFaces(intensity=(0.9, 0.5))
    with pytest.raises(ValueError, match=r"split = 'vaild'.*did you mean 'valid'"):
        SyntheticFaces(split="vaild")


def test_a_linear_classifier_stays_below_60_percent():
    """Ridge and logistic regression on the pixels, at the size that serves them best."""
    size = 24
    x, y = {}, {}
    for split, length in (("train", 4000), ("valid", 1000)):
        dataset = SyntheticFaces(split=split, size=size, length=length)
        pixels = torch.stack([dataset.draw(i) for i in range(length)]).float()
        gray = pixels.mean(1)
        x[split], y[split] = gray.flatten(1), torch.tensor(dataset.labels)
    mean, std = x["train"].mean(0), x["train"].std(0)
    x = {split: (values - mean) / std for split, values in x.items()}

    def accuracy(weight):
        return ((x["valid"] @ weight).argmax(1) == y["valid"]).float().mean().item()

    gram = x["train"].T @ x["train"]
    target = F.one_hot(y["train"], 8).float() - 1 / 8
    best = max(
        accuracy(torch.linalg.solve(gram + penalty * torch.eye(len(gram)), x["train"].T @ target))
        for penalty in (10.0, 1000.0, 10000.0)
    )
    weight = torch.zeros(size * size, 8, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=25, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(x["train"] @ weight, y["train"]) + 0.01 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    best = max(best, accuracy(weight.detach()))
    assert 0.2 < best < 0.6

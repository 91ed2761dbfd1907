"""Transforms: sizes, ranges, and that they travel to workers."""

import pickle
from functools import partial

import pytest
import torch
from torch.utils.data import DataLoader

from fer_models.data import SyntheticFaces, eval_transform, train_transform

IMAGE = torch.arange(3 * 40 * 56).remainder(256).to(torch.uint8).view(3, 40, 56)


@pytest.mark.parametrize("make", [eval_transform, train_transform, partial(train_transform, randaugment=2)])
@pytest.mark.parametrize("size", [32, 112])
def test_shape(make, size):
    image = make(size)(IMAGE)
    assert image.shape == (3, size, size) and image.dtype == torch.float32
    assert torch.equal(IMAGE, torch.arange(3 * 40 * 56).remainder(256).to(torch.uint8).view(3, 40, 56))


def test_normalisation():
    white = torch.full((3, 8, 8), 255, dtype=torch.uint8)
    assert eval_transform(8, imagenet=False)(white).unique().tolist() == [1]
    expected = (1 - torch.tensor((0.485, 0.456, 0.406))) / torch.tensor((0.229, 0.224, 0.225))
    torch.testing.assert_close(eval_transform(8)(white)[:, 0, 0], expected)


def test_all_off_is_a_flip():
    off = train_transform(40, turn=0, shift=0, zoom=0, color=0, erase=0)
    plain = eval_transform(40)(IMAGE)
    for _ in range(8):
        image = off(IMAGE)
        assert torch.equal(image, plain) or torch.equal(image, plain.flip(2))


def test_seeded_and_picklable():
    transform = pickle.loads(pickle.dumps(train_transform(32)))
    torch.manual_seed(0)
    one = transform(IMAGE)
    torch.manual_seed(0)
    assert torch.equal(one, transform(IMAGE))
    assert not torch.equal(one, transform(IMAGE))


def test_in_workers():
    faces = SyntheticFaces(length=8, size=48, transform=train_transform(32))
    batch = next(iter(DataLoader(faces, 8, num_workers=1)))
    assert batch["image"].shape == (8, 3, 32, 32) and batch["image"].isfinite().all()

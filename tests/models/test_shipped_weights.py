"""The weights that come with the package: they load every way, predict, stay small, and have a card."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch

import fer_models
from fer_models import Predictor
from fer_models.data import SyntheticFaces
from fer_models.registry import WEIGHTS, shipped_weights
from fer_models.train.checkpoint import read_about

CARDS = Path(__file__).parents[2] / "docs" / "weights"
SHIPPED = [(name, tag) for name in fer_models.list_models(pretrained=True) for tag in shipped_weights(name)]


@pytest.fixture(scope="module")
def faces():
    data = SyntheticFaces(None, "valid", length=6, size=48)
    return [data.draw(index) for index in range(6)]


def test_what_is_shipped():
    assert {("face2nodes_xs", "ferplus"), ("jadfer_xs", "ferplus")} <= set(SHIPPED)
    sizes = [file.stat().st_size for file in WEIGHTS.iterdir()]
    assert max(sizes) <= 9e6 and sum(sizes) <= 35e6


@pytest.mark.parametrize("name, tag", SHIPPED)
def test_every_way_to_load_gives_the_same(name, tag, faces):
    x = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    ways = [
        fer_models.create_model(name, pretrained=tag),
        fer_models.create_model(name, pretrained=True),
        Predictor(f"{name}.{tag}", "cpu").model,
        Predictor(name, "cpu").model,
        timm.create_model(f"{name}.{tag}", pretrained=True),
    ]
    side = timm.data.resolve_model_data_config(ways[-1])["input_size"][-1]
    assert side == read_about(shipped_weights(name)[tag])["size"]
    with torch.no_grad():
        first, *others = [model.eval()(x) for model in ways]
    for other in others:
        assert torch.equal(first, other)
    assert first.softmax(1).max() > 0.2 and not torch.allclose(first[0], first[1])


@pytest.mark.parametrize("name, tag", SHIPPED)
def test_a_batch_is_its_images(name, tag, faces):
    predictor = Predictor(f"{name}.{tag}", "cpu")
    for face, together in zip(faces, predictor(faces), strict=True):
        alone = predictor(face)[0]
        np.testing.assert_allclose(
            list(alone.probabilities.values()), list(together.probabilities.values()), atol=1e-5
        )


@pytest.mark.parametrize("name, tag", SHIPPED)
def test_other_heads_and_sizes(name, tag):
    model = fer_models.create_model(name, pretrained=tag, num_classes=3).eval()
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 112, 112)).shape == (1, 3)


@pytest.mark.parametrize("name, tag", SHIPPED)
def test_the_card(name, tag):
    card = (CARDS / f"{name}.{tag}.md").read_text()
    about = read_about(shipped_weights(name)[tag])
    for said in (*about["classes"], "fer eval", "FER2013Valid", "Limits", "accuracy"):
        assert said in card


def test_unknown_weights():
    with pytest.raises(
        ValueError, match=r"no weights with the tag 'rafdb' are shipped .*known tags: ferplus"
    ):
        fer_models.create_model("face2nodes_xs", pretrained="rafdb")
    with pytest.raises(ValueError, match="unknown weights 'rafdb' of face2nodes_xs: expected one of ferplus"):
        Predictor("face2nodes_xs.rafdb")

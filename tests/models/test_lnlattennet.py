"""LNLAttenNet: what the weights of the regions do, and what regions are."""

import pytest
import torch
import torch.distributed as dist
from training_support import assert_overfits, faces, train

from fer_models import create_model
from fer_models.layers.regions import LocalNets, crop_regions, region_boxes
from fer_models.losses import Criterion, Targets, cross_entropy

ATTENTION = (
    "attention.non_local.theta.weight",
    "attention.non_local.phi.weight",
    "attention.non_local.g.weight",
)


def tiny(seed=0, **options):
    torch.manual_seed(seed)
    defaults = {"widths": (6, 8, 10), "grid": 2, "local_dim": 5, "feature_stride": 2, "img_size": 16}
    return create_model("lnlattennet_xs", **{"num_classes": 3, **defaults, **options})


def images(batch=4, side=16, seed=1):
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(seed))


def uniform(model):
    """The same model with equal weights for all regions."""
    with torch.no_grad():
        (
            model.attention.score if model.attention.attn == "nonlocal" else model.attention.excite[-1]
        ).weight.zero_()
        if model.attention.attn == "se":
            model.attention.excite[-1].bias.zero_()
    return model


# Regions


def test_layouts():
    assert region_boxes("t", "grid", 2) == [
        (0, 0, 0.5, 0.5),
        (0.5, 0, 1, 0.5),
        (0, 0.5, 0.5, 1),
        (0.5, 0.5, 1, 1),
    ]
    assert region_boxes("t", "rows", 4)[1] == (0.0, 0.25, 1.0, 0.5)
    assert len(region_boxes("t", "5crop")) == 5 and region_boxes("t", "5crop")[-1] == (0.25, 0.25, 0.75, 0.75)
    overlapping = region_boxes("t", "overlap", 2, overlap=0.5)
    assert overlapping[0] == (0, 0, 0.75, 0.75) and overlapping[3] == (0.25, 0.25, 1, 1)


@pytest.mark.parametrize("side", [12, 14, 28])
@pytest.mark.parametrize("grid", [1, 3, 4])
def test_a_grid_of_crops_leaves_no_pixel_out(side, grid):
    pixels = torch.arange(side * side, dtype=torch.float32).reshape(1, 1, side, side)
    crops = crop_regions(pixels, region_boxes("t", "grid", grid))
    assert crops.unique().numel() == side * side
    if side % grid == 0:
        assert crops.numel() == side * side  # and takes none twice


def test_boxes_of_several_sizes_are_resized_to_the_largest():
    features = torch.randn(2, 3, 8, 8)
    crops = crop_regions(features, region_boxes("t", [(0, 0, 0.5, 0.5), (0, 0, 1, 1)]))
    assert crops.shape == (2, 2, 3, 8, 8)
    torch.testing.assert_close(crops[:, 1], features)


def test_grouped_local_networks_are_separate_ones():
    nets = LocalNets(3, 4, 5).eval()
    crops = torch.randn(2, 3, 4, 6, 6)
    together = nets(crops)
    for region in range(3):
        alone = LocalNets(1, 4, 5).eval()
        state = {
            name: tensor.reshape(3, -1, *tensor.shape[1:])[region] if tensor.dim() else tensor
            for name, tensor in nets.state_dict().items()
        }
        alone.load_state_dict(state)
        torch.testing.assert_close(alone(crops[:, region : region + 1]), together[:, region : region + 1])


# Invariants


@pytest.mark.parametrize(
    "options", [{}, {"nl_domain": "pixel"}, {"attn": "se"}, {"prior": True}, {"temperature": 0.1}]
)
def test_weights_sum_to_one(options):
    weights = tiny(**options)(images(), full=True).aux["region_weights"]
    assert weights.shape == (4, 4) and (weights > 0).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(4))


@pytest.mark.parametrize("feedback", ["scale", "map"])
@pytest.mark.parametrize("attn", ["nonlocal", "se"])
def test_uniform_attention_is_the_plain_ensemble(feedback, attn):
    plain = uniform(tiny(feedback="none", attn=attn)).eval()
    model = tiny(feedback=feedback, attn=attn).eval()
    assert not torch.allclose(model(images()), plain(images()), rtol=0, atol=1e-6)
    model.load_state_dict(plain.state_dict())
    torch.testing.assert_close(model(images()), plain(images()))


def test_the_order_of_unshared_regions_does_not_matter():
    order = torch.tensor([2, 0, 3, 1])
    boxes = region_boxes("t", "grid", 2)
    model = tiny(layout=boxes).eval()
    other = tiny(seed=1, layout=[boxes[i] for i in order]).eval()
    state = model.state_dict()
    for name, tensor in state.items():
        if name.startswith(("local.", "local_heads.")) and tensor.dim():
            state[name] = tensor.unflatten(0, (4, -1))[order].flatten(0, 1)
    state["head.fc.weight"] = state["head.fc.weight"].unflatten(1, (4, -1))[:, order].flatten(1)
    other.load_state_dict(state)
    ours, theirs = model(images(), full=True), other(images(), full=True)
    torch.testing.assert_close(ours.logits, theirs.logits)
    torch.testing.assert_close(ours.aux["region_weights"][:, order], theirs.aux["region_weights"])


@pytest.mark.parametrize("feedback", ["scale", "map", "logit"])
def test_the_local_cross_entropy_trains_the_attention(feedback):
    model = tiny(feedback=feedback)
    output = model(images(), full=True)
    label = torch.tensor([0, 1, 2, 0])
    cross_entropy(output.aux["ensemble_logits"], label).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    for name in ATTENTION:
        assert gradients[name].abs().sum() > 0


def test_the_regions_loss_leaves_the_weights_alone():
    label = torch.tensor([0, 1, 2, 0])
    for stop_gradient in (True, False):
        model = tiny(stop_gradient=stop_gradient)
        local = next(term.loss for term in model.loss_terms() if term.name == "local")
        local(model(images(), full=True), Targets(label)).backward()
        moved = model.attention.score.weight.grad
        assert (moved is None) == stop_gradient


def test_votes_are_the_weighted_mean_of_probabilities():
    output = tiny(ensemble="wvote")(images(), full=True)
    weights, local = output.aux["region_weights"], output.aux["local_logits"]
    torch.testing.assert_close(output.logits.softmax(1), (weights.unsqueeze(2) * local.softmax(2)).sum(1))


def test_eta_and_the_global_logits():
    output = tiny(eta=0.5)(images(), full=True)
    expected = output.aux["ensemble_logits"] + 0.5 * output.aux["global_logits"]
    torch.testing.assert_close(output.logits, expected)
    model = tiny(eta="learned", main_loss="final")
    Criterion.for_model(model)(model(images(), full=True), torch.tensor([0, 1, 2, 0]))[0].backward()
    assert model.eta.grad != 0


def test_an_entropy_floor_is_a_term():
    model = tiny(entropy_weight=0.1, entropy_floor=0.9)
    _, parts = Criterion.for_model(model)(model(images(), full=True), torch.tensor([0, 1, 2, 0]))
    assert "entropy" in parts


# The moving average


def test_the_average_follows_the_weights_while_training():
    model = tiny(momentum=0.9)
    assert model.region_average.tolist() == [0.25] * 4
    model.eval()(images())
    assert model.region_average.tolist() == [0.25] * 4
    weights = model.train()(images(), full=True).aux["region_weights"]
    torch.testing.assert_close(model.region_average, 0.9 * torch.full((4,), 0.25) + 0.1 * weights.mean(0))
    assert "region_average" in model.state_dict()


def test_the_prior_is_the_average():
    model, plain = tiny(prior=True).eval(), tiny().eval()
    model.region_average.copy_(torch.tensor([0.7, 0.1, 0.1, 0.1]))
    expected = plain(images(), full=True).aux["region_weights"] * model.region_average
    weights = model(images(), full=True).aux["region_weights"]
    torch.testing.assert_close(weights, expected / expected.sum(1, keepdim=True))


def test_the_average_is_over_all_processes(monkeypatch):
    model = tiny(momentum=0.0)
    elsewhere = torch.tensor([1.0, 0, 0, 0])
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: tensor.add_(elsewhere))
    weights = model(images(), full=True).aux["region_weights"]
    torch.testing.assert_close(model.region_average, (weights.mean(0) + elsewhere) / 2)


def test_weights_move_to_the_region_that_tells():
    x = torch.randn(48, 3, 16, 16, generator=torch.Generator().manual_seed(0)) / 2
    label = torch.arange(48) % 3
    for i, c in enumerate(label.tolist()):
        x[i, c, 8:, :8] += 3  # only the lower left quarter knows
    model = tiny(momentum=0.5, widths=(6, 8))
    train(model, x, Targets(label), 60, 1e-2)
    assert model.region_average.argmax() == 2 and model.region_average[2] > 0.35


# The rest


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"layout": "circle"}, "unknown layout 'circle': expected one of 'grid', 'overlap', '5crop', 'rows'"),
        ({"layout": [(0, 0, 1.5, 1)]}, r"a box must lie in \[0, 1\].*1.5"),
        ({"layout": [(0.5, 0, 0.5, 1)]}, "have an area"),
        ({"layout": []}, "at least one box"),
        ({"attn": "cbam"}, "unknown attn 'cbam': expected one of 'nonlocal', 'se'"),
        ({"nl_domain": "patch"}, "unknown nl_domain 'patch'"),
        ({"feedback": "gate"}, "unknown feedback 'gate': expected one of 'scale', 'logit', 'map', 'none'"),
        ({"ensemble": "mean"}, "unknown ensemble 'mean'"),
        ({"main_loss": "both"}, "unknown main_loss 'both'"),
        ({"eta": "learned"}, "main_loss='final'"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"feature_stride": 3}, "no level of stride 3, only 1, 2, 4"),
        ({"grid": 0}, "grid must be at least 1"),
        ({"ensemble": "wvote", "head": "label_graph"}, "head='label_graph' needs ensemble='concat'"),
        ({"drop_path_rate": 0.1}, "encoder='conv' has no drop_path_rate"),
        ({"encoder": "resnet17"}, "unknown backbone 'resnet17': did you mean"),
    ],
)
def test_refuses(options, match):
    with pytest.raises(ValueError, match=match):
        tiny(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"feedback": "logit", "valence_arousal": True},
        {"ensemble": "wvote", "valence_arousal": True},
        {"layout": "5crop", "share": True},
        {"layout": "overlap", "nl_domain": "pixel"},
        {"encoder": "resnet18", "feature_stride": 4, "widths": (1,) * 5, "img_size": 32},
    ],
)
def test_options_train_every_parameter(options):
    model = tiny(**options)
    output = model(images(side=32), full=True)
    Criterion.for_model(model)(output, torch.tensor([0, 1, 2, 0]))[0].backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]
    model.reset_classifier(2)
    assert model(images(side=32)).shape == (4, 2)


def test_overfits():
    torch.manual_seed(0)
    assert_overfits(create_model("lnlattennet_xs", widths=(12, 24, 48, 48), local_dim=16), lr=3e-3)


def test_each_loss_trains_its_part():
    x, targets = faces(classes=3, side=16)
    first_local, last_local = (train(tiny(), x, targets, 25, 5e-3)[i]["local"] for i in (0, -1))
    assert last_local < 0.8 * first_local
    last = train(tiny(), x, targets, 25, 5e-3, local=0.0)[-1]
    assert last["local"] > last_local  # nothing else trains the regions' own classifiers
    last_global = train(tiny(), x, targets, 25, 5e-3)[-1]["global"]
    assert train(tiny(), x, targets, 25, 5e-3, **{"global": 0.0})[-1]["global"] > last_global

"""Face2Nodes: what it starts as, its options, and that it learns."""

from __future__ import annotations

import pytest
import torch

import fer_models
from fer_kernels import use_backend
from fer_models import face2nodes, vig
from fer_models.layers.grapher import CONVS
from fer_models.layers.stem import FUSIONS, Depthwise


def nano(seed: int = 0, **options) -> face2nodes.Face2Nodes:
    torch.manual_seed(seed)
    return fer_models.create_model("face2nodes_nano", **{"depths": (2,), **options}).eval()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("conv", ["rmr", "rgate", "rboth"])
@pytest.mark.parametrize("fusion", ["concat", "sum", "kernels"])
def test_starts_as_the_network_without_relation_and_fusion(conv, fusion, x):
    with torch.no_grad():
        plain = nano(conv="mr", fusion="none")(x)
        assert torch.equal(nano(conv=conv, fusion="none")(x), plain)
        torch.testing.assert_close(nano(conv=conv, fusion=fusion)(x), plain)
        assert torch.equal(nano(conv=conv, fusion=fusion)(x), nano(conv="mr", fusion=fusion)(x))
        assert not torch.equal(nano(seed=1, conv=conv)(x), plain)


def test_vig_weights_load(tmp_path):
    torch.manual_seed(0)
    original = vig.ViG((32,), (3,), num_classes=6, img_size=64).eval()
    path = tmp_path / "vig.pt"
    torch.save(original.state_dict(), path)
    torch.manual_seed(1)
    model = face2nodes.Face2Nodes((32,), (3,), num_classes=6, img_size=64).eval()
    fer_models.registry.load_weights(model, path)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(x), original(x))


@pytest.mark.parametrize("conv", CONVS)
def test_convolutions(conv, x):
    model = nano(conv=conv).train()
    model(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("relation", ["diff+pos", "diff+dist"])
@pytest.mark.parametrize("pyramid", [False, True])
def test_places_and_distances_in_relations(relation, pyramid):
    """They start as nothing, learn once the relation has weights, and take a grid that is no square."""
    name = "face2nodes_pyramid_ti" if pyramid else "face2nodes_nano"
    models = []
    for options in ({}, {"conv_options": {"relation": relation}}):
        torch.manual_seed(0)
        depths = (1,) * 4 if pyramid else (2,)
        models.append(fer_models.create_model(name, depths=depths, k=4, **options).eval())
    plain, model = models
    x = torch.randn(2, 3, 64, 128, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))
        for parameter, value in model.named_parameters():
            if parameter.endswith(".a"):
                value.normal_()
    model.train()(x).square().mean().backward()
    learned = {
        name: p.grad for name, p in model.named_parameters() if name.endswith(("position", "distance"))
    }
    assert len(learned) == sum(model.depths)
    assert all(grad.isfinite().all() and grad.abs().max() > 0 for grad in learned.values())


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("pyramid", [False, True])
def test_fusions(fusion, pyramid, x):
    name = "face2nodes_pyramid_ti" if pyramid else "face2nodes_nano"
    model = fer_models.create_model(name, depths=(1,) * (4 if pyramid else 1), fusion=fusion, k=4).train()
    model(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_relation_and_fusion_learn(x):
    """Zero at the start, but not a fixed point: after one step their gradients are all there."""
    model = nano(fusion="concat").train()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(model(x), torch.tensor([1, 4])).backward()
        optimiser.step()
    assert all(
        p.grad.abs().sum() > 0 for name, p in model.named_parameters() if "relation" in name or ".a" in name
    )
    fusion = {name: p.grad for name, p in model.named_parameters() if "stem.fuse" in name}
    del fusion["stem.fuse.linear.bias"]  # the norm after it takes it off again
    assert all(gradient.abs().sum() > 0 for gradient in fusion.values())


@pytest.mark.parametrize("stride, size, nodes", [(8, 112, 196), (8, 48, 36), (4, 48, 144), (16, 224, 196)])
@pytest.mark.parametrize("stem_blocks", [(), (0, 1, 0, 1)])
def test_stride_keeps_nodes(stride, size, nodes, stem_blocks):
    model = nano(stride=stride, img_size=size, stem_blocks=stem_blocks)
    with torch.no_grad():
        features = model.forward_features(torch.randn(1, 3, size, size))
    assert features.shape[1] * features.shape[2] == nodes


def test_relation_weights_are_collected_on_request(x):
    model = nano()
    with torch.no_grad():
        assert set(model(x, full=True).aux) == {"graphs"}
        model.collect_weights = True
        aux = model(x, full=True).aux
    for graph, weights in zip(aux["graphs"], aux["relation_weights"], strict=True):
        assert weights.shape == (*graph.shape, 4)
        torch.testing.assert_close(weights.sum(2), torch.ones(2, 64, 4))


def test_xs_is_small():
    with torch.device("meta"):
        model = fer_models.create_model("face2nodes_xs", num_classes=8)
    assert sum(p.numel() for p in model.parameters()) <= 4e6


@pytest.mark.parametrize(
    "options, message",
    [
        ({"fusion": "product"}, "unknown fusion 'product': expected one of 'concat'"),
        ({"conv": "gat"}, "unknown conv 'gat': expected one of 'rmr'"),
        ({"conv_options": {"heads": 7}}, "must be divisible by heads"),
        ({"stem_blocks": (1, 1), "stride": 8}, "of 2 scales halve 2 times, got stride=8"),
        ({"stem_blocks": (1, -1, 1)}, "must be counts of at least 0"),
        ({"stem_blocks": (0,) * 8}, "cannot double up to 64 channels"),
        ({"stem_blocks": (1,)}, "unknown stride 2: expected one of 16, 8, 4"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        nano(**options)


def test_learns_random_images_by_heart():
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(64, 3, 32, 32, generator=generator)
    labels = torch.randint(0, 8, (64,), generator=generator)
    model = nano().train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(200):
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimiser.step()
        if step % 10 == 9:
            with torch.no_grad():
                right = model.eval()(images).argmax(1).eq(labels).all()
            model.train()
            if right:
                return
    pytest.fail("200 steps do not suffice")


@pytest.mark.parametrize("stem_blocks", [(), (1, 0, 2)])
def test_a_stem_trains_alike_by_kernels_and_by_modules(stem_blocks, x):
    results = []
    for backend in ("auto", "reference"):
        stem = nano(stem_blocks=stem_blocks).stem.train()
        for module in stem.modules():
            if isinstance(module, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)):
                torch.nn.init.constant_(module.weight, 0.7)  # fusions start at zero
        with use_backend(backend):
            nodes = stem(x)
        (nodes * torch.linspace(-1, 1, nodes.numel()).reshape(nodes.shape)).sum().backward()
        biases = [n for n in ("convs.0.bias", "fuse.linear.bias") if n in dict(stem.named_parameters())]
        gradients = {n: p.grad for n, p in stem.named_parameters() if not n.endswith("bias")}
        assert biases and all(stem.get_parameter(n).grad.abs().max() < 1e-2 for n in biases)  # a norm follows
        results.append({"nodes": nodes, **gradients, **dict(stem.named_buffers())})
    for name, value in results[1].items():
        torch.testing.assert_close(
            results[0][name], value, rtol=0, atol=1e-4 * max(value.abs().max().item(), 1e-3), msg=name
        )


def test_depthwise_convolutions_are_float32_on_a_cpu(x):
    layer, maps = Depthwise(3, 5, 2), x.bfloat16()
    exact = torch.nn.functional.conv2d(maps.double(), layer.weight.double(), layer.bias.double(), 2, 2, 1, 3)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(maps)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, exact.bfloat16(), rtol=2**-7, atol=1e-5)
    wide = layer.double()(maps.double())
    torch.testing.assert_close(wide, exact)

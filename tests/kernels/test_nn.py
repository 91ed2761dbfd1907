"""The graph modules against ViG's formulas written out node by node."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from support import backends, device_of
from torch import nn

import fer_kernels
from fer_kernels import nn as graph_nn
from fer_kernels.nn import CONVS, DilatedKnnGraph, DynamicGraphConv, RelationConv, RelativePosition

B, N, M, C, K = 2, 12, 7, 8, 3
NAMES = tuple(CONVS)
RELATION = ("rmr", "rsum", "gate", "both")
SMALL = {name: {"heads": 2} for name in RELATION}


def make(name: str, out: int = 16, dtype=torch.float64, **options) -> nn.Module:
    """A convolution with no parameter at a special value such as zero."""
    torch.manual_seed(sum(map(ord, name)))
    conv = graph_nn.create_conv(name, C, out, **{**SMALL.get(name, {}), **options}).to(dtype)
    for tensor in conv.parameters():
        nn.init.normal_(tensor)
    for module in conv.modules():
        if isinstance(module, nn.BatchNorm1d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return conv


def inputs(own_keys: bool = False, dtype=torch.float64, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(B, N, C, generator=generator).to(dtype)
    y = None if own_keys else torch.randn(B, M, C, generator=generator).to(dtype)
    idx = torch.stack(
        [torch.randperm(N if own_keys else M, generator=generator)[:K] for _ in range(B * N)]
    ).view(B, N, K)
    return x, idx, y


def basic_conv(projection, rows, training):
    """ViG's BasicConv on (rows, C_in): a grouped 1 x 1 convolution, batch norm, GELU."""
    weight, bias = projection.linear.weight, projection.linear.bias
    out = F.conv2d(rows[:, :, None, None], weight[:, :, None, None], bias, groups=projection.linear.groups)
    norm = projection.norm
    out = F.batch_norm(
        out, norm.running_mean.clone(), norm.running_var.clone(), norm.weight, norm.bias, training
    )
    return F.gelu(out)[:, :, 0, 0]


def interleaved(*parts):
    rows = parts[0].new_empty(parts[0].shape[0], len(parts) * parts[0].shape[1])
    for i, part in enumerate(parts):
        rows[:, i :: len(parts)] = part
    return rows


def unit(rows):
    return rows / rows.norm(dim=-1, keepdim=True)


def aggregate(conv, name, x_i, neighbours, offsets=None):
    """What one node makes of its (k, C) neighbours, edge by edge: the aggregates, and the weights."""
    delta = neighbours - x_i
    if name == "mr":
        return (delta.amax(0),), None
    edges = torch.cat([x_i.expand_as(delta), delta], 1)
    r = edges @ conv.relation.weight.T + conv.relation.bias
    if conv.features == "diff+dist":
        r = r + torch.outer((unit(neighbours) - unit(x_i)).square().sum(1), conv.distance)
    if conv.features == "diff+pos":
        r = r + offsets @ conv.position.T
    r = F.leaky_relu(r, conv.negative_slope)
    if name == "gate" and conv.gate == "channel":
        gates = 2 / (1 + torch.exp(-(r @ conv.gate_weight.T)))
        return ((gates * delta).amax(0),), gates
    heads = conv.heads
    e = torch.stack([r.chunk(heads, 1)[h] @ conv.a[h] for h in range(heads)], 1)  # (k, H)
    weights = 2 / (1 + torch.exp(-e)) if name == "gate" else torch.softmax(e, 0)
    wide = weights.repeat_interleave(x_i.shape[0] // heads, 1)
    if name == "gate":
        return ((wide * delta).amax(0),), weights
    if name == "rmr":
        return ((len(delta) * wide * delta).amax(0),), weights
    if name == "rsum":
        return ((wide * delta).sum(0),), weights
    return (delta.amax(0), (wide * delta).sum(0)), weights


def naive(conv, name, x, idx, y, training=False, places=None):
    """The convolution node by node: (B, N, out), and the weights where it has any. `places`: of nodes and of
    keys."""
    keys = x if y is None else y
    batch, nodes, k = idx.shape
    where = [(b, i) for b in range(batch) for i in range(nodes)]
    centres = torch.stack([x[b, i] for b, i in where])
    found = [keys[b, idx[b, i]] for b, i in where]
    weights = None
    if name == "edge":
        edges = torch.cat(
            [torch.cat([c.expand_as(n), n - c], 1) for c, n in zip(centres, found, strict=True)]
        )
        out = basic_conv(conv.projection, edges, training).view(len(where), k, -1).amax(1)
    elif name == "sage":
        edges = basic_conv(conv.neighbour_projection, torch.cat(found), training)
        m = edges.view(len(where), k, -1).amax(1)
        out = basic_conv(conv.projection, torch.cat([centres, m], 1), training)
    elif name == "gin":
        sums = torch.stack([n.sum(0) for n in found])
        out = basic_conv(conv.projection, (1 + conv.eps) * centres + sums, training)
    else:
        offsets = [places and places[1][idx[b, i]] - places[0][i] for b, i in where]
        results = [aggregate(conv, name, *edges) for edges in zip(centres, found, offsets, strict=True)]
        parts = [torch.stack(part) for part in zip(*(aggregates for aggregates, _ in results), strict=True)]
        if name != "mr":
            weights = torch.stack([w for _, w in results]).view(batch, nodes, k, -1)
        if name == "both":  # one grouped product over x0, m0, s0, x1, m1, s1, ...
            joint = copy.deepcopy(conv.projection)
            w, own = conv.projection.linear.weight, conv.sum_projection.weight
            joint.linear.weight = nn.Parameter(interleaved(w[:, ::2], w[:, 1::2], own))
            out = basic_conv(joint, interleaved(centres, *parts), training)
        else:
            out = basic_conv(conv.projection, interleaved(centres, parts[0]), training)
    return out.view(batch, nodes, -1), weights


# --- convolutions ---


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("own_keys", [True, False], ids=["x", "y"])
@pytest.mark.parametrize("name", NAMES)
def test_formula(name, own_keys, training):
    conv = make(name).train(training)
    x, idx, y = inputs(own_keys)
    expected, weights = naive(conv, name, x, idx, y, training)
    torch.testing.assert_close(conv(x, idx, y), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(conv(x, idx.int(), y), expected, rtol=1e-10, atol=1e-10)
    if weights is not None:
        nodes, found = conv(x, idx, y, return_weights=True)
        torch.testing.assert_close(found, weights, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(nodes, expected, rtol=1e-10, atol=1e-10)


GRID, REDUCED = (4, 3), (2, 1)  # averages over 2 x 2 leave the last column out


def places(grid, step):
    """Of the centres of squares of `step` x `step` nodes of a grid from -1 to 1."""
    rows = [-1 + (step * row + step / 2) / 2 for row in range(grid[0])]
    columns = [-1 + (step * column + step / 2) * 2 / 3 for column in range(grid[1])]
    return torch.tensor([(row, column) for row in rows for column in columns], dtype=torch.float64)


@pytest.mark.parametrize("relation", ["diff+pos", "diff+dist"])
@pytest.mark.parametrize("own_keys", [True, False], ids=["x", "y"])
@pytest.mark.parametrize("name", RELATION)
def test_formula_with_places_and_distances(name, own_keys, relation):
    conv = make(name, relation=relation).eval()
    x, idx, y = inputs(own_keys)
    if not own_keys:
        y, idx = y[:, :2], idx % 2  # repeats are neighbours twice
    where = (places(GRID, 1), places(GRID, 1) if own_keys else places(REDUCED, 2))
    expected, weights = naive(conv, name, x, idx, y, places=where)
    for nodes, found in (
        conv(x, idx, y, grid=GRID, return_weights=True),
        DynamicGraphConv(Given(idx), conv)(x, y, grid=GRID, return_weights=True),
    ):
        torch.testing.assert_close(nodes, expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(found, weights, rtol=1e-10, atol=1e-10)
    conv.reset_parameters()
    same = make(name).eval()
    missing = same.load_state_dict(conv.state_dict(), strict=False)
    assert missing.unexpected_keys == ["position" if relation == "diff+pos" else "distance"]
    torch.testing.assert_close(conv(x, idx, y, grid=GRID), same(x, idx, y))


class Given(nn.Module):
    """A graph that is there."""

    def __init__(self, idx) -> None:
        super().__init__()
        self.idx = idx

    def forward(self, x, y=None, **options):
        return self.idx


def test_formula_of_the_head_gate():
    conv = make("gate", gate="head").eval()
    x, idx, y = inputs()
    expected, weights = naive(conv, "gate", x, idx, y)
    nodes, found = conv(x, idx, y, return_weights=True)
    assert found.shape == (B, N, K, 2)
    torch.testing.assert_close(found, weights, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(nodes, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", backends("relation"))
@pytest.mark.parametrize("name", ["mr", "rmr", "rsum", "both"])
def test_every_backend(name, backend):
    conv = make(name, dtype=torch.float32).eval()
    x, idx, y = inputs(dtype=torch.float32)
    expected, _ = naive(conv, name, x, idx, y)
    device = device_of(backend)
    with fer_kernels.use_backend(backend):
        nodes = conv.to(device)(x.to(device), idx.to(device), y.to(device))
        nodes.square().sum().backward()
    torch.testing.assert_close(nodes.cpu(), expected, rtol=1e-3, atol=1e-4)
    assert all(parameter.grad.isfinite().all() for parameter in conv.parameters())


def test_interleaving():
    x, m = torch.arange(4.0), torch.arange(4.0) + 10
    assert graph_nn.interleave(x, m).tolist() == [0, 10, 1, 11, 2, 12, 3, 13]
    # Each group sees its own channels of both: the second of two groups, of x2, m2, x3, m3.
    conv = graph_nn.MaxRelativeConv(4, 2, groups=2, norm=None, act=None, bias=False)
    conv.projection.linear.weight.data = torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 1]])
    nodes = torch.tensor([[[1.0, 2, 3, 4], [10, 20, 30, 40]]])
    out = conv(nodes, torch.tensor([[[1], [0]]]))
    assert out.tolist() == [[[1, 36], [10, -36]]]  # x0 and m3


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [{"conv": "rmr"}, {"conv": "both"}, {"conv": "gate"}, {"conv": "gate", "gate": "head"}],
    ids=["rmr", "both", "gate", "gate-head"],
)
def test_starts_as_max_relative_bit_for_bit(options, dtype, training):
    torch.manual_seed(0)
    plain = graph_nn.MaxRelativeConv(48, 96).to(dtype).train(training)
    relation = RelationConv(48, 96, **options).to(dtype).train(training)
    report = relation.load_state_dict(plain.state_dict(), strict=False)
    assert not report.unexpected_keys
    assert report.missing_keys
    assert all(
        key.split(".")[0] in ("relation", "a", "gate_weight", "sum_projection") for key in report.missing_keys
    )
    x = torch.randn(2, 30, 48).to(dtype)
    idx = fer_kernels.dilated_knn(x, k=9)
    assert torch.equal(relation(x, idx), plain(x, idx))


def test_the_relation_matters_once_learned():
    for name in RELATION:
        conv = make(name).eval()
        x, idx, y = inputs()
        plain = graph_nn.MaxRelativeConv(C, 16).double().eval()
        plain.load_state_dict(
            {key: value for key, value in conv.state_dict().items() if key.startswith("projection.")}
        )
        assert not torch.allclose(conv(x, idx, y), plain(x, idx, y))


@pytest.mark.parametrize("name", [*NAMES, "gate-head"])
def test_gradients_reach_everything(name):
    conv = make("gate", gate="head") if name == "gate-head" else make(name)
    x, idx, y = inputs()
    x.requires_grad_(), y.requires_grad_()
    target = torch.randn(B, N, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (conv(x, idx, y) * target).sum().backward()
    for parameter_name, parameter in conv.named_parameters():
        if parameter_name.endswith("linear.bias"):
            continue  # a batch norm takes the mean away again
        assert parameter.grad is not None and parameter.grad.abs().max() > 1e-9, parameter_name
    assert x.grad.abs().max() > 0 and y.grad.abs().max() > 0


@pytest.mark.parametrize("name", [*NAMES, "gate-head"])
def test_gradients_are_those_of_the_formula(name):
    short = name.removesuffix("-head")
    conv = (make("gate", gate="head") if name == "gate-head" else make(name)).eval()
    x, idx, y = inputs(seed=3)
    wanted = [x.requires_grad_(), y.requires_grad_(), *conv.parameters()]
    target = torch.randn(B, N, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad((conv(x, idx, y) * target).sum(), wanted)
    if name == "both":  # the joint weight of the written-out formula is a copy: compare the rest
        wanted = [x, y, *conv.relation.parameters(), conv.a]
        found = torch.autograd.grad((conv(x, idx, y) * target).sum(), wanted)
    expected = torch.autograd.grad((naive(conv, short, x, idx, y)[0] * target).sum(), wanted)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


def test_at_the_start_the_relation_learns():
    torch.manual_seed(0)
    x, idx, y = inputs(dtype=torch.float32)
    for name, first in (("rmr", "a"), ("gate", "gate_weight"), ("both", "sum_projection.weight")):
        conv = graph_nn.create_conv(name, C, 16, heads=2)
        (conv(x, idx, y) * torch.randn(B, N, 16)).sum().backward()
        assert conv.get_parameter(first).grad.abs().max() > 0


def test_norm_and_act_options():
    x, idx, y = inputs(dtype=torch.float32)
    conv = graph_nn.MaxRelativeConv(C, 16, norm=None, act=None, groups=1)
    rows = graph_nn.interleave(x, fer_kernels.relation_aggregate(x, idx, y, mode="mr"))
    torch.testing.assert_close(conv(x, idx, y), F.linear(rows, *conv.projection.linear.parameters()))
    conv = graph_nn.MaxRelativeConv(C, 16, norm="layer", act="relu")
    out = conv(x, idx, y)
    torch.testing.assert_close(out, F.layer_norm(conv.projection.linear(rows), (16,)).relu())
    conv = graph_nn.MaxRelativeConv(C, 16, norm=lambda channels: nn.GroupNorm(2, channels), act=nn.Tanh)
    assert isinstance(conv.projection.norm, nn.GroupNorm) and conv(x, idx, y).abs().max() <= 1


def test_batch_norm_is_over_all_nodes_and_is_tracked():
    conv = graph_nn.MaxRelativeConv(C, 16, act=None)
    x, idx, y = inputs(dtype=torch.float32)
    out = conv(x, idx, y).flatten(0, 1)
    torch.testing.assert_close(out.mean(0), torch.zeros(16), atol=1e-6, rtol=0)
    torch.testing.assert_close(out.var(0, unbiased=False), torch.ones(16), atol=1e-3, rtol=0)
    assert conv.projection.norm.num_batches_tracked == 1
    sync = nn.SyncBatchNorm.convert_sync_batchnorm(conv).eval()
    torch.testing.assert_close(sync(x, idx, y), conv.eval()(x, idx, y))


def test_weights_of_vigs_convolutions_load():
    vig = nn.Conv2d(16, 32, 1, groups=4)
    ours = graph_nn.GroupedLinear(16, 32)
    ours.load_state_dict(vig.state_dict())
    rows = torch.randn(2, 5, 16)
    expected = vig(rows.transpose(1, 2).unsqueeze(-1)).squeeze(-1).transpose(1, 2)
    torch.testing.assert_close(ours(rows), expected)
    assert ours.bias.abs().max() > 0
    with pytest.raises(RuntimeError, match="size mismatch"):
        ours.load_state_dict(nn.Conv2d(16, 32, 3, groups=4).state_dict())


@pytest.mark.parametrize("tiles", [False, True])
@pytest.mark.parametrize("width", [4, graph_nn.conv.TILED_WIDTH + 4])
def test_grouped_products_in_bfloat16(monkeypatch, tiles, width):
    """As one block-diagonal product where that is faster, and as a batched one."""
    monkeypatch.setattr(graph_nn.conv, "_TILES", tiles)
    calls = []
    block_diagonal = graph_nn.conv._block_diagonal
    monkeypatch.setattr(
        graph_nn.conv, "_block_diagonal", lambda *args: (calls.append(args), block_diagonal(*args))[1]
    )
    half = 2 * width
    linear = graph_nn.GroupedLinear(2 * half, 12).bfloat16()
    nn.init.normal_(linear.bias)
    x, m = (torch.randn(2, 5, half, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    exact = copy.deepcopy(linear).double()
    wide = [t.detach().double().requires_grad_() for t in (x, m)]
    # Two products with a rounding between them; gradients are sums over ten rows of rounded values.
    for out, expected in (
        (linear(torch.cat((x, m), -1)), exact(torch.cat(wide, -1))),
        (linear.interleaved(x, m), exact(graph_nn.interleave(*wide))),
    ):
        torch.testing.assert_close(out.double(), expected, rtol=2**-7, atol=2**-6)
        target = torch.randn(out.shape).bfloat16()
        found = torch.autograd.grad(out, [x, m, *linear.parameters()], target)
        wanted = torch.autograd.grad(expected, [*wide, *exact.parameters()], target.double())
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=2**-6, atol=2**-4)
    assert len(calls) == (2 if tiles and width == 4 else 0)


def test_relation_dim_default():
    assert RelationConv(192, 384).relation_dim == 48
    assert RelationConv(36, 72).relation_dim == 8
    assert RelationConv(8, 8, heads=8).relation_dim == 8


@pytest.mark.parametrize("name", [*NAMES, "gate-head"])
def test_autocast(name):
    conv = make("gate", gate="head", dtype=torch.float32) if name == "gate-head" else None
    conv = (conv or make(name, dtype=torch.float32)).eval()
    for parameter in conv.parameters():
        parameter.data.mul_(0.3)
    for x_dtype in (torch.float32, torch.bfloat16):
        x, idx, y = (t.to(x_dtype) if t.is_floating_point() else t for t in inputs())
        with torch.autocast("cpu", torch.bfloat16):
            out = conv(x, idx, y)
            out.float().sum().backward()
        torch.testing.assert_close(out.float(), conv(x.float(), idx, y.float()), rtol=0.1, atol=0.1)
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in conv.parameters())


def test_no_nodes_in_the_batch():
    for name in NAMES:
        conv = make(name, dtype=torch.float32).eval()
        for batch, nodes in ((0, N), (2, 0)):
            x = torch.randn(batch, nodes, C)
            idx = torch.zeros(batch, nodes, K, dtype=torch.long)
            assert conv(x, idx, torch.randn(batch, M, C)).shape == (batch, nodes, 16)


def test_both_makes_one_reverse_graph_on_a_gpu(monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    from fer_kernels.nn import conv as module

    made = []
    monkeypatch.setattr(
        module, "reverse_graph", lambda *args: made.append(1) or fer_kernels.reverse_graph(*args)
    )
    conv = make("both", dtype=torch.float32).cuda()
    x, idx, y = (t.cuda() for t in inputs(dtype=torch.float32))
    conv(x, idx, y).sum().backward()
    assert len(made) == 1
    with torch.no_grad():
        conv(x, idx, y)
    assert len(made) == 1


def test_a_shared_reverse_graph_changes_nothing():
    x, idx, y = inputs()
    reverse = fer_kernels.reverse_graph(idx, M)
    for name in ("mr", "rmr", "rsum", "both"):
        conv = make(name).eval()
        assert torch.equal(conv(x, idx, y, reverse=reverse), conv(x, idx, y))


# --- the graph ---


def nearest(x, y, k, bias=None):
    """The k nearest of every node by ViG's distance, in float64."""
    x, y = F.normalize(x.double(), dim=-1), F.normalize((x if y is None else y).double(), dim=-1)
    dist = (x.unsqueeze(2) - y.unsqueeze(1)).square().sum(-1)
    return (dist if bias is None else dist + bias).argsort(dim=-1, stable=True)[..., :k]


@pytest.mark.parametrize("own_keys", [True, False], ids=["x", "y"])
def test_graph(own_keys):
    x, _, y = inputs(own_keys)
    graph = DilatedKnnGraph(3, 2)
    idx = graph(x.requires_grad_(), y)
    assert torch.equal(idx, nearest(x, y, 6)[..., ::2])
    assert idx.dtype == torch.int64 and not idx.requires_grad
    assert torch.equal(
        DilatedKnnGraph(3, normalize=False)(x, y), fer_kernels.dilated_knn(x, y, k=3, normalize=False)
    )


def test_small_grids_reduce_the_dilation():
    x = torch.randn(2, 49, 8)
    assert torch.equal(DilatedKnnGraph(18, 4)(x), nearest(x, None, 36)[..., ::2])  # 49 // 18 = 2
    assert torch.equal(DilatedKnnGraph(9, 5)(x), nearest(x, None, 45)[..., ::5])
    assert torch.equal(DilatedKnnGraph(30, 4)(x), nearest(x, None, 30))
    assert DilatedKnnGraph(9, 4)(torch.randn(2, 9, 8)).shape == (2, 9, 9)
    stochastic = DilatedKnnGraph(18, 4, stochastic=True, epsilon=1.0)
    assert stochastic(x).unique().max() < 49


def test_stochastic_dilation():
    x = torch.randn(1, 40, 8)
    graph = DilatedKnnGraph(4, 5, stochastic=True, epsilon=1.0)
    order = nearest(x, None, 20)
    draws = []
    for seed in range(6):
        idx = graph(x, generator=torch.Generator().manual_seed(seed))
        again = graph(x, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(idx, again)
        positions = (idx.unsqueeze(-1) == order.unsqueeze(2)).int().argmax(-1)
        assert (positions == positions[:, :1]).all()  # one draw for all nodes
        assert (positions.diff(dim=-1) > 0).all()  # without repetition, nearest first
        assert torch.equal(order.gather(2, positions), idx)
        draws.append(tuple(positions[0, 0].tolist()))
    assert len(set(draws)) > 3
    # The global generator, where none is given.
    torch.manual_seed(5)
    first, second = graph(x), graph(x)
    torch.manual_seed(5)
    assert torch.equal(first, graph(x)) and torch.equal(second, graph(x))
    assert not torch.equal(first, second)
    # Nothing random in eval.
    graph.eval()
    before = torch.get_rng_state()
    assert torch.equal(graph(x), order[..., ::5]) and torch.equal(torch.get_rng_state(), before)


def test_every_position_is_drawn_as_often():
    graph = DilatedKnnGraph(2, 3, stochastic=True, epsilon=1.0)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([graph._draw(torch.device("cpu"), 3, generator) for _ in range(3000)])
    counts = drawn.flatten().bincount(minlength=6)
    assert (counts - 1000).abs().max() < 130  # five standard deviations


def test_epsilon_is_the_share_of_random_calls():
    x = torch.randn(1, 20, 4)
    usual = nearest(x, None, 12)[..., ::4]
    for epsilon, low, high in ((0.0, 0, 0), (0.3, 0.2, 0.4), (1.0, 0.9, 1)):
        graph = DilatedKnnGraph(3, 4, stochastic=True, epsilon=epsilon)
        generator = torch.Generator().manual_seed(0)
        random = sum(not torch.equal(graph(x, generator=generator), usual) for _ in range(400)) / 400
        assert low <= random <= high


def direct_relation(channels, height, width):
    """R, entry by entry: 2 / D times the sum of cosines of the distances along both axes."""
    waves = [10000 ** (-2 * i / (channels / 2)) for i in range(channels // 4)]
    table = torch.empty(height * width, height * width, dtype=torch.float64)
    for i in range(height * width):
        for j in range(height * width):
            down, across = i // width - j // width, i % width - j % width
            table[i, j] = sum(math.cos(w * down) + math.cos(w * across) for w in waves) * 2 / channels
    return table


@pytest.mark.parametrize("grid", [(4, 4), (3, 5)])
def test_relative_position(grid):
    table = RelativePosition(16, grid).relative_pos
    n = grid[0] * grid[1]
    assert table.shape == (1, n, n) and not table.requires_grad and table.dtype == torch.float32
    torch.testing.assert_close(-table[0].double(), direct_relation(16, *grid), rtol=0, atol=1e-6)
    torch.testing.assert_close(table[0].diagonal(), -torch.ones(n))
    assert table.argmin(-1).tolist() == [list(range(n))]


def test_relative_position_of_reduced_keys():
    table = RelativePosition(16, 6, 2).relative_pos
    wide = direct_relation(16, 6, 6)[None, None]
    expected = -F.interpolate(wide, size=(36, 9), mode="bicubic", align_corners=False)[0]
    torch.testing.assert_close(table.double(), expected, rtol=0, atol=1e-5)


def test_relative_position_of_other_grids():
    bias = RelativePosition(16, 6, 2)
    assert bias(36, 9) is bias.relative_pos
    resized = bias(64, 16)
    expected = F.interpolate(bias.relative_pos[None], size=(64, 16), mode="bicubic", align_corners=False)[0]
    assert torch.equal(resized, expected)
    assert bias(64, 16) is resized and bias(64, 16, grid=(8, 8)) is resized
    # The kept table follows its source, whatever became of that.
    bias.relative_pos.mul_(2)
    torch.testing.assert_close(bias(64, 16), 2 * expected)
    assert bias.double()(64, 16).dtype == torch.float64
    bias.float().load_state_dict({"relative_pos": torch.ones(1, 36, 9)}, assign=True)
    torch.testing.assert_close(bias(64, 16), torch.ones(1, 64, 16))
    assert not copy.deepcopy(bias)._resized
    # Not the picture of a square where the grid is said to be another: what a module made for it holds.
    wide = bias(36, 8, grid=(4, 9))
    assert torch.equal(wide, RelativePosition(16, (4, 9), 2).relative_pos)
    for size in range(4, 30):
        bias(size, size)
    assert len(bias._resized) <= 8


def test_relative_position_in_the_graph():
    x = torch.randn(2, 36, 16)
    y = F.avg_pool2d(x.mT.unflatten(-1, (6, 6)), 2).flatten(2).mT.contiguous()
    graph = DilatedKnnGraph(3, 2, relative_position=RelativePosition(16, 6, 2))
    bias = graph.relative_position.relative_pos
    idx = graph(x, y, grid=(6, 6))
    assert torch.equal(idx, nearest(x, y, 6, bias.double())[..., ::2])
    assert torch.equal(idx, graph(x, y))
    assert not torch.equal(idx, DilatedKnnGraph(3, 2)(x, y))
    assert torch.equal(
        graph.bfloat16()(x, y), nearest(x, y, 6, bias.bfloat16().double())[..., ::2]
    )  # of lower precision than x


def test_relative_position_of_checkpoints():
    graph = DilatedKnnGraph(3, relative_position=RelativePosition(16, 4))
    assert list(graph.state_dict()) == ["relative_position.relative_pos"]
    assert not list(graph.parameters())
    old = -torch.rand(1, 16, 16)
    graph.load_state_dict({"relative_position.relative_pos": nn.Parameter(old, requires_grad=False)})
    assert torch.equal(graph.relative_position.relative_pos, old)
    larger = RelativePosition(16, 8)
    graph.load_state_dict({"relative_position.relative_pos": larger.relative_pos})
    assert torch.equal(graph.relative_position.relative_pos, larger(16, 16))
    with pytest.raises(RuntimeError, match="size mismatch"):
        graph.load_state_dict({"relative_position.relative_pos": torch.zeros(4, 4)})


# --- as torch modules ---


def layer(name: str, **options) -> DynamicGraphConv:
    graph = DilatedKnnGraph(3, 2, relative_position=RelativePosition(C, (3, 4)), **options)
    return DynamicGraphConv(graph, make(name, dtype=torch.float32))


def test_dynamic_graph_conv():
    x, _, y = inputs(dtype=torch.float32)
    module = layer("rmr").eval()
    nodes = module(x, y)
    idx = module.dynamic_graph(x, y)
    assert torch.equal(nodes, module.conv(x, idx, y))
    found, graph = module(x, y, return_graph=True)
    assert torch.equal(found, nodes) and torch.equal(graph, idx)
    found, weights = module(x, y, return_weights=True)
    assert torch.equal(weights, module.conv(x, idx, y, return_weights=True)[1])
    found, graph, weights = module(x, y, return_graph=True, return_weights=True)
    assert torch.equal(found, nodes) and torch.equal(graph, idx) and weights.shape == (B, N, 3, 2)
    with pytest.raises(TypeError, match=r"MaxRelativeConv.*return_weights"):
        layer("mr")(x, y, return_weights=True)
    stochastic = layer("mr", stochastic=True, epsilon=1.0)
    draws = [
        stochastic(x, generator=torch.Generator().manual_seed(s), return_graph=True)[1] for s in (0, 0, 1)
    ]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("name", NAMES)
def test_copies_and_state(name):
    x, _, _ = inputs(dtype=torch.float32)
    module = layer(name).eval()
    expected = module(x)
    assert torch.equal(copy.deepcopy(module)(x), expected)
    other = DynamicGraphConv(
        DilatedKnnGraph(3, 2, relative_position=RelativePosition(C, (3, 4))),
        graph_nn.create_conv(name, C, 16, **SMALL.get(name, {})),
    ).eval()
    assert not torch.equal(other(x), expected)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), expected)
    assert "k=3, dilation=2" in repr(module) and f"{C}, 16" in repr(module)


@pytest.mark.parametrize("name", NAMES)
def test_compile(name):
    torch._dynamo.reset()
    x, _, y = inputs(dtype=torch.float32)
    module = layer(name)
    eager = copy.deepcopy(module)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    expected = eager(x, y)
    out = compiled(x, y)
    torch.testing.assert_close(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    for one, other in zip(module.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-3)
    module.eval(), eager.eval()
    torch.testing.assert_close(compiled(x, y), eager(x, y))


def test_compile_stochastic_and_weights():
    torch._dynamo.reset()
    module = layer("rmr", stochastic=True, epsilon=1.0)
    x, _, _ = inputs(dtype=torch.float32)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    _, first, weights = compiled(x, return_graph=True, return_weights=True)
    _, second, _ = compiled(x, return_graph=True, return_weights=True)
    assert not torch.equal(first, second) and weights.shape == (B, N, 3, 2)
    compiled(torch.randn(2, 16, C), grid=(4, 4))  # an interpolated bias, made in the graph


@pytest.mark.parametrize("name", NAMES)
def test_export(name):
    x, _, _ = inputs(dtype=torch.float32)
    module = layer(name).eval()
    exported = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    torch.testing.assert_close(exported(x), module(x))
    more = torch.cat([x, -x, x])
    torch.testing.assert_close(exported(more), module(more))


def test_the_package_does_not_import_the_modules():
    import subprocess
    import sys

    code = "import sys, fer_kernels; print('fer_kernels.nn' in sys.modules, fer_kernels.nn.GINConv.__name__)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False GINConv"


# --- errors ---

X = torch.zeros(B, N, C)
IDX = torch.zeros(B, N, K, dtype=torch.long)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: DilatedKnnGraph(0), ValueError, "DilatedKnnGraph: k must be at least 1, got 0"),
        (lambda: DilatedKnnGraph(3, 1.5), TypeError, "dilation must be an int, got 1.5"),
        (lambda: DilatedKnnGraph(33, 4), ValueError, r"k \* dilation = 132 exceeds the limit of 128"),
        (lambda: DilatedKnnGraph(3, stochastic=1), TypeError, "stochastic must be a bool, got 1"),
        (lambda: DilatedKnnGraph(3, epsilon=1.2), ValueError, r"epsilon must lie in \[0, 1\], got 1.2"),
        (lambda: DilatedKnnGraph(3, epsilon=-0.1), ValueError, r"epsilon must lie in \[0, 1\], got -0.1"),
        (lambda: DilatedKnnGraph(3, epsilon=float("nan")), ValueError, "epsilon must lie in"),
        (lambda: DilatedKnnGraph(3, epsilon="a"), TypeError, "epsilon must be a number, got 'a'"),
        (lambda: DilatedKnnGraph(3, relative_position=True), TypeError, "must be a RelativePosition or None"),
        (lambda: DilatedKnnGraph(13)(X), ValueError, r"DilatedKnnGraph: k .* the 12 keys .* at least 13"),
        (
            lambda: DilatedKnnGraph(3, 5, reduce_dilation=False)(X),
            ValueError,
            r"k \* dilation = 15 exceeds the 12 keys .* at least 15 keys",
        ),
        (lambda: DilatedKnnGraph(3)(X[0]), ValueError, r"DilatedKnnGraph: x must be \(B, nodes, C\)"),
        (lambda: DilatedKnnGraph(3)(X, grid=(3, 5)), ValueError, r"grid \(3, 5\) has 15 nodes, x has 12"),
        (lambda: DilatedKnnGraph(3)(X, grid=12), TypeError, r"grid must be \(height, width\), got 12"),
        (
            lambda: DilatedKnnGraph(3, 2, stochastic=True)(X, generator=7),
            TypeError,
            "generator must be a torch.Generator or None, got 7",
        ),
        (
            lambda: DilatedKnnGraph(3, relative_position=RelativePosition(C, 3))(X, grid=(3, 3)),
            ValueError,
            r"RelativePosition: grid \(3, 3\) has 9 nodes, x has 12",
        ),
        (
            lambda: RelativePosition(C, 4, 2)(16, 16, grid=(4, 4)),
            ValueError,
            "with reduction 2 has 4 keys, got 16",
        ),
        (lambda: RelativePosition(10, 4), ValueError, "channels must be divisible by 4, got 10"),
        (lambda: RelativePosition(8, 4, 5), ValueError, "reduction 5 exceeds a side of the grid"),
        (lambda: RelativePosition(8, (4, 0)), ValueError, "grid's sides must be at least 1, got 0"),
        (lambda: RelativePosition(8, "4"), TypeError, "grid must be"),
        (lambda: RelationConv(8, 8, relation="dist"), ValueError, "unknown relation 'dist': expected one of"),
        (lambda: RelationConv(C, 8, relation="diff+pos")(X, IDX), ValueError, "needs grid for 12 nodes"),
        (
            lambda: RelationConv(C, 8, relation="diff+pos")(X, IDX, X[:, :5], grid=(4, 3)),
            ValueError,
            r"5 keys are not the averages over squares of a grid of \(4, 3\)",
        ),
        (lambda: graph_nn.GroupedLinear(6, 8), ValueError, "in_channels = 6 .* groups = 4"),
        (lambda: graph_nn.GroupedLinear(8, 8)(X[..., :4]), ValueError, r"x must be \(\.\.\., 8\)"),
        (lambda: graph_nn.MaxRelativeConv(0, 8), ValueError, "MaxRelativeConv: in_channels must be at least"),
        (
            lambda: graph_nn.MaxRelativeConv(8, 6),
            ValueError,
            "MaxRelativeConv: out_channels = 6 .* groups = 4",
        ),
        (lambda: graph_nn.MaxRelativeConv(5, 8), ValueError, r"2 \* in_channels = 10 .* groups = 4"),
        (lambda: graph_nn.SAGEConv(6, 8), ValueError, "SAGEConv: in_channels = 6 .* groups = 4"),
        (lambda: graph_nn.GINConv(6, 8), ValueError, "GINConv: in_channels = 6 .* groups = 4"),
        (lambda: graph_nn.EdgeConv(8, 8, groups=0), ValueError, "EdgeConv: groups must be at least 1"),
        (lambda: graph_nn.EdgeConv(8, 8, norm="group"), ValueError, "norm must be one of .* got 'group'"),
        (lambda: graph_nn.EdgeConv(8, 8, act=nn.ReLU()), TypeError, "act must be one of .* got ReLU"),
        (lambda: RelationConv(8, 8, conv="max"), ValueError, "unknown conv 'max': expected one of 'rmr'"),
        (lambda: RelationConv(8, 8, conv="gate", gate="all"), ValueError, "unknown gate 'all'"),
        (lambda: RelationConv(8, 8, heads=3), ValueError, "RelationConv: in_channels = 8 .* heads = 3"),
        (lambda: RelationConv(8, 8, relation_dim=6), ValueError, "relation_dim = 6 .* heads = 4"),
        (lambda: RelationConv(8, 8, negative_slope="x"), TypeError, "negative_slope must be a number"),
        (
            lambda: RelationConv(6, 8, conv="both", heads=2),
            ValueError,
            "RelationConv: in_channels = 6 .* groups = 4",
        ),
        (lambda: RelationConv(8, 8)(X, IDX, return_weights=1), TypeError, "return_weights must be a bool"),
        (lambda: graph_nn.create_conv("gat", 8, 8), ValueError, "create_conv: unknown name 'gat': .* 'gin'"),
        (lambda: DynamicGraphConv("knn", nn.Identity()), TypeError, "graph must be a module, got 'knn'"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("name", NAMES)
def test_errors_of_inputs(name):
    conv = make(name, dtype=torch.float32)
    here = type(conv).__name__
    for arguments, error, message in [
        ((X[..., :4], IDX), ValueError, r"x must be \(B, N, C\) with C = in_channels = 8, got \(2, 12, 4\)"),
        ((X[0], IDX), ValueError, r"x must be \(B, nodes, C\)"),
        ((X.int(), IDX), TypeError, "x must be float32"),
        (("x", IDX), TypeError, "x must be a tensor, got str"),
        ((X, IDX.float()), TypeError, "idx must be int64 or int32, got torch.float32"),
        ((X, IDX[0]), ValueError, r"idx must be \(B, N, k\) with B = 2 and N = 12"),
        ((X, IDX[:, :5]), ValueError, r"idx must be .*, got \(2, 5, 3\)"),
        ((X, IDX[..., :0]), ValueError, "k must lie between 1 and 128, got 0"),
        ((X, IDX, X[..., :4]), ValueError, r"y must be \(B, M, C\) with B = 2 and C = 8"),
        ((X, IDX, X[:1]), ValueError, r"y must be .*, got \(1, 12, 8\)"),
        ((X, IDX, X.double()), TypeError, "y must have x's dtype torch.float32, got torch.float64"),
        ((X, IDX.to("meta")), ValueError, "idx is on meta and x on cpu"),
    ]:
        with pytest.raises(error, match=f"{here}: {message}"):
            conv(*arguments)
    for wrong in (-1, N):
        with pytest.raises(RuntimeError, match=r"idx must lie in \[0, M\) with M = 12"):
            conv(X, IDX.clone().fill_(wrong))

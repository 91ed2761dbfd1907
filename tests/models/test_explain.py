"""Pictures that explain a prediction: the numbers behind them, and that they are drawn and leave no trace."""

import io

import pytest
import timm
import torch
from PIL import Image
from test_jadfer import sharpen, tiny
from torch import nn

from fer_kernels.nn import JADAttention
from fer_models import create_model
from fer_models import explain as module
from fer_models.data import EMOTIONS, SyntheticFaces
from fer_models.data.transforms import eval_transform
from fer_models.explain import block_grids, explain
from fer_models.layers.label_graph import normalise_adjacency

FACE = SyntheticFaces(length=4, size=64).draw(1)


def model_of(name, **options):
    torch.manual_seed(0)
    return create_model(name, **options).eval()


def nano(**options):
    return model_of("face2nodes_nano", **{"depths": (3,), "num_features": 64, **options})


def pyramid(side=64):
    return model_of("pvig_ti", dims=(8, 16, 24, 32), depths=(1, 1, 1, 1), img_size=side, num_classes=8)


def graph_labels():
    options = {"backbone": "resnet18", "backbone_weights": False, "img_size": 64}
    return model_of("emotion_gcn_resnet18", **options)


def regions(**options):
    options = {"widths": (4, 8, 8, 8), "local_dim": 8, "img_size": 32, **options}
    return model_of("lnlattennet_xs", **options)


def paths(**options):
    return sharpen(tiny(num_classes=8, **options)).eval()


SYSTEMS = {
    "face2nodes": (nano, 6),
    "pyramid": (pyramid, 6),
    "emotion_gcn": (graph_labels, 3),
    "lnlattennet": (regions, 4),
    "jadfer": (paths, 7),
    "vig_with_label_graph": (lambda: nano(conv="mr", head="label_graph"), 7),
    "lnlattennet_of_many_regions": (lambda: regions(grid=5, num_classes=12), 4),
    "jadfer_control": (lambda: paths(jad="random", valence_arousal=True), 7),
}


def titles(figure):
    return [axes.get_title() for axes in figure.axes]


def notes(figure):
    return [axes.get_xlabel() for axes in figure.axes]


@torch.no_grad()
def aux_of(model, side=64, **attributes):
    for name, value in attributes.items():
        setattr(model, name, value)
    return model(eval_transform(side, imagenet=False)(FACE).unsqueeze(0), full=True).aux


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_system_is_drawn(system, tmp_path):
    make, panels = SYSTEMS[system]
    model = make()
    state = torch.get_rng_state()
    figure = explain(model, FACE, tmp_path / "face.png")
    assert torch.equal(torch.get_rng_state(), state)
    assert len(figure.axes) == panels
    rows = 1 if panels < 5 else 2
    columns = -(-panels // rows)
    with Image.open(tmp_path / "face.png") as picture:
        assert picture.format == "PNG"
        assert picture.size == (int(columns * 3.2 * 110), int(rows * 3.2 * 110))
        first = picture.tobytes()
    assert list(tmp_path.iterdir()) == [tmp_path / "face.png"]
    with torch.no_grad():
        x = eval_transform(module.input_side(model), imagenet=system == "emotion_gcn")(FACE).unsqueeze(0)
        probabilities = model(x).softmax(1)[0]
    names = module.shown_names(model, None)
    assert titles(figure)[0] == f"{names[probabilities.argmax()]} ({100 * probabilities.max():.0f} %)"
    assert [bar.get_width() for bar in figure.axes[1].patches] == pytest.approx(
        probabilities[probabilities.topk(min(10, len(names))).indices.sort().values].tolist(), abs=1e-5
    )
    # The same again, whatever was drawn at random in between
    torch.rand(3)
    again = io.BytesIO()
    explain(model, FACE).savefig(again, format="png", dpi=110)
    assert Image.open(again).tobytes() == first


def test_nothing_is_cut_off():
    for make in (nano, graph_labels, regions, paths):
        figure = explain(make(), FACE)
        figure.draw_without_rendering()
        width, height = figure.canvas.get_width_height()
        for axes in figure.axes:
            for text in [axes.title, axes.xaxis.label, *axes.texts, *axes.get_yticklabels()]:
                box = text.get_window_extent()
                if text.get_text():
                    assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height, text


# State


class Broken(RuntimeError):
    pass


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("system", ["face2nodes", "emotion_gcn", "jadfer"])
def test_the_model_is_left_as_it_was(system, fails, monkeypatch):
    model = SYSTEMS[system][0]().train()
    frozen = next(m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)).eval()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def state():
        names = ("training", "collect_weights", "collect_stats", "eval_mode")
        return [{name: getattr(m, name, None) for name in names} for m in model.modules()]

    before = state()
    if fails:

        def broken(*_):
            # Everything is switched on here
            assert not model.training
            raise Broken

        for function in ("_graph_panels", "label_weights", "key_map"):
            monkeypatch.setattr(module, function, broken)
        with pytest.raises(Broken):
            explain(model, FACE)
    else:
        explain(model, FACE)
    assert state() == before and model.training and not frozen.training
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_label_graph_does_not_keep_what_it_made_for_the_picture():
    model = graph_labels().train()
    explain(model, FACE)
    assert model.head._cache is None


# Graphs


def test_grids_of_an_isotropic_network():
    model = nano(k=5)
    grids = block_grids(model, 64)
    graphs = aux_of(model)["graphs"]
    assert [grid.nodes for grid in grids] == [(8, 8)] * 3 == [grid.keys for grid in grids]
    assert all(
        grid.nodes[0] * grid.nodes[1] == graph.shape[1] for grid, graph in zip(grids, graphs, strict=True)
    )
    assert grids[0].node_place(0, 0) == (4, 4) and grids[0].node_place(1, 7) == (60, 12)
    for row, column in ((0, 0), (3, 5), (7, 7)):
        assert grids[0].node_at(*grids[0].node_place(row, column)) == (row, column)
        place = grids[0].key_places(torch.tensor(row * 8 + column)).tolist()
        assert tuple(place) == grids[0].node_place(row, column)


@pytest.mark.parametrize("side", [64, 80])
def test_neighbours_of_reduced_grids_lie_in_the_middle_of_their_cells(side):
    model = pyramid()
    grids, graphs = block_grids(model, side), aux_of(model, side)["graphs"]
    rows = side // 4
    for stage, (grid, graph) in enumerate(zip(grids, graphs, strict=True)):
        assert grid.nodes == (rows, rows) and graph.shape[1] == rows * rows
        keys = grid.keys[0] * grid.keys[1]
        assert graph.max() < keys and graph.shape[2] <= keys
        # A key's place is the mean of those of the nodes that it averages
        r = (4, 2, 1, 1)[stage]
        places = torch.tensor([[grid.node_place(y, x) for x in range(rows)] for y in range(rows)])
        if side == 64:
            wanted = nn.functional.avg_pool2d(places.permute(2, 0, 1), r).flatten(1).T
            torch.testing.assert_close(grid.key_places(torch.arange(keys)), wanted)
        assert places.max() < side and grid.key_places(torch.arange(keys)).max() < side
        rows = (rows + 1) // 2
    if side == 80:  # 20, 10, 5 and 3 nodes: the last ones, of 32 pixels, reach over the edge
        assert grids[-1].node_place(2, 0) == (16, 72) and grids[2].node_at(*grids[-1].node_place(2, 0)) == (
            4,
            1,
        )


@pytest.mark.parametrize("k, dilation, shown", [(5, 2, 2), (5, 12, 12), (9, 8, 7), (40, 3, 1), (70, 1, 1)])
def test_the_dilation_is_the_one_in_use(k, dilation, shown):
    model = nano(depths=(1,))
    graph = model.stages[0].blocks[0].grapher.graph_conv.dynamic_graph
    graph.k, graph.dilation = k, dilation
    assert block_grids(model, 64)[0].dilation == shown
    if k <= 64:  # with fewer keys all are neighbours
        assert graph._dilation_for(64, 64) == shown


def test_in_degrees_count_every_edge():
    for model in (nano(), pyramid()):
        for grid, graph in zip(block_grids(model, 64), aux_of(model)["graphs"], strict=True):
            degrees = module.in_degree(graph[0], grid)
            assert degrees.shape == grid.keys and degrees.sum() == graph[0].numel()
            assert degrees[0, 0] == (graph == 0).sum()


@pytest.mark.parametrize("make", [nano, pyramid])
def test_the_default_node_speaks_most_for_the_answer(make):
    model = make()
    x, grid = eval_transform(64, imagenet=False)(FACE).unsqueeze(0), block_grids(model, 64)[-1]
    speaks = module.relevance(model, x, 2)
    assert speaks.shape == grid.nodes
    row, column = grid.node_at(*module.shown_place(grid, None, speaks))
    assert speaks[row, column] == speaks.max()
    assert module.shown_place(grid, (1, 1), speaks) == grid.node_place(1, 1)


def test_relevance_is_the_change_of_the_logit():
    """To first order, of taking a node's features away by a small share."""
    model = nano().double()
    x = eval_transform(64, imagenet=False)(FACE).unsqueeze(0).double()
    speaks = module.relevance(model, x, 3)
    with torch.no_grad():
        features = model.forward_features(x)
        less = features.clone()
        less[0, 2, 5] *= 1 - 1e-6
        change = model.forward_head(features)[0, 3] - model.forward_head(less)[0, 3]
    assert float(speaks[2, 5]) == pytest.approx(float(change) / 1e-6, rel=1e-3, abs=1e-6)


def test_relation_weights_are_relative_to_no_preference():
    for conv in ("rmr", "rsum", "rgate", "rboth"):
        model = nano(conv=conv, depths=(1,))
        weights = aux_of(model, collect_weights=True)["relation_weights"][0]
        torch.testing.assert_close(module.relative_weights(weights, conv), torch.ones(weights.shape[:3]))
    alike = torch.tensor([[0.5, 0.25], [0.5, 0.75]])  # two slots, two heads
    torch.testing.assert_close(module.relative_weights(alike, "rmr"), torch.tensor([0.75, 1.25]))


def lines(axes):
    """Where the lines from a node lead to."""
    return {(line.get_xdata()[1], line.get_ydata()[1]) for line in axes.lines}


def test_the_lines_lead_to_the_neighbours():
    model = nano()
    figure = explain(model, FACE, node=(2, 3), layers=(1,))
    graph = aux_of(model)["graphs"][1][0, 2 * 8 + 3]
    assert titles(figure)[2] == f"block 1 of 0–2: k = {len(graph)}, dilation 1"
    assert lines(figure.axes[2]) == {(8 * (i % 8) + 4, 8 * (i // 8) + 4) for i in graph.tolist()}
    assert {line.get_xydata()[0].tolist()[0] for line in figure.axes[2].lines} == {28}
    assert "width is the relation's weight" in notes(figure)[2]
    assert "width" not in notes(explain(nano(conv="mr"), FACE))[2]


def test_layers():
    assert module.shown_layers(12, None) == [0, 11] and module.shown_layers(1, None) == [0]
    assert module.shown_layers(12, (3, 1)) == [3, 1]
    assert len(explain(nano(), FACE, layers=(0, 1, 2)).axes) == 7


# Regions, paths, labels


def test_regions_are_sorted_and_lie_on_their_boxes():
    model = regions()
    with torch.no_grad():
        model.attention.score.weight.mul_(30)
    weights = aux_of(model, 32)["region_weights"][0]
    figure = explain(model, FACE)
    boxes, bars = figure.axes[2:]
    texts = [text.get_text() for text in boxes.texts]
    assert texts == [f"{i}\n{100 * w:.1f} %" for i, w in enumerate(weights.tolist())]
    assert [patch.get_xy() for patch in boxes.patches[::2]] == [
        (left * 32, top * 32) for left, top, _, _ in model.boxes
    ]
    assert [bar.get_width() for bar in bars.patches] == pytest.approx(sorted(weights.tolist(), reverse=True))
    share = module.preference(weights)
    assert share.min() >= 0 and share.max() < 1
    torch.testing.assert_close(module.preference(torch.full((16,), 1 / 16)), torch.full((16,), 0.5))


@pytest.mark.parametrize("jad", ["key", "entry"])
@pytest.mark.parametrize("joint_over", ["query", "head"])
def test_drop_maps_are_the_masks_of_training(jad, joint_over):
    model = paths(jad=jad, jad_p=1.0, jad_options={"joint_over": joint_over})
    x = eval_transform(24, imagenet=False)(FACE).unsqueeze(0)
    with torch.no_grad():
        found = module.drop_map(model, x)
    assert found.shape == (6, 6) and found.min() >= 0 and 0 < found.max() <= 1
    # With p = 1 every head drops in training; only batch norms and dropout differ there
    model.collect_stats = True
    for part in model.modules():
        part.training = isinstance(part, JADAttention)
    with torch.no_grad():
        masks = model(x, full=True).aux["drop_masks"]
    total = sum(mask[0].float().reshape(-1, 37).mean(0) for mask in masks) / len(masks)
    torch.testing.assert_close(found.flatten(), total[1:])


def test_without_joint_keys_to_drop_joint_attention_is_shown():
    x = eval_transform(24, imagenet=False)(FACE).unsqueeze(0)
    for options in (
        *({"jad": jad} for jad in ("none", "attn_dropout", "dropkey", "random", "soft")),
        {"jad_p": 0.0},
    ):
        model = paths(**options)
        assert not module.drops_keys(model)
        with torch.no_grad():
            found = module.joint_map(model, x)
            means = module._statistics(model, x)["column_means"]
        cls = sum(layer[0, :, 0].mean() for layer in means) / len(means)
        assert found.shape == (6, 6) and found.sum() / 37 + cls == pytest.approx(1, abs=1e-4)
    assert "joint attention: the column means" in titles(explain(model, FACE))
    assert "keys that JAD drops" in titles(explain(paths(), FACE))


def test_label_graph_is_the_heads():
    for norm in ("code", "sym", "row"):
        model = nano(depths=(1,), head="label_graph", head_options={"norm": norm})
        weights = module.label_weights(model.head)
        torch.testing.assert_close(weights, normalise_adjacency(model.head.adjacency, norm))
    axes = explain(model, FACE).axes[-1]
    assert [text.get_text() for text in axes.texts] == [*EMOTIONS, "valence", "arousal"]
    arrows = weights.clone().fill_diagonal_(0).count_nonzero()
    assert len(axes.patches) == arrows > 0
    model.head.adjacency.copy_(torch.eye(10))
    assert notes(explain(model, FACE))[-1] == "no node takes from another"


def test_a_graph_of_many_labels_is_a_matrix():
    labels = {"labels": [f"label {i}" for i in range(60)], "embeddings": "learned", "adjacency": "full"}
    model = nano(num_classes=60, depths=(1,), head="label_graph", head_options=labels)
    (image,) = explain(model, FACE).axes[-1].images
    assert image.get_array().shape[0] >= 60


def test_names():
    assert module.shown_names(nano(), None) == EMOTIONS
    assert module.shown_names(nano(num_classes=7), None) == EMOTIONS[:7]
    assert module.shown_names(nano(num_classes=3), None) == ("class 0", "class 1", "class 2")
    labels = {"labels": ("calm", "glad", "low"), "embeddings": "learned"}
    model = nano(num_classes=3, head="label_graph", head_options=labels)
    assert module.shown_names(model, None) == labels["labels"]
    figure = explain(model, FACE, classes=["a", "b", "c"])
    assert [label.get_text() for label in figure.axes[1].get_yticklabels()] == ["a", "b", "c"]
    assert [text.get_text() for text in figure.axes[-1].texts][:3] == ["a", "b", "c"]


def test_the_face_may_be_of_any_size():
    model = nano(valence_arousal=True)
    assert module.input_side(model) == 64
    assert module.input_side(model_of("lnlattennet_xs")) == 64
    figure = explain(model, torch.zeros(3, 50, 40, dtype=torch.uint8), size=48)
    assert notes(figure)[0] == "face2nodes_nano, 48 pixels"
    assert notes(figure)[1].startswith("valence ")


# Mistakes


def test_unsupported_models_are_refused():
    with pytest.raises(
        TypeError, match="nothing to show of a ResNet; expected a model of fer_models: ViG, Face2N"
    ):
        explain(timm.create_model("resnet18"), FACE)
    with pytest.raises(TypeError, match="nothing to show of a EmotionGCN"):
        explain(model_of("emotion_gcn_resnet18", head="linear"), FACE)
    with pytest.raises(ValueError, match="face2nodes_nano has no classifier"):
        explain(nano(num_classes=0), FACE)


@pytest.mark.parametrize(
    "image, error, message",
    [
        (FACE.float(), TypeError, r"must be a uint8 tensor \(3, H, W\), got torch.float32"),
        (FACE.numpy(), TypeError, "got ndarray"),
        (FACE[:1], ValueError, r"must be \(3, H, W\), got \(1, 64, 64\)"),
        (FACE[None], ValueError, r"got \(1, 3, 64, 64\)"),
        (FACE[:, :0], ValueError, r"got \(3, 0, 64\)"),
    ],
)
def test_bad_images_are_refused(image, error, message):
    with pytest.raises(error, match=message):
        explain(nano(), image)


@pytest.mark.parametrize(
    "make, options, message",
    [
        (nano, {"layers": (0, 3)}, r"one or more blocks of 0 to 2, got \[0, 3\]"),
        (nano, {"layers": ()}, "one or more blocks of 0 to 2"),
        (nano, {"node": (8, 0)}, "a row of 0 to 7 and a column of 0 to 7, got"),
        (pyramid, {"node": (0, -1)}, "a row of 0 to 1 and a column of 0 to 1, got"),
        (nano, {"classes": ["a", "b"]}, "must be 8 names, got 2: a, b"),
        (nano, {"size": 50}, "multiples of 8"),
        (lambda: nano(img_size=(64, 48)), {}, "is made for 64 x 48 pixels.*give size"),
        (regions, {"node": (0, 0)}, "no graph of nodes"),
        (paths, {"layers": (0,)}, "no graph of nodes"),
    ],
)
def test_bad_options_are_refused(make, options, message):
    with pytest.raises(ValueError, match=message):
        explain(make(), FACE, **options)


def test_the_folder_must_exist(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere to write face\.png to"):
        explain(nano(), FACE, tmp_path / "nowhere" / "face.png")

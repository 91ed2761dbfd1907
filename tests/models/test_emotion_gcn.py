"""Emotion-GCN: the published graph by hand, the classifier it writes and keeps, published weights."""

import copy
import pickle

import numpy as np
import pytest
import torch
from training_support import assert_overfits, faces, train

from fer_models import create_model
from fer_models.emotion_gcn import AFFECTNET_CLASS_WEIGHTS, checkpoint_filter_fn
from fer_models.layers.label_graph import (
    CONTINUOUS,
    LabelGraphHead,
    adjacency_from,
    build_adjacency,
    conditional_relation,
    normalise_adjacency,
    read_glove,
    spearman_relation,
    table_vectors,
)
from fer_models.losses import Targets

NAN = float("nan")

# Rows and columns: neutral, happy, sad, surprise, fear, disgust, anger, valence, arousal. Worked out by hand
# from the published correlations: linked where |rho| >= 0.1.
Q, T = 0.25, 0.5 / 6
PUBLISHED_A = [
    [0.5, 0, 0, 0, 0, 0, 0, Q, Q],
    [0, 0.5, 0, 0, 0, 0, 0, 0.5, 0],
    [0, 0, 0.5, 0, 0, 0, 0, Q, Q],
    [0, 0, 0, 0.5, 0, 0, 0, 0, 0.5],
    [0, 0, 0, 0, 0.5, 0, 0, Q, Q],
    [0, 0, 0, 0, 0, 0.5, 0, Q, Q],
    [0, 0, 0, 0, 0, 0, 0.5, Q, Q],
    [T, T, T, 0, T, T, T, 0.5, 0],
    [T, 0, T, T, T, T, T, 0, 0.5],
]


def a_head(*args, **options):
    torch.manual_seed(0)
    return LabelGraphHead(*(args or (16, 7, True)), hidden=32, **options)


def test_the_published_graph():
    expected = torch.tensor(PUBLISHED_A)
    head = a_head()
    torch.testing.assert_close(head.adjacency, expected)
    torch.testing.assert_close(normalise_adjacency(head.adjacency), expected.T)  # Â of the published code
    weights = normalise_adjacency(head.adjacency).sum(1)
    torch.testing.assert_close(weights[7], torch.tensor(2.25))
    assert not head.adjacency.requires_grad


def test_norms():
    a = torch.rand(5, 5, dtype=torch.float64) + 0.1
    d = torch.diag(a.sum(1) ** -0.5)
    torch.testing.assert_close(normalise_adjacency(a, "code"), (a @ d).T @ d)
    torch.testing.assert_close(normalise_adjacency(a, "sym"), d @ a @ d)
    torch.testing.assert_close(normalise_adjacency(a, "row").sum(1), torch.ones(5, dtype=torch.float64))
    with pytest.raises(ValueError, match="unknown norm 'max': expected one of 'code', 'sym', 'row'"):
        normalise_adjacency(a, "max")


@pytest.mark.parametrize("classes", [7, 8])
@pytest.mark.parametrize("va_nodes", [False, True])
@pytest.mark.parametrize("kind", ["auto", "published", "identity", "full"])
def test_rows_of_every_graph_sum_to_one(classes, va_nodes, kind):
    a = a_head(16, classes, adjacency=kind, va_nodes=va_nodes).adjacency
    assert a.shape == (classes + 2 * va_nodes,) * 2
    torch.testing.assert_close(a.sum(1), torch.ones(len(a)))
    if kind == "identity" or (kind == "published" and not va_nodes):
        assert torch.equal(a, torch.eye(len(a)))
    if kind == "full":
        assert (a > 0).all()


def test_other_class_counts_and_labels():
    head = a_head(16, 5)
    assert isinstance(head.vectors, torch.nn.Parameter) and (head.adjacency > 0).all()
    labels = ["happy", "sad", "anger"]  # any order, any part of the table
    head = a_head(16, 3, labels=labels)
    torch.testing.assert_close(head.adjacency[0], torch.tensor([0.5, 0, 0, 0.5, 0]))
    torch.testing.assert_close(head.vectors, table_vectors([*labels, *CONTINUOUS]))


def test_spearman_is_correlation_of_ranks():
    generator = np.random.default_rng(0)
    label, va = generator.integers(0, 3, 200), generator.normal(size=(200, 2)).round(1)
    va[:, 0] += label == 1
    targets = Targets(torch.tensor(label), None, torch.tensor(va))

    def ranks(values):
        return (values[:, None] > values).sum(1) + (values[:, None] == values).sum(1) / 2

    columns = np.stack([*(ranks((label == c).astype(float)) for c in range(3)), *(ranks(v) for v in va.T)])
    expected = np.corrcoef(columns)
    expected[:3, :3] = np.eye(3)
    np.testing.assert_allclose(spearman_relation(targets, 3), expected, atol=1e-12)
    unlabelled = Targets(
        torch.cat([targets.label, torch.tensor([-1, 2])]),
        None,
        torch.cat([targets.valence_arousal, torch.tensor([[0.5, 0.5], [NAN, 0.1]])]),
    )
    np.testing.assert_allclose(spearman_relation(unlabelled, 3), expected, atol=1e-12)
    head = a_head(16, 3, True, adjacency="spearman", targets=targets, threshold=0.2)
    torch.testing.assert_close(head.adjacency.double(), adjacency_from(torch.tensor(expected), threshold=0.2))


def test_conditional_counts_votes():
    votes = torch.tensor([[5.0, 5, 0], [10, 0, 0], [0, 9, 1], [0, 0, 0]])
    relation = conditional_relation(Targets(torch.tensor([0, 0, 1, -1]), votes), 3, va_nodes=False)
    expected = [[1, 0.5, 0], [0.5, 1, 0], [0, 0, 1]]
    torch.testing.assert_close(relation, torch.tensor(expected, dtype=torch.float64))
    va = torch.tensor([[1.0, -1], [1, 1], [-1, 1], [1, 1]])
    relation = conditional_relation(Targets(torch.tensor([0, 0, 1, -1]), None, va), 3)
    torch.testing.assert_close(relation[0], torch.tensor([1, 0, 0, 1, 0.5], dtype=torch.float64))
    torch.testing.assert_close(relation[3], torch.tensor([1, 0, 0, 1, 0.5], dtype=torch.float64))
    with pytest.raises(ValueError, match="va_nodes=False"):
        conditional_relation(Targets(torch.tensor([0, 1])), 3)


def glove(path, words, width=300):
    vectors = torch.randn(len(words), width, generator=torch.Generator().manual_seed(1))
    rows = [
        f"{word} {' '.join(f'{v:.4f}' for v in row)}"
        for word, row in zip(words, vectors.tolist(), strict=True)
    ]
    path.write_text("\n".join(["the 0.1 0.2", *rows, ""]), encoding="utf-8")
    return path


SEVEN = ("neutral", "happy", "sad", "surprise", "fear", "disgust", "anger", "valence", "arousal")


def test_glove(tmp_path):
    path = glove(tmp_path / "glove.txt", SEVEN[::-1], width=6)
    assert a_head(embeddings=path).vectors.shape == (9, 6)
    torch.testing.assert_close(
        read_glove(path, ["sad", "anger"]), a_head(embeddings=str(path)).vectors[[2, 6]]
    )
    with pytest.raises(ValueError, match="no vector of 'contempt'"):
        a_head(16, 8, embeddings=path)
    with pytest.raises(FileNotFoundError, match=r"no file none\.txt"):
        a_head(embeddings="none.txt")
    path.write_text("sad 1 2\nanger 1\n")
    with pytest.raises(ValueError, match="different widths, 1, 2"):
        read_glove(path, ["sad", "anger"])
    path.write_text("sad 1 x\n")
    with pytest.raises(ValueError, match="line 1: expected numbers after 'sad'"):
        read_glove(path, ["sad"])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (
            {"adjacency": "cooccurrence"},
            "unknown adjacency 'cooccurrence': expected one of 'auto', 'published'",
        ),
        ({"adjacency": "spearman"}, "needs targets"),
        ({"adjacency": [[1.0]]}, r"adjacency must be \(9, 9\), got \(1, 1\)"),
        ({"adjacency": torch.eye(7)}, r"adjacency must be \(9, 9\), got \(7, 7\)"),
        ({"adjacency": torch.zeros(9, 9)}, "positive sum"),
        ({"embeddings": torch.zeros(7, 3)}, r"embeddings must be \(9, E\)"),
        ({"labels": ["happy"]}, "7 different names, got happy"),
        ({"labels": [*SEVEN[:6], "bored"], "adjacency": "published"}, "no published correlations of 'bored'"),
        ({"labels": [*SEVEN[:6], "bored"], "embeddings": "table"}, "the table has no vector of 'bored'"),
        ({"va_nodes": False}, "va_nodes=False"),
        ({"norm": "max"}, "unknown norm 'max'"),
        ({"reweight": 2.0}, r"reweight must lie in \[0, 1\]"),
    ],
)
def test_the_head_refuses(options, match):
    with pytest.raises(ValueError, match=match):
        a_head(**options)
    with pytest.raises(ValueError, match="at least 2"):
        a_head(16, 1)
    with pytest.raises(ValueError, match="5 classes have none by default"):
        build_adjacency("published", 5)


def test_the_outputs_are_the_embedding_by_the_generated_classifier():
    head = a_head(negative_slope=0.1)
    x = torch.randn(4, 16)
    a = normalise_adjacency(head.adjacency)
    hidden = a @ (head.vectors @ head.gc1.weight)
    hidden = torch.where(hidden > 0, hidden, 0.1 * hidden)
    out = x @ (a @ (hidden @ head.gc2.weight)).T
    logits, valence_arousal = head(x)
    torch.testing.assert_close(logits, out[:, :7])
    torch.testing.assert_close(valence_arousal, out[:, 7:])
    linear = head.to_linear()(x)
    torch.testing.assert_close(linear[0], logits)
    torch.testing.assert_close(linear[1], valence_arousal)


def counted(head):
    calls = []
    generate = head._generate
    head._generate = lambda: calls.append(1) or generate()
    return calls


@torch.no_grad()
def test_evaluation_generates_once_until_something_changes():
    head, x = a_head().eval(), torch.randn(2, 16)
    calls = counted(head)
    first = head(x)[0]
    assert torch.equal(head(x)[0], first) and len(calls) == 1
    head.gc2.weight.mul_(2)  # as an optimiser does
    torch.testing.assert_close(head(x)[0], 2 * first)
    head.load_state_dict({name: tensor * 1 for name, tensor in a_head().state_dict().items()})
    assert torch.equal(head(x)[0], first) and len(calls) == 3
    head.gc1.weight.data = 2 * head.gc1.weight.data
    torch.testing.assert_close(head(x)[0], 2 * first)
    head.double()
    assert head(x.double())[0].dtype == torch.float64 and len(calls) == 5
    head.train()
    head(x.double())
    head(x.double())
    assert len(calls) == 7
    head.eval()
    head(x.double())
    assert len(calls) == 8


def test_what_is_kept_serves_autograd_and_copies():
    head, x = a_head().eval(), torch.randn(2, 16)
    with torch.inference_mode():
        expected = head(x)[0].clone()
    with torch.autocast("cpu", torch.bfloat16):
        head.classifier()
    for other in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        assert other._cache is None and torch.equal(other(x)[0], expected)
    head(x)[0].sum().backward()  # in evaluation too the graph learns where gradients are on
    assert head.gc1.weight.grad.abs().sum() > 0
    head.requires_grad_(False)
    x.requires_grad_()
    head(x)[0].sum().backward()
    assert x.grad.abs().sum() > 0


def test_published_weights_load_by_name(tmp_path):
    path = glove(tmp_path / "glove.txt", SEVEN)
    model = create_model("emotion_gcn", embeddings=path)
    other = create_model("emotion_gcn", embeddings=path)
    # As the published module names its tensors
    published = {
        name.removeprefix("backbone."): t for name, t in other.state_dict().items() if "backbone" in name
    }
    published |= {f"gc{i}.weight": other.state_dict()[f"head.gc{i}.weight"] for i in (1, 2)}
    published["A"] = torch.tensor(PUBLISHED_A)
    assert (
        "features.conv0.weight" in published and "features.denseblock4.denselayer16.conv2.weight" in published
    )
    assert published["gc1.weight"].shape == (300, 512) and published["gc2.weight"].shape == (512, 1024)
    file = tmp_path / "published.pt"
    torch.save(published, file)
    loaded = create_model("emotion_gcn", embeddings=path, pretrained=file)
    for name, tensor in other.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, msg=name)
    with pytest.raises(ValueError, match="300-d word vectors, this model has 384-d ones"):
        checkpoint_filter_fn(published, create_model("emotion_gcn"))
    assert isinstance(model.backbone.features.norm5.act, torch.nn.Identity)


def test_the_published_class_weights():
    expected = [0.0508, 0.0283, 0.1494, 0.2699, 0.5963, 1, 0.1528]
    torch.testing.assert_close(
        torch.tensor(AFFECTNET_CLASS_WEIGHTS), torch.tensor(expected), rtol=0, atol=5e-5
    )


def test_unknown_backbone():
    with pytest.raises(ValueError, match=r"unknown backbone 'densenet120': did you mean .*'densenet12"):
        create_model("emotion_gcn", backbone="densenet120")
    with pytest.raises(ValueError, match=r"densenet121 has no drop_path_rate, got 0\.1"):
        create_model("emotion_gcn", drop_path_rate=0.1)


def test_overfits():
    torch.manual_seed(0)
    assert_overfits(create_model("emotion_gcn_resnet18", num_classes=8))


def test_the_ccc_part_raises_concordance():
    found = {}
    images, targets = faces()
    for weight in (0.0, 1.0):
        torch.manual_seed(0)
        model = create_model("emotion_gcn_resnet18", num_classes=8)
        found[weight] = 1 - train(model, images, targets, 15, 1e-4, ccc=weight)[-1]["ccc"]
    assert found[1.0] > found[0.0] + 0.2

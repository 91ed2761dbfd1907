"""Losses: each against the formula written out, what is unlabelled, and the criterion around them."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fer_models.losses import (
    CCC,
    Criterion,
    CrossEntropy,
    RegionCrossEntropy,
    RegionEntropy,
    Targets,
    Term,
    Variety,
    ccc_loss,
    class_balanced_weights,
    concordance,
    cross_entropy,
    region_cross_entropy,
    region_entropy,
    variety_loss,
)
from fer_models.output import FEROutput

NAN = float("nan")


def make(*shape, seed=0, **options):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, **options)


# Cross-entropy


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_cross_entropy_is_torchs(weighted, label_smoothing):
    logits, label = make(9, 5), torch.tensor([0, 1, 2, 3, 4, -1, 2, -1, 0])
    weights = torch.rand(5, dtype=torch.float64) + 0.1 if weighted else None
    ours = cross_entropy(logits, label, class_weights=weights, label_smoothing=label_smoothing)
    theirs = F.cross_entropy(logits, label, weight=weights, label_smoothing=label_smoothing, ignore_index=-1)
    torch.testing.assert_close(ours, theirs)


def test_every_negative_label_is_none():
    logits = make(2, 3)
    torch.testing.assert_close(
        cross_entropy(logits, torch.tensor([1, -100])), F.cross_entropy(logits[:1], torch.tensor([1]))
    )


def test_votes_stand_in_for_the_label_where_there_are_any():
    logits = make(4, 3)
    votes = torch.tensor([[8.0, 2, 0], [0, 0, 0], [NAN, NAN, NAN], [0, 0, 5]])
    label = torch.tensor([1, 1, -1, 0])
    log_p = logits.log_softmax(1)
    expected = -(0.8 * log_p[0, 0] + 0.2 * log_p[0, 1] + log_p[1, 1] + log_p[3, 2]) / 3
    torch.testing.assert_close(cross_entropy(logits, label, votes), expected)


def test_a_label_beyond_the_classes_is_an_error():
    with pytest.raises(ValueError, match=r"exceeds the 3 classes .largest: 7"):
        cross_entropy(make(2, 3), torch.tensor([1, 7]))


@pytest.mark.parametrize(
    ("arguments", "options", "match"),
    [
        ((make(2, 3), torch.tensor([0])), {}, r"integer labels \(B,\)"),
        ((make(2, 3), torch.tensor([0.0, 1.0])), {}, "integer labels"),
        ((make(2, 3), torch.tensor([0, 1]), make(2, 4)), {}, r"distribution must be \(2, 3\)"),
        (
            (make(2, 3), torch.tensor([0, 1])),
            {"class_weights": torch.ones(2)},
            r"class_weights must be \(3,\)",
        ),
    ],
)
def test_cross_entropy_refuses(arguments, options, match):
    with pytest.raises(ValueError, match=match):
        cross_entropy(*arguments, **options)


def test_class_balanced_weights():
    weights = class_balanced_weights([100, 10, 0], beta=0.99)
    expected = np.array([0.01 / (1 - 0.99**100), 0.01 / (1 - 0.99**10)])
    np.testing.assert_allclose(weights[:2], expected * 2 / expected.sum(), rtol=1e-6)
    assert weights[2] == 0
    assert class_balanced_weights([3, 7], beta=0.0).tolist() == [1, 1]
    with pytest.raises(ValueError, match=r"\[0, 1\), got 1"):
        class_balanced_weights([1], beta=1.0)


# Concordance


def test_concordance_is_the_formula():
    x, y = make(20, 2), make(20, 2, seed=1)
    a, b = x.numpy(), y.numpy()
    covariance = ((a - a.mean(0)) * (b - b.mean(0))).mean(0)
    exact = 2 * covariance / (a.var(0) + b.var(0) + (a.mean(0) - b.mean(0)) ** 2)
    published = 2 * covariance / (a.var(0, ddof=1) + b.var(0, ddof=1) + (a.mean(0) - b.mean(0)) ** 2)
    np.testing.assert_allclose(concordance(x, y), exact)
    np.testing.assert_allclose(concordance(x, y, compat=True), published)
    np.testing.assert_allclose(ccc_loss(x, y, compat=True), 1 - published.mean())
    torch.testing.assert_close(concordance(x, x), torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(concordance(-x, x - x.mean(0)).sign(), -torch.ones(2, dtype=torch.float64))


def test_concordance_skips_what_is_unknown():
    x, y = make(12, 2), make(12, 2, seed=1)
    y[3, 0] = y[7, 0] = NAN
    known = [row for row in range(12) if row not in (3, 7)]
    torch.testing.assert_close(concordance(x, y)[0], concordance(x[known], y[known])[0])
    torch.testing.assert_close(concordance(x, y)[1], concordance(x[:, 1:], y[:, 1:])[0])
    y[1:, 0] = NAN  # one is not enough for a correlation: the loss is the other column's
    torch.testing.assert_close(ccc_loss(x, y), 1 - concordance(x, y)[1])


def test_constant_predictions_are_finite():
    x = torch.zeros(4, 2, requires_grad=True)
    loss = ccc_loss(x, torch.zeros(4, 2))
    loss.backward()
    assert loss == 1
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("compat", [False, True])
def test_concordance_gradients(compat):
    y = make(6, 2, seed=1)
    y[2, 1] = NAN
    assert torch.autograd.gradcheck(lambda x: ccc_loss(x, y, compat=compat), make(6, 2, requires_grad=True))


# Variety


def pairs(maps):
    n = maps.shape[1]
    return [(maps[:, i].flatten(1), maps[:, j].flatten(1)) for i in range(n) for j in range(i)]


def test_cosine_variety_is_the_mean_over_pairs():
    maps = make(3, 4, 5, 5).abs()
    expected = torch.stack([F.cosine_similarity(a, b) for a, b in pairs(maps)]).mean()
    torch.testing.assert_close(variety_loss(maps), expected)
    torch.testing.assert_close(variety_loss(maps[:, :1].expand(-1, 4, -1, -1)).item(), 1.0)
    assert variety_loss(torch.eye(4).reshape(1, 4, 2, 2)) == 0


def test_hinge_and_partition_varieties():
    maps = make(3, 4, 5, 5).abs()
    hinge = torch.stack([(1 - (a - b).norm(dim=1) / 25).clamp(min=0) for a, b in pairs(maps)]).mean() / 2
    torch.testing.assert_close(variety_loss(maps, "hinge"), hinge)
    partition = torch.log(1 + 4 / (maps.var(1).mean((1, 2)) + torch.finfo(torch.float32).eps)).mean()
    torch.testing.assert_close(variety_loss(maps, "partition"), partition)


@pytest.mark.parametrize("kind", ["cosine", "hinge", "partition"])
def test_variety_gradients_and_edges(kind):
    maps = make(2, 3, 2, 2).abs().requires_grad_()
    assert torch.autograd.gradcheck(lambda m: variety_loss(m, kind), maps)
    assert variety_loss(maps[:, :1], kind) == 0
    alike = torch.ones(2, 3, 4, requires_grad=True)
    variety_loss(alike, kind).backward()
    assert alike.grad.isfinite().all()
    masked = variety_loss(maps, kind, mask=torch.tensor([True, False]))
    torch.testing.assert_close(masked, variety_loss(maps[:1], kind))


def test_unknown_variety():
    with pytest.raises(ValueError, match="unknown kind 'l2': expected one of 'cosine', 'hinge', 'partition'"):
        variety_loss(make(1, 2, 3), "l2")


# Regions


def test_region_cross_entropy_is_the_weighted_sum():
    logits, weights, label = make(4, 3, 5), make(4, 3, seed=1).softmax(1), torch.tensor([0, 4, -1, 2])
    expected = sum(
        weights[i, r] * F.cross_entropy(logits[i, r], label[i]) for i in (0, 1, 3) for r in range(3)
    )
    torch.testing.assert_close(region_cross_entropy(logits, weights, label), expected / 3)


def test_region_weights_are_constants_unless_asked():
    logits, label = make(4, 3, 5), torch.tensor([0, 4, -1, 2])
    weights = make(4, 3, seed=1).softmax(1).requires_grad_()
    assert not region_cross_entropy(logits, weights, label).requires_grad
    region_cross_entropy(logits, weights, label, stop_gradient=False).backward()
    assert (weights.grad[[0, 1, 3]] > 0).all()  # more weight anywhere costs: the collapse that is stopped


def test_region_entropy_pushes_up_to_its_floor():
    weights = torch.tensor([[0.97, 0.01, 0.01, 0.01], [0.25, 0.25, 0.25, 0.25]], dtype=torch.float64)
    entropy = torch.special.entr(weights).sum(1)
    expected = (np.log(4) * 0.5 - entropy).clamp(min=0).mean()
    torch.testing.assert_close(region_entropy(weights, 0.5), expected, rtol=1e-6, atol=0)
    assert region_entropy(weights[1:], 0.9) == 0


# What is not labelled, and the criterion


def an_output(batch=4, classes=5, **options):
    def leaf(*shape):
        return torch.randn(*shape, requires_grad=True)

    aux = {
        "path_maps": leaf(batch, 3, 2, 2),
        "local_logits": leaf(batch, 6, classes),
        "region_weights": torch.rand(batch, 6).softmax(1).requires_grad_(),
    }
    return FEROutput(leaf(batch, classes), leaf(batch, 2), leaf(batch, 7), aux)


def leaves(output):
    return [output.logits, output.valence_arousal, *output.aux.values()]


def every_term():
    return [
        Term("cross_entropy", 1.0, CrossEntropy(label_smoothing=0.1)),
        Term("ccc", 1.0, CCC()),
        Term("variety", 0.5, Variety()),
        Term("local", 0.5, RegionCrossEntropy(stop_gradient=False)),
        Term("entropy", 0.1, RegionEntropy()),
    ]


@pytest.mark.parametrize("distribution", [None, torch.zeros(4, 5)])
@pytest.mark.parametrize("valence_arousal", [None, torch.full((4, 2), NAN)])
def test_nothing_labelled_gives_nothing(distribution, valence_arousal):
    output = an_output()
    targets = Targets(torch.full((4,), -1), distribution, valence_arousal)
    total, parts = Criterion(every_term())(output, targets)
    total.backward()
    assert total == 0
    assert all(part == 0 for part in parts.values())
    assert all((leaf.grad == 0).all() for leaf in leaves(output))


def test_an_unlabelled_sample_changes_nothing():
    output = an_output()
    targets = Targets(
        torch.tensor([1, -1, 3, 0]), None, torch.tensor([[0.1, NAN], [NAN, NAN], [0.5, 0.2], [-0.4, -0.3]])
    )
    kept = [0, 2, 3]
    part = FEROutput(
        output.logits[kept],
        output.valence_arousal[kept],
        output.embedding[kept],
        {name: value[kept] for name, value in output.aux.items()},
    )
    fewer = Targets(targets.label[kept], None, targets.valence_arousal[kept])
    criterion = Criterion(every_term())
    torch.testing.assert_close(criterion(output, targets)[0], criterion(part, fewer)[0])


def test_total_is_the_weighted_sum_of_the_parts():
    output, targets = an_output(), Targets(torch.tensor([1, 2, 3, 0]), None, torch.rand(4, 2))
    terms = every_term()
    total, parts = Criterion(terms)(output, targets)
    torch.testing.assert_close(total, sum(term.weight * parts[term.name] for term in terms))
    assert total.requires_grad
    assert not any(part.requires_grad for part in parts.values())


def test_labels_and_distributions_alone():
    output, criterion = an_output(), Criterion([Term("cross_entropy", 1.0, CrossEntropy())])
    label = torch.tensor([1, 2, 3, 0])
    mixed = F.one_hot(label, 5).float()
    expected = F.cross_entropy(output.logits, label)
    torch.testing.assert_close(criterion(output, label)[0], expected)
    torch.testing.assert_close(criterion(output, mixed)[0], expected)
    with pytest.raises(ValueError, match=r"integers \(B,\) or floats \(B, classes\)"):
        criterion(output, torch.zeros(4))


class AModel(nn.Module):
    def loss_terms(self):
        return every_term()


class Wrapper(nn.Module):
    def __init__(self, name, module):
        super().__init__()
        setattr(self, name, module)


def test_for_model_and_its_overrides():
    criterion = Criterion.for_model(
        Wrapper("module", Wrapper("_orig_mod", AModel())),  # DDP around torch.compile
        variety=0.0,
        label_smoothing=0.3,
        class_weights=[1, 2, 3, 4, 5],
        compat=True,
    )
    terms = {term.name: term for term in criterion.terms}
    assert terms["variety"].weight == 0
    assert terms["cross_entropy"].loss.label_smoothing == terms["local"].loss.label_smoothing == 0.3
    assert terms["local"].loss.class_weights.tolist() == [1, 2, 3, 4, 5]
    assert terms["ccc"].loss.compat
    assert criterion.double().losses[0].class_weights.dtype == torch.float64  # it moves with the criterion
    with pytest.raises(
        ValueError, match=r"unknown override 'varity': expected a term \(cross_entropy, ccc, "
    ):
        Criterion.for_model(AModel(), varity=0.1)
    with pytest.raises(TypeError, match="expected a FERModel, got Linear"):
        Criterion.for_model(nn.Linear(2, 2))


def test_a_term_of_weight_0_is_reported_and_reaches_its_parameters():
    output = an_output()
    total, parts = Criterion([Term("variety", 0.0, Variety())])(output, torch.tensor([1, 2, 3, 0]))
    total.backward()
    assert parts["variety"] != 0
    assert (output.aux["path_maps"].grad == 0).all()


def test_criterion_refuses():
    term = Term("a", 1.0, CrossEntropy())
    with pytest.raises(ValueError, match="at least one term"):
        Criterion([])
    with pytest.raises(ValueError, match="names must differ, got a, a"):
        Criterion([term, term])
    with pytest.raises(TypeError, match="full=True"):
        Criterion([term])(torch.zeros(1, 5), torch.tensor([1]))
    output = FEROutput(torch.zeros(1, 5), None, torch.zeros(1, 7), {"graphs": []})
    with pytest.raises(ValueError, match="no 'path_maps', only graphs"):
        Criterion([Term("v", 1.0, Variety())])(output, torch.tensor([1]))
    with pytest.raises(ValueError, match="valence_arousal=True"):
        Criterion([Term("c", 1.0, CCC())])(output, torch.tensor([1]))


def test_float32_under_autocast():
    output = an_output()
    half = FEROutput(
        output.logits.bfloat16(),
        output.valence_arousal.bfloat16(),
        output.embedding,
        {name: value.bfloat16() for name, value in output.aux.items()},
    )
    with torch.autocast("cpu", torch.bfloat16):
        total, parts = Criterion(every_term())(
            half, Targets(torch.tensor([1, 2, 3, 0]), None, torch.rand(4, 2))
        )
    assert total.dtype == torch.float32
    assert all(part.dtype == torch.float32 for part in parts.values())


def test_compiles_in_one_graph():
    output, targets = an_output(), Targets(torch.tensor([1, -1, 3, 0]), torch.rand(4, 5), torch.rand(4, 2))
    criterion = Criterion(every_term())
    compiled = torch.compile(criterion, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(output, targets)[0], criterion(output, targets)[0])

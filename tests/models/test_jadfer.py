"""JADFER: its branches, what dropping does within it, and its losses."""

import pytest
import torch
from training_support import assert_overfits, faces, train

from fer_kernels.nn import JADAttention
from fer_models import create_model
from fer_models.losses import Criterion, Targets

LABEL = torch.tensor([0, 1, 2, 0])


def tiny(seed=0, **options):
    torch.manual_seed(seed)
    defaults = {
        **{"stem": (8, 16), "stem_blocks": (0, 1), "dim": 16, "depth": 2, "sci_depth": 1, "num_heads": 2},
        **{"img_size": 24, "num_classes": 3},
    }
    return create_model("jadfer_xs", **{**defaults, **options})


def images(batch=4, side=24, seed=1):
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(seed))


def attentions(model):
    return [module for module in model.modules() if isinstance(module, JADAttention)]


def sharpen(model, factor=6.0):
    """Attention that is far from uniform, as after training."""
    with torch.no_grad():
        for attention in attentions(model):
            (attention.qkv if attention.context_dim is None else attention.q).weight.mul_(factor**2)
            if attention.context_dim is not None:
                attention.kv.weight.mul_(factor)
    return model


@torch.no_grad()
def joint_shares(model, x):
    """The share of the attention that goes to each layer's joint keys: (with dropping, without)."""
    model.collect_stats = True
    found = []

    def record(module, inputs):
        q, k, _ = module._projections(*(inputs if len(inputs) > 1 else (inputs[0], None)))
        found.append((q @ k.mT) * q.shape[-1] ** -0.5)

    hooks = [attention.register_forward_pre_hook(record) for attention in attentions(model)]
    aux = model(x, full=True).aux
    for hook in hooks:
        hook.remove()
    shares = []
    for scores, means, mask in zip(found, aux["column_means"], aux["drop_masks"], strict=True):
        torch.testing.assert_close(scores.softmax(-1).mean(2), means, rtol=1e-4, atol=1e-5)
        kept = scores.masked_fill(mask.unsqueeze(2), -torch.inf).softmax(-1).mean(2)
        joint = means > 1 / means.shape[-1] + means.std(-1, correction=0, keepdim=True)
        shares.append(tuple((c * joint).sum(-1).mean().item() for c in (kept, means)))
    return shares


def test_jad_lowers_the_share_of_joint_attention():
    shares = joint_shares(sharpen(tiny(jad_p=1.0)).train(), images())
    assert len(shares) == 3
    assert all(plain > 0.1 and dropped < 0.6 * plain for dropped, plain in shares)
    control = joint_shares(sharpen(tiny(jad="random", jad_p=1.0)).train(), images())
    assert all(dropped > 0.7 * plain for dropped, plain in control)
    on = joint_shares(sharpen(tiny(jad_p=1.0, jad_eval="on")).eval(), images())
    assert all(dropped < 0.6 * plain for dropped, plain in on)
    for options in ({"jad": "none"}, {"jad_eval": "off"}):
        shares = joint_shares(sharpen(tiny(**options)).eval(), images())
        assert all(dropped == pytest.approx(plain, rel=1e-4) for dropped, plain in shares)


def test_the_control_drops_as_many_keys():
    dropped = {}
    for jad in ("key", "random"):
        model = sharpen(tiny(jad=jad, jad_p=1.0, depth=1)).train()
        model.collect_stats = True
        dropped[jad] = model(images(), full=True).aux["drop_masks"]
    first = [masks[0] for masks in dropped.values()]  # later layers see what the first made of it
    assert first[0].any() and not torch.equal(*first)
    assert torch.equal(*(mask.sum(-1) for mask in first))


def test_evaluation_drops_nothing_unless_asked():
    state = sharpen(tiny()).state_dict()
    logits = {}
    for name, options in {
        "none": {"jad": "none"},
        "off": {},
        "on": {"jad_eval": "on"},
        "soft": {"jad": "soft", "jad_eval": "on"},
        "entry": {"jad": "entry", "jad_eval": "on"},
        "dropout": {"jad": "attn_dropout"},
    }.items():
        model = tiny(**options)
        model.load_state_dict(state)
        logits[name] = model.eval()(images())
    assert torch.equal(logits["off"], logits["none"]) and torch.equal(logits["dropout"], logits["none"])
    for name in ("on", "soft", "entry"):
        assert not torch.allclose(logits[name], logits["none"])


def test_schedule():
    model = tiny(depth=3, jad_p=0.6, jad_p_last=0.2)
    assert [a.p for a in attentions(model)] == pytest.approx([0.6, 0.4, 0.2, 0.6])
    assert [a.p for a in attentions(tiny(jad_p=0.3))] == [0.3] * 3


def test_a_generator_decides():
    logits = []
    for seed in (5, 5, 6):
        model = sharpen(tiny(generator=torch.Generator().manual_seed(seed))).train()
        torch.manual_seed(len(logits))
        logits.append(model(images()))
    assert torch.equal(logits[0], logits[1]) and not torch.equal(logits[0], logits[2])
    with pytest.raises(ValueError, match=r"set_generator\(None\)"):
        model.set_grad_checkpointing()
    model.set_generator(None)
    model.set_grad_checkpointing()
    model(images()).sum().backward()


# The branches


def test_path_tokens_are_the_formula():
    model = tiny(paths=3, path_dim=7, path_kernel=3).eval()
    spatial, features = model.spatial, torch.randn(2, 16, 5, 5)
    maps, tokens = spatial(features)
    assert maps.shape == (2, 3, 5, 5) and (maps > 0).all() and (maps < 1).all()
    values = torch.relu(spatial.norm(spatial.conv(features)))
    for n in range(3):
        a = maps[:, n : n + 1]
        gathered = (a * (a * values[:, 7 * n : 7 * n + 7])).sum((2, 3)) / a.sum((2, 3))
        torch.testing.assert_close(tokens[:, n], spatial.project(gathered))


def test_grid_tokens_are_the_strongest_maps():
    model = tiny(sb_tokens="grid").eval()
    features = torch.randn(2, 16, 5, 5)
    maps, tokens = model.spatial(features)
    expected = model.spatial.project((maps.amax(1, keepdim=True) * features).flatten(2).mT)
    torch.testing.assert_close(tokens, expected)
    assert model(images(), full=True).aux["path_tokens"].shape == (4, 36, 16)


@pytest.mark.parametrize(
    "options",
    [
        {"readout": "mean"},
        {"sb_tokens": "grid"},
        {"paths": 1},
        {"variety": "token", "cls_weight": 0.5, "valence_arousal": True},
        {"variety": "hinge", "jad": "dropkey", "jad_options": {"max_drop": 0.2}},
        {"variety": "partition", "jad_options": {"joint_over": "head"}},
        {"backbone": "resnet18", "reduction": 8, "jad": "attn_dropout"},
    ],
)
def test_options_train_every_parameter(options):
    model = tiny(**options)
    total, parts = Criterion.for_model(model)(model(images(), full=True), LABEL)
    total.backward()
    assert ("cls" in parts) == ("cls_weight" in options)
    assert model.num_features == (16 if options.get("readout") == "mean" else 32)
    unused = {"norm_cls.weight", "norm_cls.bias"} if options.get("readout") == "mean" else set()
    assert {name for name, p in model.named_parameters() if p.grad is None} <= unused
    model.reset_classifier(2)
    assert model(images()).shape == (4, 2)


def test_a_backbones_level_is_chosen_by_reduction():
    with torch.device("meta"):
        assert create_model("jadfer_resnet18").stride == 16
        assert create_model("jadfer_resnet18", img_size=112).stride == 8
        with pytest.raises(
            ValueError, match="resnet18 has no level that reduces by 64, but by 2, 4, 8, 16, 32"
        ):
            create_model("jadfer_resnet18", reduction=64)


def test_other_sides_interpolate_the_position():
    model = tiny().eval()
    for side in (16, 24, 32):
        assert model(images(side=side)).isfinite().all()


def test_sizes():
    with torch.device("meta"):
        counts = {
            n: sum(p.numel() for p in create_model(n).parameters())
            for n in ("jadfer", "jadfer_s", "jadfer_xs")
        }
    assert counts["jadfer_xs"] <= 4_000_000 < counts["jadfer_s"] < counts["jadfer"]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (
            {"jad": "column"},
            "unknown jad 'column': expected one of 'key', 'soft', 'entry', 'none', 'attn_dropout'",
        ),
        ({"jad": "random", "jad_eval": "on"}, "draws at random"),
        ({"sb_tokens": "pixel"}, "unknown sb_tokens 'pixel': expected one of 'path', 'grid'"),
        ({"readout": "cls"}, "unknown readout 'cls'"),
        ({"variety": "l2"}, "unknown variety 'l2': expected one of 'cosine', 'hinge', 'partition', 'token'"),
        ({"variety": "token", "sb_tokens": "grid"}, "sb_tokens must be 'path'"),
        ({"paths": 0}, "paths must be an int of at least 1, got 0"),
        ({"path_kernel": 2}, "path_kernel must be odd"),
        ({"stem": (8,)}, "stem and stem_blocks must be of one length"),
        ({"reduction": 16}, "this stem reduces by 4, got reduction=16"),
        ({"img_size": 30}, "img_size must be a multiple of 4"),
        ({"num_heads": 3}, "num_heads must divide"),
        ({"jad_p": 1.5}, r"p must lie in \[0, 1\]"),
    ],
)
def test_refuses(options, match):
    with pytest.raises(ValueError, match=match):
        tiny(**options)


# Training


def test_overfits():
    torch.manual_seed(0)
    assert_overfits(create_model("jadfer_xs", img_size=32))


def test_the_variety_loss_drives_the_maps_apart():
    x, targets = faces(classes=3, side=24)
    similarity = {
        weight: train(tiny(), x, targets, 30, 3e-3, variety=weight)[-1]["variety"] for weight in (0.0, 1.0)
    }
    assert similarity[1.0] < similarity[0.0] - 0.05


def test_the_loss_of_cls_trains_its_classifier():
    x, targets = faces(classes=3, side=24)
    history = train(tiny(cls_weight=0.5), x, targets, 30, 3e-3)
    assert history[-1]["cls"] < 0.9 * history[0]["cls"]


def test_unlabelled_images_give_no_gradient():
    model = tiny()
    total, _ = Criterion.for_model(model)(model(images(), full=True), Targets(torch.full((4,), -1)))
    total.backward()
    assert total == 0 and all((p.grad == 0).all() for p in model.parameters())

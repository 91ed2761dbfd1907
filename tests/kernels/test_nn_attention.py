"""JADAttention and JADBlock: the modules around jad_attention."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from support import backends

from fer_kernels import jad_attention
from fer_kernels.nn import JADAttention, JADBlock, drop_schedule

every_backend = pytest.mark.parametrize("backend", [b for b in backends("jad") if b in ("reference", "cpu")])
X = torch.randn(3, 30, 48, generator=torch.Generator().manual_seed(0))
CONTEXT = torch.randn(3, 50, 40, generator=torch.Generator().manual_seed(1))


def attention(context_dim=None, dim=48, num_heads=4, seed=0, **options) -> JADAttention:
    torch.manual_seed(seed)
    module = JADAttention(dim, num_heads, context_dim=context_dim, **options)
    with torch.no_grad():  # sharper than at birth, where attention is nearly uniform and nothing is joint
        for name, parameter in module.named_parameters():
            if name.startswith(("q", "kv")):
                parameter.mul_(3)
    return module


def generator(seed=0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- timm ----


@pytest.mark.parametrize("options", [{}, {"qkv_bias": True}, {"qkv_bias": True, "init_values": 0.3}])
@pytest.mark.parametrize("training", [True, False])
def test_without_dropping_it_is_timms_block(options, training):
    timm = pytest.importorskip("timm.models.vision_transformer")
    torch.manual_seed(0)
    theirs = timm.Block(48, 4, **options).train(training)
    ours = JADBlock(48, 4, p=0.0, **{"qkv_bias": False, **options}).train(training)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    inputs = [X.clone().requires_grad_() for _ in range(2)]
    outputs = [block(x) for block, x in zip((ours, theirs), inputs, strict=True)]
    torch.testing.assert_close(*outputs)
    for out in outputs:
        out.square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-4)


def test_in_evaluation_it_is_timms_block_whatever_p():
    timm = pytest.importorskip("timm.models.vision_transformer")
    theirs = timm.Block(48, 4, qkv_bias=True).eval()
    ours = JADBlock(48, 4, p=1.0, drop_path=0.5, proj_drop=0.5, attn_drop=0.5).eval()
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(X), theirs(X))


def test_a_whole_timm_transformer_takes_the_blocks():
    timm = pytest.importorskip("timm.models.vision_transformer")
    torch.manual_seed(0)
    model = timm.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=4, num_classes=7
    ).eval()
    image = torch.randn(2, 3, 32, 32)
    want = model(image)
    probabilities = drop_schedule(0.5, 3)
    for i, p in enumerate(probabilities):
        block = JADBlock(48, 4, p=p).eval()
        block.load_state_dict(model.blocks[i].state_dict())
        model.blocks[i] = block
    torch.testing.assert_close(model(image), want)


# ---- when it drops ----


@every_backend
@pytest.mark.parametrize("context_dim", [None, 40])
def test_it_is_jad_attention_between_projections(backend, context_dim):
    module = attention(context_dim, p=1.0, backend=backend, beta=0.5, max_drop=0.2, protect=2)
    context = None if context_dim is None else CONTEXT
    out, stats = module(X, context, return_stats=True)
    if context is None:
        q, k, v = module.qkv(X).view(3, 30, 3, 4, 12).permute(2, 0, 3, 1, 4)
    else:
        q = module.q(X).view(3, 30, 4, 12).transpose(1, 2)
        k, v = module.kv(context).view(3, 50, 2, 4, 12).permute(2, 0, 3, 1, 4)
    inner, want = jad_attention(
        q, k, v, beta=0.5, max_drop=0.2, protect=2, return_stats=True, backend=backend
    )
    assert torch.equal(stats.mask, want.mask) and stats.mask.any()
    torch.testing.assert_close(out, module.proj(inner.transpose(1, 2).reshape(3, 30, 48)))
    out.sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_the_gate_is_drawn_from_the_generator():
    def masks(seed, **options):
        module = attention(generator=generator(seed), **options)
        return torch.stack([module(X, return_stats=True)[1].mask for _ in range(20)])

    assert torch.equal(masks(3), masks(3)) and not torch.equal(masks(3), masks(4))
    dropping = masks(3, p=0.25).any(-1)
    always = masks(3, p=1.0).any(-1)
    assert always.float().mean() > 0.9
    share = dropping.sum() / always.sum()
    assert 0.12 < share < 0.4
    assert not masks(3, p=0.0).any()
    state = torch.get_rng_state()
    attention(generator=generator())  # seeds torch's own generator
    state = torch.get_rng_state()
    module = attention(generator=generator())
    module(X)
    assert torch.equal(torch.get_rng_state(), state)


def test_joint_over_head_gates_a_whole_sample():
    module = attention(generator=generator(), joint_over="head", p=0.5, beta=0.3)
    masks = torch.stack([module(X, return_stats=True)[1].mask for _ in range(10)])
    assert torch.equal(masks, masks[:, :, :1].expand_as(masks))
    dropping = masks.any(-1).float().mean()
    assert 0 < dropping < 1


def test_evaluation_is_off_or_on():
    module = attention(p=0.5).eval()
    assert not module(X, return_stats=True)[1].mask.any()
    assert torch.equal(module(X), module(X))
    always = attention(p=0.5, eval_mode="on").eval()
    out, stats = always(X, return_stats=True)
    assert stats.mask.any() and torch.equal(always(X), out)
    assert not torch.equal(out, module(X))
    assert torch.equal(out, attention(p=1.0)(X))  # in training with p = 1
    never = attention(p=0.0, eval_mode="on").eval()
    assert torch.equal(never(X), module(X))


@pytest.mark.parametrize("drop", ["none", "key", "soft", "entry", "random", "dropkey"])
def test_every_mode(drop):
    module = attention(p=1.0, drop=drop, generator=generator())
    out, stats = module(X, return_stats=True)
    out.sum().backward()
    assert stats.mask.any() == (drop not in ("none", "soft"))
    plain = attention(p=0.0)(X)
    assert torch.equal(out, plain) == (drop == "none")


# ---- dropout ----


@pytest.mark.parametrize("drop", ["none", "key", "soft", "entry"])
@pytest.mark.parametrize("context_dim", [None, 40])
def test_attention_dropout_is_on_average_attention_without_it(drop, context_dim):
    context = None if context_dim is None else CONTEXT
    module = attention(context_dim, p=1.0, drop=drop, attn_drop=0.2)
    want, wanted = attention(context_dim, p=1.0, drop=drop)(X, context, return_stats=True)
    total = torch.zeros_like(want)
    for _ in range(400):
        out, stats = module(X, context, return_stats=True)
        assert torch.equal(stats.mask, wanted.mask)
        total += out.detach()
    spread = (out - want).std()
    assert (total / 400 - want).abs().mean() < 0.1 * spread
    module(X, context).sum().backward()
    assert torch.equal(module.eval()(X, context), attention(context_dim, p=0.0)(X, context))


def test_projection_dropout():
    module = attention(p=0.0, proj_drop=0.5)
    zeros = (module(X) == 0).float().mean()
    assert 0.4 < zeros < 0.6
    assert not (module.eval()(X) == 0).any()


def test_drop_path():
    block = JADBlock(48, 4, drop_path=1.0)
    assert torch.equal(block(X), X)
    block = JADBlock(48, 4, p=0.0, drop_path=0.5)
    torch.manual_seed(0)
    total = sum(block(X).detach() - X for _ in range(600)) / 600
    whole = block.eval()(X) - X
    assert F.cosine_similarity(total.flatten(), whole.flatten(), dim=0) > 0.98


# ---- the module as a module ----


def test_copies_draw_alike():
    module = attention(generator=generator(5))
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        module.generator.manual_seed(5)
        assert torch.equal(other(X), module(X))
    assert set(module.state_dict()) == {"qkv.weight", "qkv.bias", "proj.weight", "proj.bias"}


def test_bias_is_optional():
    module = attention(qkv_bias=False, proj_bias=False)
    assert set(module.state_dict()) == {"qkv.weight", "proj.weight"}
    cross = attention(40, qkv_bias=False)
    assert set(cross.state_dict()) == {"q.weight", "kv.weight", "proj.weight", "proj.bias"}


def test_cross_block():
    block = JADBlock(48, 4, context_dim=40, p=1.0, beta=0.3)
    out, stats = block(X, CONTEXT, return_stats=True)
    assert out.shape == X.shape and stats.mask.shape == (3, 4, 50)
    out.sum().backward()
    assert all(parameter.grad is not None for parameter in block.parameters())
    shifted = CONTEXT * 2 + 3  # its own norm takes that away
    torch.testing.assert_close(block.eval()(X, shifted), block(X, CONTEXT), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("p, training", [(0.5, True), (0.5, False), (1.0, True)])
def test_compile_fullgraph(p, training):
    torch._dynamo.reset()
    block = JADBlock(48, 4, p=p).train(training)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    out = compiled(X)
    out.sum().backward()
    if p != 0.5 or not training:  # what it draws under torch.compile is another sequence
        torch.testing.assert_close(out, block(X))


def test_autocast():
    module = attention(p=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(X)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert module.qkv.weight.grad.isfinite().all()


def test_repr_shows_what_it_does():
    text = repr(attention(p=0.3, drop="soft"))
    assert "num_heads=4, p=0.3, drop='soft', eval_mode='off', beta=1.0" in text


def test_schedule():
    assert drop_schedule(0.5, 1) == [0.5]
    assert drop_schedule(0.5, 3) == [0.5, 0.25, 0.0]
    assert drop_schedule(0.2, 2, last=0.2) == [0.2, 0.2]
    assert drop_schedule(0.0, 3, last=0.4) == [0.0, 0.2, 0.4]


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: JADAttention(48, 5), ValueError, "JADAttention: num_heads must divide dim = 48, got 5"),
        (lambda: JADAttention(48, 0), ValueError, "num_heads must divide"),
        (lambda: JADAttention(48, p=1.5), ValueError, r"p must lie in \[0, 1\], got 1.5"),
        (lambda: JADAttention(48, p=float("nan")), ValueError, "p must lie in"),
        (lambda: JADAttention(48, p="1"), TypeError, "p must be a number, got '1'"),
        (lambda: JADAttention(48, attn_drop=-0.1), ValueError, "attn_drop must lie in"),
        (
            lambda: JADAttention(48, drop="keys"),
            ValueError,
            "unknown drop 'keys': expected one of 'none'",
        ),
        (
            lambda: JADAttention(48, joint_over="batch"),
            ValueError,
            "unknown joint_over 'batch': expected one of 'query', 'head'",
        ),
        (lambda: JADAttention(48, eval_mode="maybe"), ValueError, "eval_mode must be 'off' or 'on'"),
        (lambda: JADAttention(48, drop="random", eval_mode="on"), ValueError, "draws at random"),
        (lambda: JADAttention(48)(X, CONTEXT), ValueError, r"expected no context, got \(3, 50, 40\)"),
        (lambda: JADAttention(48, context_dim=40)(X), ValueError, r"a context \(B, M, 40\), got none"),
        (
            lambda: JADAttention(48)(X[0]),
            ValueError,
            r"JADAttention: x must be \(B, N, 48\) with B = 30, got \(30, 48\)",
        ),
        (lambda: JADAttention(48)(CONTEXT), ValueError, r"x must be \(B, N, 48\) .* got \(3, 50, 40\)"),
        (
            lambda: JADAttention(48, context_dim=40)(X, CONTEXT[:2]),
            ValueError,
            r"context must be \(B, M, 40\) with B = 3, got \(2, 50, 40\)",
        ),
        (lambda: JADAttention(48, max_drop=1.0)(X), ValueError, r"max_drop must be in \[0, 1\)"),
        (lambda: JADBlock(48, 4, drop_path=2), ValueError, "JADBlock: drop_path must lie in"),
        (lambda: drop_schedule(0.5, 0), ValueError, "depth must be at least 1, got 0"),
        (lambda: drop_schedule(-1, 3), ValueError, "drop_schedule: p must lie in"),
        (lambda: drop_schedule(0.5, 3, last=2.0), ValueError, "last must lie in"),
    ],
)
def test_bad_arguments(call, error, words):
    with pytest.raises(error, match=words):
        call()

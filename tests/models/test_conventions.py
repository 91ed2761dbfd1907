"""What holds for every model of the package. `python tests/models/test_conventions.py` rewrites golden.json.

Models are made small by the options in SMALL where a model is large; everything is drawn from fixed seeds.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from timm.models._manipulate import adapt_input_conv
from timm.optim import param_groups_layer_decay, param_groups_weight_decay

import fer_models
from fer_kernels import available_backends
from fer_models import FEROutput, create_model

GOLDEN = Path(__file__).with_name("golden.json")

# Options that make a model small without leaving out a kind of layer. "large": only built on the meta device.
SMALL = {
    "vig_ti": {"depths": (2,)},
    "vig_s": "large",
    "vig_b": "large",
    "pvig_ti": {"depths": (1, 1, 1, 1)},
    "pvig_s": "large",
    "pvig_m": "large",
    "pvig_b": "large",
    "face2nodes_nano": {"depths": (2,)},
    "face2nodes_xs": {"depths": (2,)},
    "face2nodes_ti": {"depths": (2,)},
    "face2nodes_s": "large",
    "face2nodes_b": "large",
    "face2nodes_pyramid_ti": {"depths": (1, 1, 1, 1)},
}
ALL = fer_models.list_models()
MODELS = [name for name in ALL if SMALL.get(name) != "large"]
each = pytest.mark.parametrize("name", MODELS)

# Minutes of compilation for each model: one of each kind of layer.
COMPILED = [name for name in MODELS if name not in ("vig_ti", "face2nodes_xs", "face2nodes_ti", "pvig_ti")]


def small(name: str, seed: int = 0, **options) -> torch.nn.Module:
    torch.manual_seed(seed)
    defaults = SMALL.get(name, {})
    return create_model(name, **{"num_classes": 5, "drop_path_rate": 0.0, **defaults, **options})


def side(name: str) -> int:
    return 112 if "lnlattennet" in name or "emotion_gcn" in name or "jadfer" in name else 64


def images(name: str, batch: int = 2, size: int | None = None) -> torch.Tensor:
    size = size or side(name)
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def test_models_are_known_to_timm():
    assert sorted(ALL) == ALL and len(ALL) >= 13
    for name in ALL:
        assert timm.is_model(name)
    assert fer_models.list_models("pvig*") == ["pvig_b", "pvig_m", "pvig_s", "pvig_ti"]
    assert fer_models.list_models(pretrained=True) == [
        n for n in ALL if fer_models.registry.shipped_weights(n)
    ]


@pytest.mark.parametrize("first", ["import fer_models, timm", "import timm, fer_models"])
def test_timm_is_imported_by_those_who_want_it(first):
    code = (
        "import fer_models, sys; fer_models.create_model('face2nodes_nano')\n"
        "assert not {'timm', 'torchvision', 'torch._dynamo', 'matplotlib'} & set(sys.modules)\n"
        if first.startswith("import fer_models")
        else ""
    )
    code += f"{first}; assert timm.create_model('vig_ti', num_classes=3).num_classes == 3"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ALL)
def test_default_cfg_and_layer_groups(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    cfg = model.default_cfg
    with torch.device("meta"):
        ours = fer_models.create_model(name)
    assert ours.default_cfg == {key: value for key, value in cfg.items() if key in ours.default_cfg}
    assert ours.num_classes == model.num_classes
    assert cfg["architecture"] == name and cfg["num_classes"] == model.num_classes
    assert cfg["input_size"][0] == model.in_chans and cfg["input_size"][1] % model.stride == 0
    assert len(cfg["mean"]) == len(cfg["std"]) == 3 and cfg["interpolation"] and cfg["crop_pct"]
    modules = dict(model.named_modules())
    assert cfg["first_conv"] is None or cfg["first_conv"] in modules
    assert cfg["classifier"] is None or cfg["classifier"] in modules
    parameters = dict(model.named_parameters())
    assert model.no_weight_decay() <= set(parameters)
    for groups in (param_groups_weight_decay(model), param_groups_layer_decay(model)):
        assert sum(len(group["params"]) for group in groups) == len(parameters)
    assert {term.name for term in model.loss_terms()} and model.head_hidden_size == model.num_features


@each
def test_forward_and_backward(name):
    model = small(name, valence_arousal=True).train()
    x = images(name)
    output = model(x, full=True)
    assert isinstance(output, FEROutput)
    assert output.logits.shape == (2, 5) and output.valence_arousal.shape == (2, 2)
    assert output.embedding.shape == (2, model.num_features)
    assert all(
        isinstance(tensor, torch.Tensor)
        for value in output.aux.values()
        for tensor in (value if isinstance(value, list) else [value])
    )
    criterion = fer_models.losses.Criterion.for_model(model)
    targets = fer_models.losses.Targets(torch.tensor([0, 3]), None, torch.tensor([[0.1, 0.5], [-0.2, 0.0]]))
    total, parts = criterion(output, targets)
    assert total.isfinite() and parts
    total.backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@each
def test_eval_is_deterministic_and_per_sample(name):
    model = small(name).eval()
    x = images(name)
    with torch.no_grad():
        logits = model(x)
        assert torch.equal(logits, model(x))
        assert model(x[:1]).shape == (1, 5)
        torch.testing.assert_close(model(x[:1]), logits[:1], rtol=1e-4, atol=1e-4)
        assert model(x[:0]).shape == (0, 5)
        assert torch.equal(logits, model(x, full=True).logits)
        features = model.forward_features(x)
        torch.testing.assert_close(model.forward_head(features), logits)
        assert model.forward_head(features, pre_logits=True).shape == (2, model.num_features)
    model.train()
    with pytest.raises(ValueError, match="empty batch"):
        model(x[:0])


@each
def test_state_dict_round_trips(name, tmp_path):
    model, other = small(name).eval(), small(name, seed=7).eval()
    x = images(name)
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(model.state_dict(), path)
    with torch.no_grad():
        logits = model(x)
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(x), logits)
        loaded = small(name, seed=8, pretrained=path).eval()
        assert torch.equal(loaded(x), logits)
        path = tmp_path / "weights.pt"
        torch.save({"state_dict": {f"module.{n}": t for n, t in model.state_dict().items()}}, path)
        assert torch.equal(small(name, seed=9, pretrained=path).eval()(x), logits)
        assert torch.equal(copy.deepcopy(model)(x), logits)


@each
def test_classifier_can_be_reset(name):
    model = small(name).eval()
    x = images(name)
    with torch.no_grad():
        embedding = model(x, full=True).embedding
        model.reset_classifier(3)
        assert model(x).shape == (2, 3) and model.num_classes == 3
        assert any(p is q for p in model.get_classifier().parameters() for q in model.parameters())
        model.reset_classifier(0)
        torch.testing.assert_close(model(x), embedding)
    with pytest.raises(ValueError, match="num_classes must be at least 2"):
        model.reset_classifier(1)
    with pytest.raises(ValueError, match="num_classes must be at least 2"):
        create_model(name, num_classes=1)


@each
def test_bad_input_is_refused(name):
    model = small(name).eval()
    size = side(name)
    for shape, message in (
        ((3, size, size), "3-D"),
        ((1, 1, size, size), "1 channels"),
        ((1, 3, size, size + 1), "multiples of"),
        ((1, 3, 1, 1), "at least"),
    ):
        if message == "multiples of" and model.stride == 1:
            continue
        with pytest.raises(ValueError, match=f"{name}: input .*{message}"):
            model(torch.zeros(shape))
    with pytest.raises(TypeError, match="floating point"):
        model(torch.zeros(1, 3, size, size, dtype=torch.uint8))
    with pytest.raises(ValueError, match="unknown head 'round': expected one of 'linear', 'label_graph'"):
        create_model(name, head="round")
    with pytest.raises(ValueError, match="unknown backend 'abacus'"):
        create_model(name, backend="abacus")


@each
@pytest.mark.parametrize("size", [64, 112, 224])
def test_input_sizes(name, size):
    model = small(name).eval()
    if size < model.min_side or size % model.stride:
        with pytest.raises(ValueError, match=f"{name}: input is {size} x {size}"):
            model(images(name, 1, size))
        return
    with torch.no_grad():
        assert model(images(name, 1, size)).isfinite().all()


@each
def test_label_graph_head_and_other_channels(name):
    model = small(name, head="label_graph", in_chans=1, valence_arousal=True, num_classes=7).eval()
    with torch.no_grad():
        output = model(images(name)[:, :1], full=True)
    assert output.logits.shape == (2, 7) and output.valence_arousal.shape == (2, 2)


@each
def test_backends_agree(name):
    if "cpu" not in available_backends("relation"):
        pytest.skip("the CPU extension is not built")
    x, logits = images(name), {}
    for backend in ("reference", "cpu"):
        model = small(name, backend=backend).eval()
        with torch.no_grad():
            logits[backend] = model(x)
    torch.testing.assert_close(logits["cpu"], logits["reference"], rtol=1e-4, atol=1e-4)


@each
def test_autocast(name):
    model = small(name).train()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(images(name))
    assert logits.shape == (2, 5)
    logits.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@each
def test_gradient_checkpointing_changes_nothing(name):
    found = []
    for enable in (False, True):
        model = small(name, drop_rate=0.1).train()
        model.set_grad_checkpointing(enable)
        torch.manual_seed(3)
        model(images(name)).square().mean().backward()
        found.append((model.state_dict(), [p.grad for p in model.parameters()]))
    for first, second in zip(*found, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", COMPILED)
def test_compiles_whole(name):
    model = small(name).eval()
    x = images(name)
    torch._dynamo.reset()
    # aot_eager checks what a model can break, tracing and autograd; code generation is torch's to test.
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    # In float32 a ReLU or a maximum that rounding moves across a tie changes gradients by a thousandth.
    model, x = model.double().train(), x.double()
    state = copy.deepcopy(model.state_dict())
    gradients = []
    for run in (model, compiled):
        model.load_state_dict(state)
        model.zero_grad()
        torch.manual_seed(3)
        run(x).square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    scale = max(g.abs().max() for g in gradients[0]).item()
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-6, atol=1e-8 * scale)


@pytest.mark.parametrize("name", MODELS)
def test_exports(name):
    model = small(name).eval()
    x = images(name)
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(model, (x,), dynamic_shapes={"x": {0: batch}})
    with torch.no_grad():
        three = images(name, 3)
        torch.testing.assert_close(exported.module()(three), model(three), rtol=1e-4, atol=1e-4)


def golden_names() -> list[str]:
    return [name for name in MODELS if not name.startswith(("vig", "pvig", "face2nodes_ti"))] + ["vig_ti"]


def golden_logits(name: str) -> list[list[float]]:
    # Statistics of a few batches: with those of initialisation, logits explode with depth.
    model, x = small(name).train(), images(name, 4)
    with torch.no_grad():
        for _ in range(3):
            model(x)
        return model.eval()(x[:2]).tolist()


@pytest.mark.parametrize("name", golden_names())
def test_logits_are_what_they_were(name):
    golden = json.loads(GOLDEN.read_text())
    expected = torch.tensor(golden[name])
    # Rounding differs between processors and thread counts; a change of the model is far larger.
    bound = 1e-3 * max(1.0, expected.abs().max().item())
    torch.testing.assert_close(torch.tensor(golden_logits(name)), expected, rtol=0, atol=bound)


def test_errors_of_create_model(tmp_path):
    with pytest.raises(ValueError, match=r"unknown model 'vig_tiny': did you mean .*'vig_ti'"):
        create_model("vig_tiny")
    with pytest.raises(ValueError, match="no weights with the tag 'ferplus' are shipped for vig_ti"):
        create_model("vig_ti", pretrained="ferplus")
    with pytest.raises(ValueError, match="no weights are shipped for vig_ti"):
        create_model("vig_ti", pretrained=True)
    with pytest.raises(FileNotFoundError, match="no file"):
        create_model("vig_ti", pretrained=tmp_path / "none.safetensors", depths=(1,))
    path = tmp_path / "other.safetensors"
    safetensors.torch.save_file(small("face2nodes_nano").state_dict(), path)
    with pytest.raises(ValueError, match=r"not a state dict of this model: .*missing .*unexpected .*shape"):
        create_model("vig_ti", pretrained=path, depths=(3,))
    with pytest.raises(ValueError, match=r"head\.fc\.weight: \(5, 256\), expected \(8, 256\)"):
        create_model("face2nodes_nano", pretrained=path, depths=(2,))
    other = create_model("face2nodes_nano", pretrained=path, depths=(2,), num_classes=3)
    assert other.head.fc.weight.shape[0] == 3
    path = tmp_path / "pickled.pt"
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="nor a state dict"):
        create_model("vig_ti", pretrained=path, depths=(1,))
    path.write_bytes(b"hello")
    with pytest.raises(ValueError, match=r"read_state_dict: .*pickled.pt is damaged"):
        create_model("vig_ti", pretrained=path, depths=(1,))


@pytest.mark.parametrize("name", ["face2nodes_nano", "lnlattennet_xs", "jadfer_xs"])
def test_weights_for_other_classes_channels_and_sizes(name, tmp_path):
    options = {"cls_weight": 0.5} if name.startswith("jadfer") else {}
    model, path = small(name, **options), tmp_path / "weights.safetensors"
    safetensors.torch.save_file(model.state_dict(), path)
    other = small(name, seed=8, pretrained=path, num_classes=3, in_chans=1, **options).eval()
    larger = small(name, seed=8, pretrained=path, img_size=96, **options).eval()
    with torch.no_grad():
        assert other(images(name)[:, :1]).shape == (2, 3) and larger(images(name, size=96)).shape[0] == 2
    own, there = model.state_dict(), other.state_dict()
    first = model.default_cfg["first_conv"] + ".weight"
    assert torch.equal(there[first], adapt_input_conv(1, own[first]))
    kept = [key for key in own if not key.startswith(model.head_prefixes) and key != first]
    assert len(kept) > 20 and all(torch.equal(own[key], there[key]) for key in kept)


@pytest.mark.parametrize("channels", [1, 2, 4, 6])
def test_first_convolutions_are_adapted_as_timm_does(channels):
    weight = torch.randn(4, 3, 3, 3)
    expected = adapt_input_conv(channels, weight.clone())
    torch.testing.assert_close(fer_models.registry._for_channels(weight, channels), expected)


if __name__ == "__main__":
    logits = {name: golden_logits(name) for name in golden_names()}
    GOLDEN.write_text(json.dumps(logits, indent=1) + "\n")
    print(f"{len(logits)} models to {GOLDEN}", file=sys.stderr)

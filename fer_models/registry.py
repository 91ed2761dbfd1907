"""Models by name: registered with timm, and created with clear errors; weights are never unpickled."""

from __future__ import annotations

import difflib
import fnmatch
import importlib.util
import inspect
import logging
import os
import re
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

_logger = logging.getLogger(__name__)

WEIGHTS = Path(__file__).parent / "weights"  # <name>.<tag>.safetensors
TIMM_DEFAULTS: dict[str, Any] = {  # what timm adds to a default_cfg
    "custom_load": False,
    "fixed_input_size": False,
    "crop_mode": "center",
    "pool_size": None,
}
HEAD_OPTIONS = ("num_classes", "head", "head_options", "valence_arousal")
_FILES = (".safetensors", ".pt", ".pth")
_SHOWN = 10  # names of a mismatch that an error lists

StateDict = dict[str, Tensor]


Maker = TypeVar("Maker", bound=Callable[..., nn.Module])
_makers: dict[str, Callable[..., Any]] = {}


def register_model(maker: Maker) -> Maker:
    """Makes a function known as the model of its name, here and to timm."""
    _makers[maker.__name__] = maker
    if "timm.models" in sys.modules:
        _tell_timm([maker])
    return maker


def _tell_timm(makers: list[Callable[..., Any]]) -> None:
    from timm.models import generate_default_cfgs, register_model

    for maker in makers:
        module: Any = sys.modules[maker.__module__]
        if not hasattr(module, "timm_cfgs"):
            module.timm_cfgs = generate_default_cfgs(module.default_cfgs)
        # timm reads the attribute of this name, and adds to __all__
        plain, module.default_cfgs = module.default_cfgs, module.timm_cfgs
        register_model(maker)
        module.default_cfgs = plain


class _WhenTimmComes(MetaPathFinder):
    """Makes the models known to timm when someone imports it.

    We do not: it takes longer to import than torch, and most of what is done with a model does without.
    """

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != "timm":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec("timm")
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_tell(module: Any) -> None:
                run(module)
                _tell_timm(list(_makers.values()))

            spec.loader.exec_module = run_and_tell  # type: ignore[method-assign]
        return spec


if "timm.models" not in sys.modules:
    sys.meta_path.insert(0, _WhenTimmComes())


def cfg(**changes: Any) -> dict[str, Any]:
    """A default_cfg: how the model's input is made, and which layers timm adapts."""
    return {
        "num_classes": 8,
        "input_size": (3, 224, 224),
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "crop_pct": 1.0,  # faces are cropped already
        "interpolation": "bilinear",
        "classifier": "head.fc",
        "license": "apache-2.0",
        **changes,
    }


def default_cfgs(cfgs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """These, and for every shipped file of weights one more, with its tag."""
    tagged: dict[str, Any] = {}
    for name, values in cfgs.items():
        tagged[name] = values
        for tag, path in shipped_weights(name).items():
            tagged[f"{name}.{tag}"] = {**values, "file": str(path)}
    return tagged


def build(
    model_class: type[nn.Module],
    name: str,
    pretrained: bool,
    *,
    filter_fn: Callable[[StateDict, nn.Module], StateDict] | None = None,
    feature_cfg: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    """What every registered function returns; timm's `build_model_with_cfg` of this class where timm asks."""
    if kwargs.get("features_only") and not hasattr(model_class, "forward_intermediates"):
        raise ValueError(f"{name} has no stages for features_only; `forward_features` gives its last map")
    if pretrained or kwargs.get("features_only") or "pretrained_cfg" in kwargs:
        from timm.models import build_model_with_cfg

        return build_model_with_cfg(
            model_class,
            name,
            pretrained,
            pretrained_filter_fn=filter_fn,
            feature_cfg=dict(feature_cfg or {}),
            **kwargs,
        )
    default: dict[str, Any] = sys.modules[model_class.__module__].default_cfgs[name]
    kwargs.setdefault("num_classes", default["num_classes"])
    model: Any = model_class(**kwargs)
    model.default_cfg = model.pretrained_cfg = {**TIMM_DEFAULTS, **default, "architecture": name}
    return model


def list_models(filter: str = "", pretrained: bool = False) -> list[str]:
    """Names of the models of this package that match `filter` (* and ? as in a shell), sorted.

    pretrained=True lists only those with weights.
    """
    ours = [name for name in sorted(_makers) if not filter or fnmatch.fnmatch(name, filter)]
    return [name for name in ours if not pretrained or shipped_weights(name)]


def create_model(name: str, pretrained: bool | str | os.PathLike = False, **kwargs: Any) -> Any:
    """The model of this name in `list_models()`; kwargs are its options.

    Args:
        pretrained: False; True for the model's first shipped weights; the tag of shipped weights, such as
            "ferplus"; or the path of a .safetensors, .pt or .pth file with a state dict (the latter two are
            read with weights_only=True). What does not fit is an error. The head alone may be another one
            than the file's, where one of num_classes, head, head_options and valence_arousal is given.
            Of a checkpoint of `fer train` the options it was made with are the defaults.
    """
    if name not in (known := list_models()):
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known are {', '.join(known)}"
        raise ValueError(f"create_model: unknown model {name!r}: {hint}")
    features_only = kwargs.pop("features_only", False)
    if pretrained is False or pretrained is None:
        return _make(name, {**kwargs, "features_only": True} if features_only else kwargs)
    path = _weights_path(name, pretrained)
    if features_only:
        raise ValueError(
            f"create_model: features_only=True takes no pretrained weights here; "
            f"use timm.create_model({name!r}, pretrained=True, features_only=True) with shipped weights"
        )
    other_head = any(option in kwargs for option in HEAD_OPTIONS)
    model = _make(name, with_options_of(name, path, kwargs))
    load_weights(model, path, other_head=other_head)
    return model


def with_options_of(name: str, pretrained: str | os.PathLike, options: dict[str, Any]) -> dict[str, Any]:
    """`options`, and below them what a checkpoint of `fer train` says that its model was made with."""
    from .train.checkpoint import made_with, read_about

    path = _weights_path(name, pretrained)
    if path.suffix != ".safetensors" or not path.is_file():
        return options
    about = read_about(path)
    if about.get("model") != name:
        return options
    there = made_with(about)
    if options.get("num_classes") not in (None, there.get("num_classes")):
        there.pop("head_options", None)  # a graph of other labels
    return {**there, **options}


def _make(name: str, options: dict[str, Any]) -> Any:
    # As with timm, None is what an option is where it is not given
    given = {option: value for option, value in options.items() if value is not None}
    try:
        return _makers[name](**given)
    except TypeError as error:
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unknown is None or unknown[1] not in given:
            raise
        known = _options_of(name)
        near = difflib.get_close_matches(unknown[1], known, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(known)}"
        raise TypeError(f"create_model: {name} has no option {unknown[1]!r}{hint}") from None


def _options_of(name: str) -> list[str]:
    with torch.device("meta"):
        kind = type(_makers[name]())
    found = (
        parameter.name
        for part in kind.__mro__
        if issubclass(part, nn.Module) and part is not nn.Module
        for parameter in list(inspect.signature(part.__init__).parameters.values())[1:]
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    )
    return sorted(set(found))


def shipped_weights(name: str) -> dict[str, Path]:
    """Tag -> file of the weights of this model that come with the package."""
    return {path.name.split(".")[1]: path for path in sorted(WEIGHTS.glob(f"{name}.*.safetensors"))}


def load_weights(model: nn.Module, path: str | os.PathLike, *, other_head: bool = False) -> None:
    """Load a state dict from a file into a model of this package.

    A file of the published original (ViG's) is translated. `other_head`: the file's head may be another one
    than the model's; the model's then stays as it is.
    """
    state = read_state_dict(path)
    module: Any = sys.modules[type(model).__module__]
    translate = getattr(module, "checkpoint_filter_fn", None)
    if translate is not None:
        state = translate(state, model)
    own = model.state_dict()
    first_conv = getattr(model, "default_cfg", {}).get("first_conv")
    weight = f"{first_conv}.weight"
    if first_conv and weight in state and state[weight].shape[1] != own[weight].shape[1]:
        state[weight] = _for_channels(state[weight], own[weight].shape[1])
    head = getattr(model, "head_prefixes", ("head.",))
    if other_head and not _fits(own, state, head):
        _logger.warning(
            "%s: loaded %s but for its head, which is another one: the model's own head is untrained",
            _name(model),
            path,
        )
        state = {name: tensor for name, tensor in state.items() if not name.startswith(head)}
        state |= {name: tensor for name, tensor in own.items() if name.startswith(head)}
    problems = _mismatch(own, state)
    if problems:
        raise ValueError(f"{_name(model)}: {path} is not a state dict of this model: {problems}")
    model.load_state_dict(state)


def read_state_dict(path: str | os.PathLike) -> StateDict:
    """The state dict of a .safetensors, .pt or .pth file, on the CPU; nothing is ever unpickled."""
    path = Path(path)
    if path.suffix not in _FILES:
        raise ValueError(f"read_state_dict: {path} must be one of {', '.join(_FILES)}")
    if not path.is_file():
        raise FileNotFoundError(f"read_state_dict: no file {path}")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    from .train.checkpoint import CheckpointError, load_state

    try:
        state: Any = load_state(path)
    except CheckpointError as error:
        raise ValueError(f"read_state_dict: {error}") from None
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"read_state_dict: {path} holds no state dict")
    # What DDP and torch.compile put before the names.
    return {name.removeprefix("module.").removeprefix("_orig_mod."): value for name, value in state.items()}


def _weights_path(name: str, pretrained: bool | str | os.PathLike) -> Path:
    if not isinstance(pretrained, (bool, str, os.PathLike)):
        raise TypeError(f"create_model: pretrained must be a bool, a tag or a path, got {pretrained!r}")
    if not isinstance(pretrained, bool):
        text = os.fspath(pretrained)
        if text.endswith(_FILES) or os.sep in text:
            return Path(text)
    tags = shipped_weights(name)
    if tags and pretrained is True:
        return next(iter(tags.values()))
    if pretrained in tags:
        return tags[str(pretrained)]
    wanted = "no weights are" if pretrained is True else f"no weights with the tag {pretrained!r} are"
    having = ", ".join(list_models(pretrained=True)) or "no model"
    known = f"known tags: {', '.join(tags)}" if tags else f"there are some of {having}"
    raise ValueError(
        f"create_model: {wanted} shipped for {name} ({known}); "
        "pass the path of a state dict, or pretrained=False"
    )


def _name(model: nn.Module) -> str:
    return getattr(model, "name", type(model).__name__)


def _for_channels(weight: Tensor, channels: int) -> Tensor:
    """A first convolution for images of other channels: summed for gray, else repeated at equal strength."""
    had = weight.shape[1]
    if channels == 1:
        return weight.sum(1, keepdim=True)
    return weight.repeat(1, -(-channels // had), 1, 1)[:, :channels] * (had / channels)


def _fits(own: StateDict, state: StateDict, prefix: tuple[str, ...]) -> bool:
    shapes = [{n: t.shape for n, t in tensors.items() if n.startswith(prefix)} for tensors in (own, state)]
    return shapes[0] == shapes[1]


def _mismatch(own: StateDict, state: StateDict) -> str:
    shapes = [
        f"{name}: {tuple(state[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in state and state[name].shape != tensor.shape
    ]
    found = {
        "missing": [name for name in own if name not in state],
        "unexpected": [name for name in state if name not in own],
        "of another shape": shapes,
    }
    return "; ".join(
        f"{len(names)} {what} ({', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''})"
        for what, names in found.items()
        if names
    )

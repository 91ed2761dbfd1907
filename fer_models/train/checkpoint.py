"""Files that survive: written to a temporary name, flushed to the disk, renamed; never unpickled.

Weights are safetensors whose metadata says which model they are of; what a run needs to go on (optimizer,
position) is a .pt file of plain tensors and numbers, read with weights_only.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

METADATA_KEY = "fer_models"
BEST = "best.safetensors"  # of a run folder
# Options that name weights to start a part from: a checkpoint holds that part's own
OF_THE_START = ("backbone_weights", "encoder_weights")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read or written, said in one line."""


def write_atomically(path: str | Path, write: Callable[[Path], None]) -> None:
    """`write` to a temporary file beside `path`, then rename: at any moment `path` is old or new, whole."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename itself
        finally:
            os.close(folder)
    except (OSError, RuntimeError) as error:
        # torch.save reports a full disk as a RuntimeError
        raise CheckpointError(
            f"cannot write {path}: {str(error).splitlines()[0]}; what was there is intact"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(path: str | Path, model: nn.Module, about: dict[str, Any], *, half: bool = False) -> None:
    """Weights as safetensors.

    Args:
        about: JSON's types; must have "model" and "options", what `create_model` takes; also by custom
            "classes", "size", "metrics".
        half: floating-point weights as float16.
    """
    state = {}
    for name, tensor in model.state_dict().items():
        narrow = half and tensor.is_floating_point()
        state[name] = (
            tensor.detach().to("cpu", torch.float16 if narrow else tensor.dtype).contiguous().clone()
        )
    data = save(state, {METADATA_KEY: json.dumps(about)})
    write_atomically(path, lambda to: _write_bytes(to, data))


def read_about(path: str | Path) -> dict[str, Any]:
    """What `save_checkpoint` was told about the model; empty for weights of another origin."""
    with _opened(path) as file:
        metadata = file.metadata() or {}
    try:
        return json.loads(metadata.get(METADATA_KEY, "{}"))
    except json.JSONDecodeError:
        raise CheckpointError(f"{path}: its metadata is damaged") from None


def made_with(about: dict[str, Any]) -> dict[str, Any]:
    """The options to make the model with that a checkpoint is of."""
    return {name: value for name, value in about.get("options", {}).items() if name not in OF_THE_START}


def load_checkpoint(path: str | Path) -> tuple[nn.Module, dict[str, Any]]:
    """The model that a file of `save_checkpoint` holds, in evaluation mode, and what is known about it."""
    from ..registry import create_model

    about = read_about(path)
    if "model" not in about:
        raise CheckpointError(
            f"{path} does not say which model it is of; use create_model(NAME, pretrained={str(path)!r})"
        )
    model = create_any(create_model, about["model"], made_with(about))
    with _opened(path) as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
    own = model.state_dict()
    wrong = [n for n in own if n not in state or state[n].shape != own[n].shape] + [
        n for n in state if n not in own
    ]
    if wrong:
        raise CheckpointError(
            f"{path}: its tensors are not those of {about['model']}: {', '.join(wrong[:10])}"
        )
    model.load_state_dict({name: tensor.to(own[name].dtype) for name, tensor in state.items()})
    return model.eval(), about


def create_any(create: Callable[..., nn.Module], name: str, options: dict[str, Any]) -> nn.Module:
    """One of our models, or timm's by the name timm/NAME: peers are trained by the same engine."""
    if name.startswith("timm/"):
        import timm

        return timm.create_model(name.removeprefix("timm/"), **options)
    return create(name, **options)


def save_state(path: str | Path, state: dict[str, Any]) -> None:
    """Tensors, numbers, text, lists and dicts of them."""
    write_atomically(path, lambda to: torch.save(state, to))


def load_state(path: str | Path) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"no checkpoint {path}") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0][:100]
        raise CheckpointError(
            f"{path} is damaged or holds more than tensors and numbers, and is not loaded: {why}"
        ) from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} is not a checkpoint, nor a state dict")
    return state


def _write_bytes(to: Path, data: bytes) -> None:
    with open(to, "wb") as file:
        file.write(data)


def _opened(path: str | Path) -> Any:
    if not Path(path).is_file():
        raise CheckpointError(f"no checkpoint {path}")
    try:
        return safe_open(str(path), "pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a readable safetensors file, as a run folder's best.safetensors is: {error}"
        ) from None

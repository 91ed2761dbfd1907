"""Argument checks: every message names the function, the argument, what came and what was expected."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What is computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def shape(tensor: torch.Tensor) -> str:
    return str(tuple(tensor.shape))


def positive_int(function: str, name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{function}: {name} must be an int, got {value!r} ({type(value).__name__})")
    if value < 1:
        raise ValueError(f"{function}: {name} must be at least 1, got {value}")


def a_bool(function: str, name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{function}: {name} must be a bool, got {value!r} ({type(value).__name__})")


def a_choice(function: str, name: str, value: Any, choices: Collection[Any]) -> None:
    if value not in choices:
        raise ValueError(
            f"{function}: unknown {name} {value!r}: expected one of {', '.join(map(repr, choices))}"
        )


def not_negative(function: str, name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
        raise ValueError(f"{function}: {name} must be a number of at least 0, got {value!r}")


def floating_nodes(function: str, name: str, tensor: Any) -> None:
    """A dense floating (B, nodes, C) tensor."""
    dense_tensor(function, name, tensor)
    if tensor.dtype not in FLOATING:
        raise TypeError(
            f"{function}: {name} must be float32, float64, bfloat16 or float16, got {tensor.dtype}"
        )
    if tensor.dim() != 3:
        raise ValueError(f"{function}: {name} must be (B, nodes, C), got {tensor.dim()}-D {shape(tensor)}")


def dense_tensor(function: str, name: str, tensor: Any) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{function}: {name} must be a tensor, got {type(tensor).__name__}")
    if tensor.is_nested:
        raise TypeError(f"{function}: {name} must be a dense tensor, got a nested one")
    if tensor.layout != torch.strided:
        raise TypeError(f"{function}: {name} must be a dense tensor, got layout {tensor.layout}")


def same_device(function: str, name: str, tensor: torch.Tensor, other: str, like: torch.Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(
            f"{function}: {name} is on {tensor.device} and {other} on {like.device}; expected one device"
        )

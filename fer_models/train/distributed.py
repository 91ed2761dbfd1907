"""The little that differs between one process and many (torchrun)."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist


class World(NamedTuple):
    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0


class Launch(NamedTuple):
    """What torchrun says of this process; one process alone has rank 0 of 1."""

    rank: int
    size: int
    local_rank: int


def launched() -> Launch:
    return Launch(
        int(os.environ.get("RANK", "0")),
        int(os.environ.get("WORLD_SIZE", "1")),
        int(os.environ.get("LOCAL_RANK", "0")),
    )


@contextlib.contextmanager
def joined(device: str = "auto") -> Iterator[World]:
    """This process's place. Under torchrun it joins the group (nccl on GPUs, else gloo) and leaves it."""
    rank, size, local = launched()
    place = pick_device(device, local)
    if size == 1 or dist.is_initialized():
        yield World(rank if size > 1 else 0, size, place)
        return
    if place.type == "cuda":
        torch.cuda.set_device(place)
    dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
    try:
        yield World(rank, size, place)
    finally:
        dist.destroy_process_group()


def pick_device(device: str, local_rank: int = 0) -> torch.device:
    if device == "auto":
        device = f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(device)
    except RuntimeError:
        raise ValueError(f"unknown device {device!r}: expected auto, cpu, cuda or cuda:N") from None
    if place.type not in ("cpu", "cuda"):
        raise ValueError(f"device {device!r}: this package runs on cpu, cuda or cuda:N")
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device!r} was asked for, and torch finds no CUDA device")
    if place.type == "cuda" and place.index is None:
        place = torch.device("cuda", local_rank)
    return place


def gathered(value: Any, world: World) -> list[Any]:
    """Every process's value, in the order of ranks, on all of them."""
    if world.size == 1:
        return [value]
    parts: list[Any] = [None] * world.size
    dist.all_gather_object(parts, value)
    return parts


def wait(world: World) -> None:
    if world.size > 1:
        dist.barrier()


def leave(status: int) -> NoReturn:
    """Ends this process. One of torchrun's goes without the interpreter's teardown: DDP keeps gloo's threads
    alive beyond destroy_process_group (torch 2.15), and a finished run once hung there."""
    if launched().size > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)

"""Declaring operators with several backends, and choosing among them.

One operator becomes up to three registered torch operators with the same schema, fake kernel and
autograd formula:

* ``fer_kernels::NAME``: compiled code on CPU and CUDA, the reference wherever there is none;
* ``fer_kernels::NAME_reference``: the reference, always;
* ``fer_kernels::NAME_triton``: the Triton kernels.

So `torch.ops.fer_kernels.NAME` works, differentiates and compiles with no compiled module at all.
The public function picks the registered operator; ``not_supported_reasons`` is the one predicate
that both chooses a backend and explains a refusal.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from . import extension

BACKENDS = ("reference", "cpu", "triton", "cuda")

# Which kernels have passed the whole test suite on which real GPU, and when. `auto` never picks a
# GPU kernel that is not listed here; asking for it by name always works.
PROVED_ON: dict[tuple[str, str], str] = {}

# Read once: under TRITON_INTERPRET=1 Triton itself decides at import whether it interprets.
TRITON_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None

# Pays a host synchronisation on a GPU to check values (indices, ranks) before a kernel sees them.
CHECK_VALUES = os.environ.get("FER_KERNELS_CHECK", "0") == "1"

_LIBRARY = torch.library.Library("fer_kernels", "DEF")


class BackendError(RuntimeError):
    """The backend that was asked for cannot take a call."""


class _Requested(threading.local):  # torch.compile guards on these; on a ContextVar only from 2.15
    def __init__(self) -> None:  # a class attribute would hide a later change from those guards
        self.backend = os.environ.get("FER_KERNELS_BACKEND") or "auto"


_requested = _Requested()


@dataclass(frozen=True)
class Operator:
    """An operator and, for each backend, the input dtypes it takes and why this machine cannot run it."""

    name: str
    dtypes: dict[str, tuple[torch.dtype, ...]]
    problems: dict[str, str] = field(default_factory=dict)  # backend -> what no other operator needs
    registered: dict[str, Any] = field(default_factory=dict)  # backend -> torch.ops overload

    def not_supported_reasons(self, backend: str, *tensors: torch.Tensor | None) -> list[str]:
        """Every reason why `backend` cannot take a call on these tensors; empty where it can."""
        if backend not in self.dtypes:
            return [f"there is no such kernel, only {', '.join(self.dtypes)}"]
        reasons = self.platform_problems(backend)
        device = next(t.device.type for t in tensors if t is not None)
        if backend == "cpu" and device != "cpu":
            reasons.append(f"it takes CPU tensors and these are on {device}")
        if backend == "cuda" and device != "cuda":
            reasons.append(f"it takes CUDA tensors and these are on {device}")
        if backend == "triton" and device != "cuda" and not TRITON_INTERPRETED:
            reasons.append(
                f"it takes CUDA tensors (or any under TRITON_INTERPRET=1) and these are on {device}"
            )
        dtype = next(t.dtype for t in tensors if t is not None)
        if dtype not in self.dtypes[backend]:
            reasons.append(
                f"it takes {', '.join(map(_short, self.dtypes[backend]))} and the input is {_short(dtype)}"
            )
        return reasons

    def choose(self, backend: str, *tensors: torch.Tensor | None, among: dict[str, Any] | None = None) -> Any:
        """The registered operator for this call: the fastest that takes it, or the one asked for.

        `among` is what `define` returned for another schema of this operator.
        """
        origin = "backend"
        registered = self.registered if among is None else among
        if backend == "auto":
            backend, origin = _requested.backend, "use_backend or FER_KERNELS_BACKEND"
        if backend == "auto":
            for candidate in ("cpu", "cuda", "triton"):
                proved = candidate == "cpu" or (self.name, candidate) in PROVED_ON
                # Triton's interpreter is for tests: slower than the reference.
                interpreted = candidate == "triton" and TRITON_INTERPRETED
                if proved and not interpreted and not self.not_supported_reasons(candidate, *tensors):
                    return registered[candidate]
            return registered["reference"]
        check_backend_name(backend, origin)
        reasons = self.not_supported_reasons(backend, *tensors)
        if reasons:
            raise BackendError(
                f"{self.name}: backend {backend!r} cannot take this call: " + "; ".join(reasons)
            )
        return registered[backend]

    def platform_problems(self, backend: str) -> list[str]:
        """Why this backend is missing from this installation, whatever the call."""
        problem = None
        if backend == "cpu":
            problem = extension.cpu.problem
        elif backend == "cuda":
            problem = extension.cuda.problem
        elif backend == "triton" and not TRITON_INSTALLED:
            problem = "triton is not installed"
        problem = problem or self.problems.get(backend)
        return [problem] if problem else []

    def missing_reasons(self, backend: str) -> list[str]:
        """Why no call at all can run on this backend here; may query the CUDA driver."""
        reasons = self.platform_problems(backend)
        needs_gpu = backend == "cuda" or (backend == "triton" and not TRITON_INTERPRETED)
        if needs_gpu and not torch.cuda.is_available():
            reasons.append("there is no CUDA device")
        return reasons

    def has_kernel(self, *tensors: torch.Tensor | None) -> bool:
        """Whether `choose("auto", ...)` takes a kernel. For modules that go without the operator otherwise:
        torch's own functions are faster than the reference. So no error where the one asked for cannot."""
        requested = _requested.backend
        if requested == "auto":
            return self.choose("auto", *tensors) is not self.registered["reference"]
        return requested != "reference" and not self.not_supported_reasons(requested, *tensors)


OPERATORS: dict[str, Operator] = {}


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_backend_name(backend: str, origin: str) -> None:
    if backend not in BACKENDS:
        known = ", ".join(map(repr, BACKENDS))
        raise ValueError(f"{origin}: unknown backend {backend!r}: expected 'auto' or one of {known}")


@contextlib.contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Within the block, every operator that this thread calls with ``backend="auto"`` runs on this backend.

    ``"auto"`` restores the free choice. An operator that the backend cannot run raises and says why.
    The choice belongs to the thread, so leave the block before an ``await`` or a ``yield``.
    The process-wide default is the environment variable FER_KERNELS_BACKEND, read at import.
    """
    if backend != "auto":
        check_backend_name(backend, "use_backend")
    before = _requested.backend
    _requested.backend = backend
    try:
        yield
    finally:
        _requested.backend = before


def available_backends(op: str) -> list[str]:
    """The backends of operator `op` that can run on this machine, reference first.

    >>> fer_kernels.available_backends("knn")
    ['reference', 'cpu']
    """
    if op not in OPERATORS:
        raise ValueError(f"available_backends: unknown operator {op!r}: expected one of {sorted(OPERATORS)}")
    operator = OPERATORS[op]
    return [backend for backend in operator.dtypes if not operator.missing_reasons(backend)]


def define(
    operator: Operator,
    schema: str,
    *,
    suffix: str = "",
    fake: Callable[..., Any],
    reference: Callable[..., Any],
    triton: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> dict[str, Any]:
    """Registers one schema of `operator` for all its backends; returns backend -> torch operator.

    `suffix` names a second schema of the same operator ("_backward"). `backward`, where given, is
    called as backward(backend, ctx, *gradients), so that it can stay on the backend of the forward.
    """
    overloads = {}
    implementations = {"": reference, "_reference": reference} | ({"_triton": triton} if triton else {})
    for variant, implementation in implementations.items():
        name = f"{operator.name}{suffix}{variant}"
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fer_kernels::{name}", fake, lib=_LIBRARY)
        backend = variant[1:] or "compiled"
        overload = getattr(torch.ops.fer_kernels, name).default
        if backward is not None and setup_context is not None:
            kernel = _differentiable(overload, functools.partial(backward, backend), setup_context)
            _LIBRARY.impl(name, kernel, "Autograd", with_keyset=True)
        overloads[backend] = overload
    compiled = overloads.pop("compiled")
    overloads |= {backend: compiled for backend in ("cpu", "cuda") if backend in operator.dtypes}
    if not suffix:
        operator.registered.update(overloads)
        OPERATORS[operator.name] = operator
    return overloads


def _differentiable(
    overload: Any, backward: Callable[..., tuple], setup_context: Callable[..., None]
) -> Callable[..., Any]:
    """The operator's kernel for autograd. As torch.library.register_autograd would make it, but that fills in
    defaults, of which our schemas have none, and looks through the schema for them in every call, which takes
    as long as a small kernel."""

    def below(keyset: Any, args: tuple) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return overload.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    def forward(ctx: Any, *args: Any) -> Any:
        *inputs, keyset = args
        output = below(keyset, tuple(inputs))
        setup_context(ctx, tuple(inputs), output)
        return output

    def derive(ctx: Any, *gradients: Any) -> tuple:
        needs = ctx.needs_input_grad
        ctx.needs_input_grad = needs[:-1]  # without the keyset
        try:
            return (*backward(ctx, *gradients), None)
        finally:
            ctx.needs_input_grad = needs  # a graph that is kept comes here again

    members = {"forward": staticmethod(forward), "backward": staticmethod(derive)}
    function: Any = type(overload._opname, (torch.autograd.Function,), members)

    def kernel(keyset: Any, *args: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in args):
            return function.apply(*args, keyset)
        return below(keyset, args)

    return kernel


def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Autocast reaches into operators, and would turn float32 products into bfloat16 ones."""

    @functools.wraps(function)
    def call(first: torch.Tensor, *rest: Any) -> Any:
        with torch.autocast(first.device.type, enabled=False):
            return function(first, *rest)

    return call


def differentiated(
    formula: Callable[..., Any],
    inputs: Sequence[Any],
    by: Sequence[int],
    gradients: Sequence[torch.Tensor | None],
) -> tuple[torch.Tensor | None, ...]:
    """One gradient for each of `inputs`: of formula(*inputs), in plain PyTorch, by those at positions `by`
    that are tensors, and None for the others. Second derivatives of every backend are made of this.

    The formula must compute from the inputs `by` whatever else is a function of them.
    """
    fresh, wanted = list(inputs), [i for i in by if inputs[i] is not None]
    with torch.enable_grad():
        for i in wanted:
            fresh[i] = fresh[i].detach().requires_grad_()
        used = [
            (out, g)
            for out, g in zip(formula(*fresh), gradients, strict=True)
            if g is not None and out.requires_grad
        ]
        found = torch.autograd.grad(
            [out for out, _ in used], [fresh[i] for i in wanted], [g for _, g in used], allow_unused=True
        )
    result: list[torch.Tensor | None] = [None] * len(fresh)
    for i, gradient in zip(wanted, found, strict=True):
        result[i] = gradient
    return tuple(result)

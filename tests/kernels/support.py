"""Where the kernel tests run."""

import fer_kernels
from fer_kernels import dispatch


def backends(op: str) -> list[str]:
    return fer_kernels.available_backends(op)


def device_of(backend: str) -> str:
    """Where a backend's tests put their tensors."""
    if backend == "cuda" or (backend == "triton" and not dispatch.TRITON_INTERPRETED):
        return "cuda"
    return "cpu"

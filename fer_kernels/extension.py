"""The compiled modules: which are loaded, and the exact reason for one that is not.

"Not built", "built but does not load" and "built, but this torch has no CUDA" are three different
findings with three different remedies, so each keeps its own words.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch


@dataclass(frozen=True)
class Extension:
    module: ModuleType | None
    problem: str | None  # None exactly when the module is loaded


def _built_folder() -> Path | None:
    """Where the compiled modules lie: beside this file, or in the installed package.

    The second is for a Python started in a source checkout, whose fer_kernels/ folder comes before
    the installed package and holds no compiled module.
    """
    folders = [Path(__file__).parent]
    if not (folders[0] / "_build_info.json").is_file():
        installed = importlib.metadata.distributions(name="fer-kernels")
        folders += [Path(str(found.locate_file("fer_kernels"))) for found in installed]
    return next((folder for folder in folders if (folder / "_build_info.json").is_file()), None)


_folder = _built_folder()
if _folder is not None and _folder != Path(__file__).parent:
    sys.modules[__package__].__path__.append(str(_folder))


def build_info() -> dict[str, Any]:
    """What setup.py recorded when it built the compiled modules; empty where nothing was built."""
    return json.loads((_folder / "_build_info.json").read_text()) if _folder else {}


def _load(name: str) -> Extension:
    qualified = f"{__package__}.{name}"
    if importlib.util.find_spec(qualified) is None:
        left_out = build_info().get(f"{name[1:]}_left_out", "this copy of fer_kernels was never built")
        return Extension(None, f"the compiled module {qualified} is not built: {left_out}")
    if name == "_cuda" and torch.version.cuda is None:
        return Extension(None, f"this torch ({torch.__version__}) is a build without CUDA")
    try:
        return Extension(importlib.import_module(qualified), None)
    except ImportError as error:
        built_with = build_info().get("torch", "an unknown version")
        return Extension(
            None,
            f"{qualified} was built (against torch {built_with}) but does not load "
            f"under torch {torch.__version__}: {error}",
        )


cpu = _load("_cpu")
cuda = _load("_cuda")


def _fast_products() -> str | None:
    """What multiplies float32 faster than torch does on this processor, or None: tiles of bfloat16 ("amx"),
    or vectors ("avx512"), which MKL does not use on processors of other makers than Intel."""
    isas = cpu.module.supported_isas() if cpu.module else []
    by_intel = getattr(cpu.module, "made_by_intel", lambda: True)()  # one of an earlier version does not say
    if "amx" in isas:
        return "amx"
    return "avx512" if "avx512" in isas and torch.backends.mkl.is_available() and not by_intel else None


FAST_PRODUCTS = _fast_products()  # once: torch.compile asks too
# Whether this processor multiplies vectors of bfloat16 (AVX512_BF16), for which one kernel is compiled.
BFLOAT16_PRODUCTS: bool = getattr(cpu.module, "multiplies_bfloat16", lambda: False)()

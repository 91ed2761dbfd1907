"""Fused graph and attention operators for facial expression recognition and vision graph networks."""

import importlib

from .conv.op import normed_conv
from .dispatch import available_backends, use_backend
from .jad.op import JADStats, attention_column_mean, jad_attention
from .knn.op import dilated_knn, to_edge_index
from .linear.op import RowNorm, linear, normed_linear
from .norm.op import batch_norm_act
from .relation.op import relation_aggregate, reverse_graph

__version__ = "0.1.0"
__all__ = [
    "JADStats",
    "RowNorm",
    "attention_column_mean",
    "available_backends",
    "batch_norm_act",
    "dilated_knn",
    "jad_attention",
    "linear",
    "normed_conv",
    "normed_linear",
    "relation_aggregate",
    "reverse_graph",
    "to_edge_index",
    "use_backend",
]


def __getattr__(name: str) -> object:
    """`fer_kernels.nn`, imported when it is asked for."""
    if name == "nn":
        return importlib.import_module(".nn", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

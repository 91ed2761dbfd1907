"""Fused graph and attention operators for facial expression recognition and vision graph networks."""

from .dispatch import available_backends, use_backend
from .jad.op import JADStats, attention_column_mean, jad_attention
from .knn.op import dilated_knn, to_edge_index
from .norm.op import batch_norm_act
from .relation.op import relation_aggregate, reverse_graph

from . import nn  # isort: skip  # made of the operators

__version__ = "0.1.0"
__all__ = [
    "JADStats",
    "attention_column_mean",
    "available_backends",
    "batch_norm_act",
    "dilated_knn",
    "jad_attention",
    "nn",
    "relation_aggregate",
    "reverse_graph",
    "to_edge_index",
    "use_backend",
]

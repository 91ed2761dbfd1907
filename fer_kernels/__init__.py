"""Fused graph and attention operators for facial expression recognition and vision graph networks."""

from .dispatch import available_backends, use_backend
from .knn.op import dilated_knn, to_edge_index
from .relation.op import relation_aggregate, reverse_graph

__version__ = "0.1.0"
__all__ = [
    "available_backends",
    "dilated_knn",
    "relation_aggregate",
    "reverse_graph",
    "to_edge_index",
    "use_backend",
]

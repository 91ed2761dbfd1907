"""Fused graph and attention operators for facial expression recognition and vision graph networks."""

from .dispatch import available_backends, use_backend
from .knn.op import dilated_knn, to_edge_index

__version__ = "0.1.0"
__all__ = ["available_backends", "dilated_knn", "to_edge_index", "use_backend"]

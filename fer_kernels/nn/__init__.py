"""Graph modules on (B, N, C) nodes: the dynamic graph of ViG and Face2Nodes, and their graph convolutions."""

from .conv import (
    CONVS,
    DynamicGraphConv,
    EdgeConv,
    GINConv,
    GroupedLinear,
    MaxRelativeConv,
    Projection,
    RelationConv,
    SAGEConv,
    create_conv,
    interleave,
)
from .graph import DilatedKnnGraph, RelativePosition, relative_position_table

__all__ = [
    "CONVS",
    "DilatedKnnGraph",
    "DynamicGraphConv",
    "EdgeConv",
    "GINConv",
    "GroupedLinear",
    "MaxRelativeConv",
    "Projection",
    "RelationConv",
    "RelativePosition",
    "SAGEConv",
    "create_conv",
    "interleave",
    "relative_position_table",
]

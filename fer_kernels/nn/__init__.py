"""Modules on (B, N, C) nodes: dynamic graphs, graph convolutions, attention with joint attention dropping."""

from .attention import DropPath, JADAttention, JADBlock, drop_schedule
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
    hooked,
    interleave,
)
from .graph import DilatedKnnGraph, RelativePosition, relative_position_table
from .maps import conv_norm_act
from .norm import norm_act, norm_act_maps

__all__ = [
    "CONVS",
    "DilatedKnnGraph",
    "DropPath",
    "DynamicGraphConv",
    "EdgeConv",
    "GINConv",
    "GroupedLinear",
    "JADAttention",
    "JADBlock",
    "MaxRelativeConv",
    "Projection",
    "RelationConv",
    "RelativePosition",
    "SAGEConv",
    "conv_norm_act",
    "create_conv",
    "drop_schedule",
    "hooked",
    "interleave",
    "norm_act",
    "norm_act_maps",
    "relative_position_table",
]

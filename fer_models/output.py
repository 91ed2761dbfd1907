"""What a model returns when it is asked for everything."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class FEROutput(NamedTuple):
    """A NamedTuple, so that DDP, torch.compile, torch.export and pytrees take it as it is.

    Attributes:
        logits: (B, num_classes).
        valence_arousal: (B, 2), or None where the model has no such output.
        embedding: (B, num_features), what the classifier reads (before its dropout).
        aux: the system's own, tensors or lists of tensors; its keys are in the system's docstring.
    """

    logits: Tensor
    valence_arousal: Tensor | None
    embedding: Tensor
    aux: dict[str, Any]

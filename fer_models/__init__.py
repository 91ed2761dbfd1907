"""Facial-expression-recognition systems on the operators of fer_kernels, and the ViG family."""

from fer_kernels import __version__

from . import emotion_gcn, face2nodes, jadfer, lnlattennet, vig  # for their models to register
from .base import FERModel
from .output import FEROutput
from .predict import FERResult, Predictor
from .registry import create_model, list_models

__all__ = [
    "FERModel",
    "FEROutput",
    "FERResult",
    "Predictor",
    "__version__",
    "create_model",
    "emotion_gcn",
    "face2nodes",
    "jadfer",
    "list_models",
    "lnlattennet",
    "vig",
]

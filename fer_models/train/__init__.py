"""Training and evaluation: `fit` and `evaluate`, which the command `fer` calls."""

from .checkpoint import load_checkpoint, save_checkpoint
from .config import TrainConfig
from .engine import Trainer, fit
from .evaluate import evaluate

__all__ = ["TrainConfig", "Trainer", "evaluate", "fit", "load_checkpoint", "save_checkpoint"]

"""The configuration of a run: a flat dataclass, read from YAML and the command line, saved with the run."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

RECIPES = Path(__file__).parent.parent / "recipes"


AUGMENT: dict[str, dict[str, Any] | None] = {  # what `train_transform` is told, or to do without it
    "none": None,
    "light": {},
    "strong": {"turn": 15, "shift": 0.1, "zoom": 0.2, "color": 0.4, "erase": 0.5},
    "randaugment": {"turn": 0, "shift": 0, "zoom": 0, "color": 0, "randaugment": 2},
}


# Metrics of which more is better
SELECTABLE = (
    *("accuracy", "mean_class_accuracy", "macro_f1"),
    *(f"{of}_{name}" for of in ("mean", "valence", "arousal") for name in ("ccc", "pcc", "sagr")),
)


class ConfigError(ValueError):
    """A wrong key or value: the user's mistake, said in one line."""


class TrainingStopped(RuntimeError):
    """Training cannot go on; what was saved is whole."""


class Interrupted(Exception):
    """The user asked to stop; the step was finished and the checkpoint written."""


@dataclass
class TrainConfig:
    """What a training run is made of; the help text of `fer train` is made of the comments below."""

    # Model and data
    model: str = field(
        default="face2nodes_nano", metadata={"help": "a name of `fer info --models`, or timm/NAME"}
    )
    model_options: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "its options, KEY=VALUE ..."}
    )
    pretrained: str = field(default="", metadata={"help": "tag or file of weights to start from"})
    data: str = field(default="synthetic", metadata={"help": "data set; `fer data list` names them"})
    root: str = field(default="", metadata={"help": "its folder or zip file"})
    data_options: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "its options, KEY=VALUE ..."}
    )
    valid_options: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "those that differ for validation, KEY=VALUE ..."}
    )
    valid_split: str = field(
        default="", metadata={"help": "validate on it; empty is valid, or what the data set has for it"}
    )
    size: int = field(default=0, metadata={"help": "pixels a side; 0 takes the model's"})
    workers: int = field(
        default=-1, metadata={"help": "loader processes; -1 chooses, 0 loads in the main one"}
    )

    # Length and optimizer
    epochs: int = field(default=10, metadata={"help": "passes over the training data"})
    batch_size: int = field(default=64, metadata={"help": "images a step, over all processes"})
    accumulate: int = field(default=1, metadata={"help": "parts that a step's batch is computed in"})
    optimizer: str = field(default="adamw", metadata={"help": "any of timm's"})
    lr: float = field(default=1e-3, metadata={"help": "peak learning rate"})
    weight_decay: float = field(default=0.05, metadata={"help": "of weights; biases and norms have none"})
    momentum: float = field(default=0.9, metadata={"help": "of optimizers that have one"})
    schedule: str = field(default="cosine", metadata={"help": "cosine, step or constant"})
    step_epochs: int = field(default=10, metadata={"help": "schedule=step: epochs between steps"})
    step_factor: float = field(default=0.1, metadata={"help": "schedule=step: factor of a step"})
    warmup_epochs: float = field(default=1.0, metadata={"help": "epochs of linear warm-up"})
    min_lr: float = field(default=1e-6, metadata={"help": "where cosine ends and warm-up starts"})
    clip: float = field(default=5.0, metadata={"help": "largest gradient norm; 0 is none"})
    ema: float = field(default=0.0, metadata={"help": "decay of averaged weights, e.g. 0.999; 0 is none"})

    # Regularisation
    augment: str = field(default="light", metadata={"help": "none, light, strong or randaugment"})
    label_smoothing: float = field(default=0.1, metadata={"help": "share of the target all classes get"})
    distribution: bool = field(default=False, metadata={"help": "train on votes where the data has them"})
    mixup: float = field(default=0.0, metadata={"help": "alpha of mixup; 0 is none"})
    cutmix: float = field(default=0.0, metadata={"help": "alpha of cutmix; 0 is none"})
    balance: float = field(default=0.0, metadata={"help": "1 draws classes alike, 0 as they come"})
    class_weights: float = field(default=0.0, metadata={"help": "loss weights by count to the -power"})

    # How it runs
    seed: int = field(default=0, metadata={"help": "of initialisation, order and augmentation"})
    amp: bool = field(default=False, metadata={"help": "autocast to bfloat16"})
    compile: bool = field(default=False, metadata={"help": "torch.compile the model"})
    channels_last: bool = field(default=False, metadata={"help": "images in channels-last memory"})
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda or cuda:N"})
    early_stop: int = field(default=0, metadata={"help": "epochs without a better result to stop after"})
    select: str = field(default="accuracy", metadata={"help": "metric that the best checkpoint has"})
    save_steps: int = field(default=200, metadata={"help": "steps between checkpoints within an epoch"})

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        types = typing.get_type_hints(type(self))
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            wanted = types[item.name]
            if wanted is float and isinstance(value, int) and not isinstance(value, bool):
                setattr(self, item.name, float(value))
            elif wanted is float and isinstance(value, str) and _is_number(value):
                setattr(self, item.name, float(value))  # YAML reads 1e-3 as text
            elif typing.get_origin(wanted) is dict:
                if not isinstance(value, dict):
                    raise ConfigError(f"{item.name} must be keys and values, got {value!r}")
            elif not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
                raise ConfigError(f"{item.name} must be {_article(wanted)}, got {value!r}")
        for name in ("epochs", "batch_size", "accumulate", "save_steps", "step_epochs"):
            self._at_least(name, 1)
        for name in (
            "size",
            "clip",
            "mixup",
            "cutmix",
            "balance",
            "class_weights",
            "early_stop",
            "weight_decay",
        ):
            self._at_least(name, 0)
        self._at_least("workers", -1)
        if self.lr <= 0:
            raise ConfigError(f"lr must be above 0, got {self.lr}")
        for name in ("ema", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} must lie in [0, 1), got {getattr(self, name)}")
        self._one_of("schedule", ("cosine", "step", "constant"))
        self._one_of("augment", tuple(AUGMENT))
        self._one_of("select", SELECTABLE)

    def _at_least(self, name: str, least: float) -> None:
        if not getattr(self, name) >= least:
            raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}")

    def _one_of(self, name: str, known: tuple[str, ...]) -> None:
        if getattr(self, name) not in known:
            raise ConfigError(
                f"unknown {name} {getattr(self, name)!r}: expected one of {', '.join(known)}"
                + nearest(getattr(self, name), known)
            )

    # Reading and writing

    @classmethod
    def from_dict(cls, values: dict[str, Any], origin: str = "configuration") -> TrainConfig:
        known = [item.name for item in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                raise ConfigError(f"{origin}: unknown key {key!r}" + nearest(str(key), known))
        try:
            return cls(**values)
        except ConfigError as error:
            raise ConfigError(f"{origin}: {error}") from None

    @classmethod
    def read(cls, path: str | Path) -> TrainConfig:
        """From a YAML file, or a recipe's name."""
        return cls.from_dict(read_yaml(path), str(path))

    def to_yaml(self) -> str:
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The keys and values of a YAML file, or of a recipe that comes with the package."""
    file = Path(path)
    if not file.suffix:
        file = RECIPES / f"{path}.yaml"
    if not file.is_file():
        if Path(path).suffix:
            raise ConfigError(f"no file {path}")
        known = recipes()
        raise ConfigError(
            f"no configuration {path}; recipes are {', '.join(known)}" + nearest(str(path), known)
        )
    try:
        values = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{file} must hold keys and values")
    return values


def recipes() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def nearest(word: str, known: typing.Iterable[str]) -> str:
    found = difflib.get_close_matches(word, list(known), 1, cutoff=0.5)
    return f"; did you mean {found[0]!r}?" if found else ""


def parse_value(text: str) -> Any:
    """A command line's text as YAML would read it."""
    return yaml.safe_load(text) if text else ""


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _article(wanted: Any) -> str:
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[wanted]

"""The training loop.

A step depends on the seed, its number and the weights it starts from, on nothing else: samples, augmentation,
dropout and mixing are drawn from generators seeded by (seed, epoch, index) or (seed, step). So a checkpoint
needs weights, optimizer and position, and a run that is killed and resumed ends like an unbroken one.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import math
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..data import DATASETS, create_dataset, eval_transform, train_transform
from ..data.sampling import class_weights
from ..layers.label_graph import EMBEDDINGS, OF_DATA
from ..losses import Criterion, CrossEntropy, Targets, Term, label_distribution
from ..metrics import Predictions
from ..registry import create_model, with_options_of
from . import pictures
from .checkpoint import (
    BEST,
    CheckpointError,
    create_any,
    load_checkpoint,
    load_state,
    save_checkpoint,
    save_state,
)
from .config import AUGMENT, ConfigError, Interrupted, TrainConfig, TrainingStopped
from .distributed import World, gathered, joined, wait
from .evaluate import evaluate, input_side, unwrapped, wants_imagenet, whole_output
from .loading import Steps, mix, mixed_seed, training_loader, workers_for

# Host and device, and the processes, meet this often: reading a loss waits for the device
CHECK_STEPS = 10
STATE, LAST = "last.pt", "last.safetensors"
FORMAT = 1  # of STATE


def make_transform(size: int, augment: str, *, imagenet: bool) -> Any:
    """Of images that are trained on."""
    if augment not in AUGMENT:
        raise ConfigError(f"unknown augment {augment!r}: expected one of {', '.join(AUGMENT)}")
    options = AUGMENT[augment]
    if options is None:
        return eval_transform(size, imagenet=imagenet)
    return train_transform(size, imagenet=imagenet, **options)


class Trainer:
    """One run in one folder.

    Args:
        config: all of it.
        folder: where checkpoints, log and pictures go.
        resume: "never": the folder must not hold a run; "auto": go on where there is one, else start;
            "must": go on or fail.
        world: this process's place.
    """

    def __init__(self, config: TrainConfig, folder: str | Path, world: World, resume: str = "never") -> None:
        self.config, self.folder, self.world = config, Path(folder), world
        self.device = world.device
        from timm.optim import create_optimizer_v2
        from timm.utils import ModelEmaV3

        self._prepare_folder(resume)
        self._found_options = dict[str, Any]()
        self.num_classes = 0  # not known yet
        self.num_classes = self._count_classes()
        torch.manual_seed(config.seed)
        self.model = self._make_model()
        imagenet = wants_imagenet(self.model)
        self.train_data = self._dataset(True, make_transform(self.size, config.augment, imagenet=imagenet))
        self.valid_data = self._dataset(False, eval_transform(self.size, imagenet=imagenet))
        self.steps = Steps(
            self.train_data,
            config.batch_size,
            config.seed,
            balance=config.balance,
            rank=world.rank,
            world=world.size,
        )
        share = config.batch_size // world.size
        if share % config.accumulate:
            raise ConfigError(
                f"accumulate = {config.accumulate} does not divide the {share} images of a process's step"
            )
        try:
            self.optimizer = create_optimizer_v2(
                self.model,
                opt=config.optimizer,
                lr=config.lr,
                weight_decay=config.weight_decay,
                momentum=config.momentum,
            )
        except (AssertionError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"optimizer = {config.optimizer!r} is not one of timm's, such as adamw, sgd, lamb or lion "
                f"({error})"
            ) from error
        self.ema = ModelEmaV3(self.model, decay=config.ema, use_warmup=True) if config.ema else None
        self.criterion = self._make_criterion().to(self.device)
        self.step, self.epoch, self.history = 0, 0, list[dict[str, Any]]()
        self.best, self.best_epoch = -math.inf, -1
        self.totals: dict[str, float] = {}
        if self._resuming:
            self._resume()
            if world.main:
                print(f"going on with {self.folder} after step {self.step}", flush=True)
        self.network: nn.Module = self.model
        if config.compile:
            self.network = torch.compile(self.network)  # type: ignore[assignment]
        if world.size > 1:
            place = [self.device.index] if self.device.type == "cuda" else None
            self.network = nn.parallel.DistributedDataParallel(self.network, device_ids=place)
        self._asked_to_stop = False
        # Now that all of it has proved to be possible
        if world.main:
            print(config.to_yaml(), flush=True)
            if not self._resuming:
                (self.folder / "config.yaml").write_text(config.to_yaml())

    # Making

    def _make_model(self) -> nn.Module:
        config = self.config
        if config.pretrained and config.model.startswith("timm/"):
            raise ConfigError("pretrained is for models of this package; timm/NAME starts from scratch")
        options = self.model_options
        if config.pretrained:
            options["pretrained"] = config.pretrained
        head = dict(options.get("head_options") or {})
        if head.get("adjacency", options.get("adjacency")) in OF_DATA:
            head["targets"] = self._train_targets()
            options["head_options"] = head
        model: Any = create_any(create_model, config.model, options)
        # The graph and the vectors themselves, so that loading the checkpoint takes no other file
        if "targets" in head:
            del head["targets"]
            head["adjacency"] = model.head.adjacency.tolist()
        vectors = head.get("embeddings", options.get("embeddings"))
        if isinstance(vectors, str) and vectors not in EMBEDDINGS:
            head["embeddings"] = model.head.vectors.tolist()
        if head:
            self._found_options = {"head_options": head}
        if config.channels_last:
            model = model.to(memory_format=torch.channels_last)
        return model.to(self.device)

    @property
    def model_options(self) -> dict[str, Any]:
        """What the model is made with: as many classes as the data has, for images of this size, what the
        weights were made with that it starts from, and what was found in the data.

        timm's own models are not told the size: some take it, some know no such option.
        """
        options: dict[str, Any] = {"num_classes": self.num_classes}
        if self.config.size and not self.config.model.startswith("timm/"):
            options["img_size"] = self.config.size
        options |= self.config.model_options
        if self.config.pretrained:
            options = with_options_of(self.config.model, self.config.pretrained, options)
        return options | self._found_options

    def _count_classes(self) -> int:
        config = self.config
        kind = DATASETS.get(config.data)
        if "classes" in config.data_options or kind is None:  # an unknown name is create_dataset's error
            return config.data_options.get("classes", 8)
        if not kind.counts_classes:
            return kind.default_classes
        return max(self._dataset(train).num_classes for train in (True, False))

    def _train_targets(self) -> Targets:
        """What is known of all images that are trained on, but the images."""
        data = self._dataset(True)
        affect = [(record.valence, record.arousal) for record in data.records]
        return Targets(
            torch.tensor(data.labels),
            torch.stack([data.distribution(record) for record in data.records]),
            torch.tensor(affect),
        )

    @property
    def size(self) -> int:
        """Pixels a side."""
        return self.config.size or input_side(self.model)

    def _dataset(self, train: bool, transform: Any = None) -> Any:
        """What is trained or validated on."""
        config = self.config
        options = config.data_options if train else {**config.data_options, **config.valid_options}
        kind = DATASETS.get(config.data)
        if kind is not None and kind.counts_classes and self.num_classes:
            options = {"classes": self.num_classes, **options}  # where only one of the splits has them all
        split = "train" if train else validation_split(config.data, config.valid_split)
        return create_dataset(config.data, config.root or None, split, transform=transform, **options)

    def _make_criterion(self) -> Criterion:
        weights = None
        if self.config.class_weights:
            weights = class_weights(self.train_data.class_counts(), self.config.class_weights)
        if not hasattr(self.model, "loss_terms"):
            loss = CrossEntropy(class_weights=weights, label_smoothing=self.config.label_smoothing)
            return Criterion([Term("cross_entropy", 1.0, loss)])
        overrides: dict[str, Any] = {"label_smoothing": self.config.label_smoothing}
        if weights is not None:
            overrides["class_weights"] = weights
        return Criterion.for_model(self.model, **overrides)

    # The loop

    def fit(self) -> dict[str, float]:
        """Trains to the end; returns the best checkpoint's metrics."""
        with self._graceful():
            loader = training_loader(
                self.train_data,
                self.steps,
                self.config.seed,
                workers_for(self.config.workers, self.device, self.world.size),
                self.device,
            )
            while self.epoch < self.config.epochs and not self._tired():
                self._epoch(loader)
                self._finish_epoch()
                if any(gathered(self._asked_to_stop, self.world)):
                    raise Interrupted
        self._pictures()
        return self.best_metrics

    @property
    def best_metrics(self) -> dict[str, float]:
        return next((dict(row) for row in self.history if row["epoch"] == self.best_epoch), {})

    def _tired(self) -> bool:
        patience = self.config.early_stop
        return bool(patience) and self.epoch - 1 - self.best_epoch >= patience and self.best_epoch >= 0

    def _epoch(self, loader: Any) -> None:
        self.network.train()
        self.steps.epoch = self.epoch
        self.steps.start = self.step - self.epoch * self.steps.steps
        if self.steps.start == 0:
            self.totals = {"seconds": 0.0, "waited": 0.0, "loss": 0.0}
        bar = tqdm(
            total=self.steps.steps,
            initial=self.steps.start,
            desc=f"epoch {self.epoch + 1}/{self.config.epochs}",
            unit="step",
            disable=not self.world.main,
            leave=False,
        )
        sums: dict[str, Any] = {}
        with bar:
            before = time.perf_counter()
            for batch in loader:
                ready = time.perf_counter()
                for name, value in self._train_step(batch).items():
                    sums[name] = sums.get(name, 0.0) + value
                ended = self.step % self.steps.steps == 0
                save = self.step % self.config.save_steps == 0 and not ended
                alone = self.world.size == 1 and self._asked_to_stop
                if save or ended or alone or self.step % CHECK_STEPS == 0:
                    stop = self._meet(sums)
                    bar.set_postfix(loss=f"{self.totals['loss'] / self._steps_done:.3f}", refresh=False)
                    if (save or stop) and not ended:
                        self._save_state()
                    if stop and not ended:
                        raise Interrupted
                bar.update()
                self.totals["waited"] += ready - before
                self.totals["seconds"] += time.perf_counter() - before
                before = time.perf_counter()

    @property
    def _steps_done(self) -> int:
        """Of this epoch."""
        return self.step - self.epoch * self.steps.steps

    def _meet(self, sums: dict[str, Any]) -> bool:
        """Adds what was summed on the device to the totals; stops where it is not finite. Whether any process
        was asked to stop."""
        for name, value in sums.items():
            self.totals[name] = self.totals.get(name, 0.0) + float(value)
        sums.clear()
        flags = gathered((self._asked_to_stop, not math.isfinite(self.totals["loss"])), self.world)
        if any(broken for _, broken in flags):
            raise TrainingStopped(
                f"the loss is no longer finite after step {self.step} (epoch {self.epoch + 1}); the last "
                f"checkpoint is intact. Try a smaller lr than {self.config.lr}, a longer warm-up, or clip"
            )
        return any(asked for asked, _ in flags)

    def _train_step(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        config = self.config
        torch.manual_seed(mixed_seed(config.seed, 2, self.step, self.world.rank))
        self._set_lr()
        images = batch["image"].to(self.device, non_blocking=True)
        label = batch["label"].to(self.device, non_blocking=True)
        distribution = batch["distribution"].to(self.device, non_blocking=True)
        affect = batch["valence_arousal"].to(self.device, non_blocking=True)
        use_distribution = config.distribution
        if config.mixup or config.cutmix:
            if not use_distribution:
                distribution = label_distribution(label, distribution.shape[1])
            images, distribution, affect = mix(images, distribution, affect, config.mixup, config.cutmix)
            use_distribution = True
        if config.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        parts: dict[str, Tensor] = {}
        self.optimizer.zero_grad(set_to_none=True)
        count = config.accumulate
        for number in range(count):
            chunk = slice(number * len(images) // count, (number + 1) * len(images) // count)
            targets = Targets(label[chunk], distribution[chunk] if use_distribution else None, affect[chunk])
            last = number == count - 1
            quiet = contextlib.nullcontext() if last or self.world.size == 1 else self.network.no_sync()  # type: ignore[operator]
            with quiet:
                with torch.autocast(self.device.type, torch.bfloat16, enabled=config.amp):
                    output = whole_output(self.network, images[chunk])
                loss, named = self.criterion(output, targets)
                (loss / count).backward()
            for name, value in {"loss": loss.detach(), **named}.items():
                parts[name] = parts.get(name, 0.0) + value.double() / count
        if config.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        self.optimizer.step()
        self.step += 1
        if self.ema is not None:
            self.ema.update(self.model, step=self.step)
        return parts

    def _set_lr(self) -> None:
        rate = learning_rate(self.config, self.step, self.steps.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)

    def _finish_epoch(self) -> None:
        predictions = self.validate()
        steps = self.steps.steps
        seconds, waited = self.totals.pop("seconds"), self.totals.pop("waited")
        row: dict[str, Any] = {
            "epoch": self.epoch,
            "lr": learning_rate(self.config, max(self.step - 1, 0), steps),
            **{f"train_{name}": total / steps for name, total in self.totals.items()},
            **predictions.metrics(),
            "images_per_second": steps * self.config.batch_size / max(seconds, 1e-9),
            "share_waiting_for_data": waited / max(seconds, 1e-9),
        }
        if self.config.select not in row:
            raise ConfigError(
                f"select = {self.config.select!r}, and there is no valence and arousal of both the model and "
                f"the data that the run is validated on; there are {', '.join(predictions.metrics())}"
            )
        self.history.append(row)
        self.epoch += 1
        better = row[self.config.select] > self.best
        if better:
            self.best, self.best_epoch = row[self.config.select], row["epoch"]
        if self.world.main:
            # The best weights first: where the state says that this epoch was the best, they are there
            if better:
                self._save_weights(BEST, predictions)
            self._save_weights(LAST, predictions)
            self._save_state()
            self._log(row)
        wait(self.world)

    def validate(self, model: nn.Module | None = None) -> Predictions:
        config = self.config
        return evaluate(
            self.evaluated_model if model is None else model,
            self.valid_data,
            world=self.world,
            batch_size=max(1, config.batch_size // self.world.size),
            workers=config.workers,
            amp=config.amp,
            channels_last=config.channels_last,
        )

    @property
    def evaluated_model(self) -> nn.Module:
        """The averaged weights where they are asked for."""
        return self.model if self.ema is None else self.ema.module

    # Files

    def _prepare_folder(self, resume: str) -> None:
        there = (self.folder / STATE).is_file()
        if resume == "must" and not there:
            raise ConfigError(f"nothing to resume: {self.folder / STATE} does not exist")
        if resume == "never" and there:
            raise ConfigError(
                f"{self.folder} holds a run already; --resume auto goes on with it, --out names another"
            )
        self._resuming = there
        if not self.world.main:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe = self.folder / ".writable"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise ConfigError(f"cannot write to the run folder {self.folder}: {error.strerror}") from None

    def _save_weights(self, name: str, predictions: Predictions) -> None:
        about = {
            "model": self.config.model,
            "options": self.model_options,
            "classes": list(self.valid_data.classes),
            "size": self.size,
            "data": self.config.data,
            "epoch": self.history[-1]["epoch"],
            "metrics": predictions.metrics(),
        }
        save_checkpoint(self.folder / name, unwrapped(self.evaluated_model), about)

    def _save_state(self) -> None:
        if not self.world.main:
            return
        state = {
            "format": FORMAT,
            "config": json.dumps(dataclasses.asdict(self.config)),
            "step": self.step,
            "epoch": self.epoch,
            "best": self.best,
            "best_epoch": self.best_epoch,
            "history": json.dumps(self.history),
            "totals": dict(self.totals),
            "model": self.model.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        save_state(self.folder / STATE, state)

    def _resume(self) -> None:
        state = load_state(self.folder / STATE)
        if state.get("format") != FORMAT:
            raise CheckpointError(f"{self.folder / STATE} is of another version of this package")
        changed = [
            f"{name} {old!r} -> {new!r}"
            for name, old in json.loads(state["config"]).items()
            if (new := dataclasses.asdict(self.config).get(name)) != old and name not in FREE
        ]
        if changed:
            raise ConfigError(
                f"{self.folder} was started with another configuration: {'; '.join(changed)}; to go on with "
                f"it, name the folder (--out) and nothing else, or repeat the command that started it"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        self.step, self.epoch = state["step"], state["epoch"]
        self.best, self.best_epoch = state["best"], state["best_epoch"]
        self.history, self.totals = json.loads(state["history"]), state["totals"]

    def _log(self, row: dict[str, Any]) -> None:
        """The whole log anew: rows of a run that was cut off and its resumed part never mix."""
        names = list(dict.fromkeys(name for line in self.history for name in line))
        with open(self.folder / "log.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(self.history)
        shown = {name: value for name, value in row.items() if name in SHOWN}
        tqdm.write(
            f"epoch {row['epoch'] + 1}/{self.config.epochs}  "
            + "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
        )
        _to_tensorboard(self.folder, row)

    def _pictures(self) -> None:
        """Of the whole run, and of the best checkpoint's predictions."""
        if not self.history:
            return
        model, _ = load_checkpoint(self.folder / BEST)
        predictions = self.validate(model.to(self.device))
        if self.world.main:
            pictures.curves(self.history, self.folder / "curves.png")
            pictures.confusion(predictions.confusion, self.valid_data.classes, self.folder / "confusion.png")
            (self.folder / "metrics.json").write_text(json.dumps(predictions.metrics(), indent=2) + "\n")
            self._explanation(model)

    def _explanation(self, model: nn.Module) -> None:
        """Of the first face that the network was validated on."""
        from ..explain import explain, explainable

        data = self.valid_data
        readable = (record for record in data.records if record.image not in data.unreadable)
        if explainable(model) and model.num_classes == len(data.classes):
            image = data.load(next(readable))
            explain(model, image, self.folder / "explain.png", classes=data.classes, size=self.size)

    # Stopping

    @contextlib.contextmanager
    def _graceful(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM ask for the end of the step; a second Ctrl-C ends at once."""

        def ask(number: int, frame: Any) -> None:
            if self._asked_to_stop:
                raise KeyboardInterrupt
            self._asked_to_stop = True
            if self.world.main:
                tqdm.write("stopping after this step; again to stop at once")

        try:
            before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


# What may differ between a run and its resumption
FREE = ("workers", "device", "save_steps", "root")
SHOWN = ("train_loss", "accuracy", "mean_class_accuracy", "macro_f1", "mean_ccc", "images_per_second")


def learning_rate(config: TrainConfig, step: int, steps_an_epoch: int) -> float:
    """Of this step: linear warm-up, then the schedule."""
    warmup = round(config.warmup_epochs * steps_an_epoch)
    if step < warmup:
        return config.min_lr + (config.lr - config.min_lr) * (step + 1) / warmup
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "step":
        return config.lr * config.step_factor ** (step // steps_an_epoch // config.step_epochs)
    total = config.epochs * steps_an_epoch
    share = (step - warmup) / max(total - warmup, 1)
    return config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(math.pi * min(share, 1.0))) / 2


def validation_split(data: str, wanted: str = "") -> str:
    """`wanted`, or "valid" where the data set has one, or else the split that results are published on."""
    kind = DATASETS.get(data)  # an unknown name is create_dataset's error
    if wanted or kind is None:
        return wanted or "valid"
    return "valid" if "valid" in kind.splits else kind.evaluation_split


def _to_tensorboard(folder: Path, row: dict[str, Any]) -> None:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:  # an extra
        return
    with SummaryWriter(str(folder / "tensorboard")) as writer:
        for name, value in row.items():
            if name != "epoch":
                writer.add_scalar(name, value, row["epoch"])


def fit(config: TrainConfig, folder: str | Path, resume: str = "never") -> dict[str, float]:
    """A whole run, in this process's place among those of torchrun; returns the best checkpoint's metrics."""
    folder = Path(folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    with joined(config.device) as world:
        try:
            trainer = Trainer(config, folder, world, resume)
        except BaseException:
            if world.main:  # a mistake leaves no empty folders behind
                with contextlib.suppress(OSError):
                    for path in made or [folder]:
                        path.rmdir()
            raise
        return trainer.fit()

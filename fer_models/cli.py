"""The command `fer`: train, evaluate, predict, explain, measure speed, look at data."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import os
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DESCRIPTION = """\
Facial expression recognition: train, evaluate, predict, explain, measure, look at data.

  fer train                                   built-in faces, face2nodes_nano, a few minutes on two cores
  fer train ferplus_face2nodes_xs --root DATA a recipe on a data set of yours
  fer eval runs/face2nodes_nano-synthetic-1   a run's best checkpoint on its validation data
  fer predict photo.jpg                       the expression, by weights that come with the package
  fer explain photo.jpg                       a picture of what the model looked at
  fer data check DATA                         what a folder or zip file holds, and what is wrong with it
"""

TRAIN_EXAMPLES = """\
examples:
  fer train
  fer train --epochs 3 --lr 5e-4 --model jadfer_xs --model-options variety=hinge
  fer train ferplus_face2nodes_xs --root ../shared/data --out runs/first
  fer train --out runs/first --resume auto
  fer train --seeds 0 1 2
  torchrun --nproc-per-node 4 -m fer_models.cli train --batch-size 256

A recipe is the name of one that comes with the package, or a YAML file; options win over it. Ctrl-C finishes
the step, saves and ends; the same command with --resume auto goes on from there, also after a crash, with
the same result as an unbroken run. --out RUN --resume auto alone takes what the run was started with.
"""

EVAL_EXAMPLES = """\
examples:
  fer eval runs/first                                 its best checkpoint, on the data it was validated on
  fer eval best.safetensors --data ferplus --root DATA --data-options protocol=majority --flip
  fer eval runs/first runs/second                     both, and whether they differ
"""

PREDICT_EXAMPLES = """\
examples:
  fer predict photo.jpg
  fer predict FOLDER --csv out.csv                    a row a face; an unreadable image has its reason
  fer predict film.mp4 --every 5 --detector opencv --faces all --csv out.csv
  fer predict photo.jpg --model runs/first            a run's best checkpoint

Without --detector an image is taken as a face crop. --detector opencv and videos need OpenCV:
pip install "opencv-python-headless<5"
"""

EXPLAIN_EXAMPLES = """\
examples:
  fer explain photo.jpg
  fer explain photo.jpg --model jadfer_xs --out why.png
  fer explain photo.jpg --model runs/first --node 2 3 --layers 0 3
"""

DEVICES = "auto, cpu, cuda or cuda:N (default: auto)"
DATA_OPTIONS = "of the data set; `fer_models.data` describes them"
USER_MISTAKE, STOPPED, INTERRUPTED = 2, 1, 130


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser()
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{_nearest_option(unknown, options.known)}")
    # Imports that take seconds come after the help
    from fer_kernels.dispatch import BackendError

    from .data import DataError
    from .train.checkpoint import CheckpointError
    from .train.config import Interrupted, TrainingStopped

    mistakes = (DataError, CheckpointError, BackendError, ValueError, TypeError, FileNotFoundError)
    try:
        return options.run(options) or 0
    except Interrupted:
        print(
            "interrupted; the checkpoint is written, the same command with --resume auto goes on from it",
            file=sys.stderr,
        )
        return INTERRUPTED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except TrainingStopped as error:
        print(f"fer: {error}", file=sys.stderr)
        return STOPPED
    except mistakes as error:
        if options.traceback:
            raise
        print(f"fer: {' '.join(str(error).split())}", file=sys.stderr)
        return USER_MISTAKE
    except BrokenPipeError:  # whoever reads has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return STOPPED
    except OSError as error:  # such as a full disk
        if options.traceback:
            raise
        print(f"fer: {error}", file=sys.stderr)
        return STOPPED


def make_parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="fer", description=DESCRIPTION, formatter_class=raw)
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train a model", epilog=TRAIN_EXAMPLES, formatter_class=raw)
    train.add_argument(
        "recipe",
        nargs="?",
        help="name of a recipe, or a YAML file; its values stand before the defaults below. Without one, and "
        "without --model and --data, it is first_run",
    )
    train.add_argument("--out", help="run folder (default: runs/MODEL-DATA-NUMBER)")
    train.add_argument("--resume", choices=("never", "auto", "must"), default="never", help="default: never")
    train.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help="several runs, and their spread")
    train.add_argument("--folds", type=int, help="k-fold cross-validation of a data set by subject")
    train.add_argument("--print-config", action="store_true", help="print the configuration and stop")
    _add_config(train)
    train.set_defaults(run=_train)

    evaluate = commands.add_parser(
        "eval", help="evaluate checkpoints", epilog=EVAL_EXAMPLES, formatter_class=raw
    )
    evaluate.add_argument("checkpoint", nargs="+", help="run folder or .safetensors file; two are compared")
    evaluate.add_argument("--data", help="data set (default: the run's)")
    evaluate.add_argument("--root", help="its folder or zip file (default: the run's)")
    evaluate.add_argument("--split", default="", help="default: what the run was validated on")
    evaluate.add_argument("--data-options", nargs="+", default=[], metavar="KEY=VALUE", help=DATA_OPTIONS)
    evaluate.add_argument("--size", type=int, default=0, help="pixels a side (default: the checkpoint's)")
    _add_batch(evaluate)
    evaluate.add_argument("--workers", type=int, default=-1, help="loader processes (default: -1 chooses)")
    evaluate.add_argument("--flip", action="store_true", help="mean over each image and its mirror image")
    evaluate.add_argument("--json", metavar="PATH", help="metrics and confusion matrix")
    evaluate.add_argument("--picture", metavar="PATH", help="the confusion matrix as a PNG")
    evaluate.set_defaults(run=_evaluate)

    models = "shipped model, checkpoint or run folder (default: face2nodes_xs)"
    predict = commands.add_parser(
        "predict", help="expressions in images or videos", epilog=PREDICT_EXAMPLES, formatter_class=raw
    )
    predict.add_argument("path", nargs="+", help="image, folder or video")
    predict.add_argument("--model", default="face2nodes_xs", help=models)
    predict.add_argument("--csv", metavar="PATH", help="write all columns there")
    predict.add_argument("--detector", choices=("opencv",), help="look for faces first")
    predict.add_argument("--faces", choices=("largest", "all"), default="largest", help="default: largest")
    predict.add_argument("--every", type=int, default=1, help="of a video, one frame in so many")
    predict.add_argument("--flip", action="store_true", help="mean over each face and its mirror image")
    _add_batch(predict)
    predict.set_defaults(run=_predict)

    explain = commands.add_parser(
        "explain", help="a picture of what the model looked at", epilog=EXPLAIN_EXAMPLES, formatter_class=raw
    )
    explain.add_argument("image")
    explain.add_argument("--model", default="face2nodes_xs", help=models)
    explain.add_argument("--out", default="explain.png", help=".png, .pdf or .svg (default: explain.png)")
    explain.add_argument("--node", type=int, nargs=2, metavar=("ROW", "COLUMN"), help="graph node to show")
    explain.add_argument("--layers", type=int, nargs="+", metavar="BLOCK", help="blocks to show, from 0")
    explain.add_argument("--detector", choices=("opencv",), help="look for the largest face first")
    explain.add_argument("--device", default="auto", help=DEVICES)
    explain.set_defaults(run=_explain)

    bench = commands.add_parser(
        "bench",
        help="speed of a model on this machine",
        epilog="example:\n  fer bench face2nodes_ti --batch-size 16\n\n"
        "The operators alone are measured by `python -m benchmarks` in the source tree.",
        formatter_class=raw,
    )
    bench.add_argument("model", nargs="?", default="face2nodes_xs")
    _add_batch(bench, 16)
    bench.add_argument("--size", type=int, default=0, help="pixels a side (default: the model's)")
    bench.add_argument("--amp", action="store_true", help="autocast to bfloat16")
    bench.add_argument("--seconds", type=float, default=5.0, help="of measuring, for each row")
    bench.set_defaults(run=_bench)

    data = commands.add_parser("data", help="look at data sets", description="Look at data sets.")
    actions = data.add_subparsers(required=True, metavar="ACTION")
    check = actions.add_parser(
        "check",
        help="what a folder or zip file holds, and what is wrong with it",
        epilog="example:\n  fer data check DATA --name ferplus --data-options protocol=majority",
        formatter_class=raw,
    )
    check.add_argument("path")
    check.add_argument("--name", help="the data set, where its layout does not tell")
    check.add_argument("--data-options", nargs="+", default=[], metavar="KEY=VALUE", help=DATA_OPTIONS)
    check.set_defaults(run=_data_check)
    preview = actions.add_parser(
        "preview",
        help="a contact sheet, one row a class",
        epilog="example:\n  fer data preview synthetic --out faces.png",
        formatter_class=raw,
    )
    _add_dataset(preview)
    preview.add_argument("--out", default="preview.png")
    preview.set_defaults(run=_data_preview)
    speed = actions.add_parser(
        "speed",
        help="images a second that are read, decoded and augmented",
        epilog="example:\n  fer data speed ferplus --root DATA --size 112 --augment strong --workers 2",
        formatter_class=raw,
    )
    _add_dataset(speed)
    speed.add_argument("--size", type=int, default=112, help="pixels a side (default: 112)")
    speed.add_argument("--augment", default="light", help="none, light, strong or randaugment")
    speed.add_argument("--workers", type=int, default=2, help="processes (default: 2)")
    speed.add_argument("--seconds", type=float, default=5.0, help="of measuring")
    speed.set_defaults(run=_data_speed)
    actions.add_parser("list", help="known data sets").set_defaults(run=_data_list)

    info = commands.add_parser(
        "info",
        help="models, recipes, and what was built",
        epilog="example:\n  fer info --models",
        formatter_class=raw,
    )
    info.add_argument("--models", action="store_true", help="models and their sizes only")
    info.set_defaults(run=_info)
    for command in (*commands.choices.values(), *actions.choices.values()):
        command.set_defaults(known=[flag for action in command._actions for flag in action.option_strings])
    return parser


def _nearest_option(unknown: Sequence[str], known: Sequence[str]) -> str:
    flags = [text.partition("=")[0] for text in unknown if text.startswith("--")]
    near = [found for flag in flags for found in difflib.get_close_matches(flag, known, 1, cutoff=0.75)]
    return f"; did you mean {near[0]}?" if near else ""


def _add_batch(parser: argparse.ArgumentParser, size: int = 64) -> None:
    parser.add_argument("--batch-size", type=int, default=size, help=f"images at once (default: {size})")
    parser.add_argument("--device", default="auto", help=DEVICES)


def _add_dataset(parser: argparse.ArgumentParser) -> None:
    """Options that name a data set, for `_dataset`."""
    parser.add_argument("name")
    parser.add_argument("--root", help="folder or zip file")
    parser.add_argument("--split", default="train")
    parser.add_argument("--data-options", nargs="+", default=[], metavar="KEY=VALUE", help=DATA_OPTIONS)


def _dataset(options: argparse.Namespace, transform: Any = None) -> Any:
    from .data import create_dataset

    return create_dataset(
        options.name, options.root, options.split, transform=transform, **pairs(options.data_options)
    )


def _add_config(parser: argparse.ArgumentParser) -> None:
    """An option for every field of the configuration."""
    from .train.config import TrainConfig

    types = typing.get_type_hints(TrainConfig)
    group = parser.add_argument_group("configuration")
    for item in dataclasses.fields(TrainConfig):
        flag, text = "--" + item.name.replace("_", "-"), item.metadata["help"].replace("%", "%%")
        wanted: Any = types[item.name]
        if typing.get_origin(wanted) is dict:
            group.add_argument(flag, nargs="+", metavar="KEY=VALUE", help=text)
        elif wanted is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            default = f" (default: {item.default})" if item.default != "" else ""
            group.add_argument(flag, type=wanted, metavar=wanted.__name__.upper(), help=text + default)


def pairs(texts: Sequence[str]) -> dict[str, Any]:
    """KEY=VALUE ... as YAML reads the values."""
    from .train.config import ConfigError, parse_value

    found = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ConfigError(f"expected KEY=VALUE, got {text!r}")
        found[key] = parse_value(value)
    return found


# fer train


def _train(options: argparse.Namespace) -> int:
    from .train.config import ConfigError, TrainConfig, read_yaml

    # Neither a recipe nor a model nor data: what someone types first
    first = not (options.recipe or options.model or options.data)
    before = Path(options.out or "") / "config.yaml"
    if options.out and options.resume != "never" and not options.recipe and before.is_file():
        values = read_yaml(before)
    else:
        values = read_yaml("first_run" if first else options.recipe) if first or options.recipe else {}
    for item in dataclasses.fields(TrainConfig):
        given = getattr(options, item.name)
        if given is None:
            continue
        if isinstance(given, list):  # keys of a recipe stay unless named
            given = {**values.get(item.name, {}), **pairs(given)}
        values[item.name] = given
    config = TrainConfig.from_dict(values, options.recipe or "options")
    if options.print_config:
        print(config.to_yaml(), end="")
        return 0
    if options.seeds and options.folds:
        raise ConfigError("--seeds and --folds do not go together")
    folder = _run_folder(config, options)
    if not options.seeds and not options.folds:
        _one_run(config, folder, options.resume)
        return 0
    if options.folds:
        parts = {"folds": options.folds}
        runs = {
            f"fold-{fold}": dataclasses.replace(
                config, data_options={**config.data_options, **parts, "fold": fold}
            )
            for fold in range(options.folds)
        }
    else:
        runs = {f"seed-{seed}": dataclasses.replace(config, seed=seed) for seed in options.seeds}
    results = {name: _one_run(part, folder / name, options.resume) for name, part in runs.items()}
    summary = spread(list(results.values()))
    (folder / "summary.json").write_text(json.dumps({"runs": results, "summary": summary}, indent=2) + "\n")
    print(f"\n{len(results)} runs, mean ± deviation:")
    for name, value in summary.items():
        print(f"  {name:22} {value['mean']:.4f} ± {value['deviation']:.4f}")
    print(f"in {folder / 'summary.json'}")
    return 0


def spread(results: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Mean and sample deviation of the metrics that all runs have."""
    import statistics

    names = [name for name in results[0] if all(name in result for result in results)]
    summary = {}
    for name in names:
        values = [float(result[name]) for result in results]
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        summary[name] = {"mean": statistics.fmean(values), "deviation": deviation}
    return summary


def _run_folder(config: Any, options: argparse.Namespace) -> Path:
    from .train.distributed import launched
    from .train.engine import STATE

    if options.out:
        return Path(options.out)
    if launched().size > 1:
        from .train.config import ConfigError

        raise ConfigError("several processes need --out, the run folder that they share")
    stem = f"{config.model.replace('/', '-')}-{config.data}"
    runs = {
        int(path.name[len(stem) + 1 :]): path
        for path in Path("runs").glob(f"{stem}-*")
        if path.name[len(stem) + 1 :].isdigit()
    }
    started = [number for number, path in runs.items() if any(path.glob(f"**/{STATE}"))]
    if options.resume != "never" and started:
        return runs[max(started)]
    return Path("runs") / f"{stem}-{max(runs, default=0) + 1}"


def _one_run(config: Any, folder: Path, resume: str) -> dict[str, float]:
    from .train.checkpoint import BEST
    from .train.distributed import launched
    from .train.engine import fit

    main_process = launched().rank == 0
    best = fit(config, folder, resume)
    if main_process and best:
        print(f"\nbest epoch {int(best['epoch']) + 1}: accuracy {best.get('accuracy', float('nan')):.4f}")
        for name, what in (
            (BEST, "checkpoint"),
            ("curves.png", "curves"),
            ("confusion.png", "confusion matrix"),
            ("explain.png", "a face explained"),
            ("metrics.json", "metrics"),
        ):
            if (folder / name).is_file():
                print(f"  {what:17} {folder / name}")
    return {name: value for name, value in best.items() if isinstance(value, (int, float))}


# fer eval


def _evaluate(options: argparse.Namespace) -> int:
    from .metrics import paired_bootstrap

    _check_folder("--json", options.json)
    _check_folder("--picture", options.picture)
    found = [_evaluate_one(Path(path), options) for path in options.checkpoint]
    for path, (predictions, classes) in zip(options.checkpoint, found, strict=True):
        print(f"{path}:")
        for name, value in predictions.metrics().items():
            print(f"  {name:22} {value:.4f}" if name != "samples" else f"  {name:22} {int(value)}")
        confusion = predictions.confusion
        for name, row in zip(classes, confusion, strict=True):
            share = row[list(classes).index(name)] / max(row.sum(), 1)
            print(f"    {name:10} {share:7.2%} of {int(row.sum())}")
    report: dict[str, Any] = {
        str(path): {
            "metrics": predictions.metrics(),
            "classes": list(classes),
            "confusion": predictions.confusion.tolist(),
        }
        for path, (predictions, classes) in zip(options.checkpoint, found, strict=True)
    }
    if len(found) == 2:
        test = paired_bootstrap(found[0][0], found[1][0])
        report["paired_bootstrap"] = test
        print(
            f"difference in accuracy {test['difference']:+.4f}, 95 % of resamples within "
            f"[{test['low']:+.4f}, {test['high']:+.4f}], "
            + ("p < 0.001" if test["p_value"] < 0.001 else f"p = {test['p_value']:.3f}")
        )
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=2) + "\n")
    if options.picture:
        from .train import pictures

        pictures.confusion(found[0][0].confusion, found[0][1], options.picture)
    return 0


def _evaluate_one(path: Path, options: argparse.Namespace) -> tuple[Any, Sequence[str]]:
    from .data import DATASETS, create_dataset, eval_transform
    from .train.checkpoint import BEST, load_checkpoint
    from .train.config import ConfigError, TrainConfig
    from .train.distributed import World, pick_device
    from .train.engine import validation_split
    from .train.evaluate import evaluate, input_side, wants_imagenet

    file, run = (path / BEST, path) if path.is_dir() else (path, path.parent)
    model, about = load_checkpoint(file)
    config = TrainConfig.read(run / "config.yaml") if (run / "config.yaml").is_file() else None
    data = options.data or (config.data if config else about.get("data"))
    if not data:
        raise ConfigError(f"{file} does not say what it was validated on; name it with --data")
    same = config is not None and data == config.data
    root = options.root or (config.root if config and same else "")
    kept = {**config.data_options, **config.valid_options} if config and same else {}
    if data in DATASETS and DATASETS[data].counts_classes and "classes" in about:
        kept.setdefault("classes", len(about["classes"]))
    device = pick_device(options.device)
    size = options.size or about.get("size") or input_side(model)
    transform = eval_transform(size, imagenet=wants_imagenet(model))
    split = options.split or validation_split(data, config.valid_split if config and same else "")
    dataset = create_dataset(
        data, root or None, split, transform=transform, **{**kept, **pairs(options.data_options)}
    )
    if dataset.num_classes != len(about.get("classes", dataset.classes)):
        raise ConfigError(
            f"{file} knows {len(about['classes'])} classes and {data} has {dataset.num_classes}; "
            f"--data-options classes={len(about['classes'])}"
        )
    predictions = evaluate(
        model.to(device),
        dataset,
        world=World(0, 1, device),
        batch_size=options.batch_size,
        workers=options.workers,
        flip=options.flip,
    )
    return predictions, dataset.classes


def _check_folder(option: str, path: str | None) -> None:
    """That there is a place for a file, before the work whose result it takes."""
    if path and Path(path).is_dir():
        raise ValueError(f"{option} {path} is a folder; name a file")
    if path and not Path(path).parent.is_dir():
        raise FileNotFoundError(f"{option} {path}: there is no folder {Path(path).parent}")


# fer predict, fer explain


def _predict(options: argparse.Namespace) -> int:
    import csv

    from .data import DataError
    from .predict import Predictor

    _check_folder("--csv", options.csv)
    predictor = Predictor(
        options.model,
        options.device,
        detector=options.detector,
        faces=options.faces,
        flip=options.flip,
        batch_size=options.batch_size,
    )
    rows = []
    alone = len(options.path) == 1
    for path in options.path:
        try:
            found = predictor.rows(path, every=options.every, progress=sys.stderr.isatty())
        except (DataError, FileNotFoundError) as error:
            if alone:
                raise
            found = [predictor.no_result({"image": path}, str(error).removeprefix("Predictor: "))]
        rows += found if alone else [{"path": path, **row} for row in found]
    wrong = sum(bool(row["error"]) for row in rows)
    if options.csv:
        columns = list(dict.fromkeys(name for row in rows for name in row))
        with open(options.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
        print(f"{len(rows)} rows in {options.csv}" + (f", {wrong} with an error" if wrong else ""))
    else:
        for row in rows:
            name = row["image"] + (f" frame {row['frame']}" if "frame" in row else "")
            if row["error"]:
                print(f"{name}: {row['error']}")
                continue
            shares = sorted(((row[label], label) for label in predictor.classes), reverse=True)
            likely = ", ".join(f"{label} {share:.0%}" for share, label in shares[:3])
            affect = ""
            if row["valence"] is not None:
                affect = f"; valence {row['valence']:+.2f}, arousal {row['arousal']:+.2f}"
            print(f"{name}: {likely}{affect} ({row['note']})")
    return USER_MISTAKE if wrong == len(rows) else 0  # a folder's bad images are in their rows


def _explain(options: argparse.Namespace) -> int:
    from .data.base import crop
    from .explain import explain
    from .predict import Predictor, to_pixels

    _check_folder("--out", options.out)
    if Path(options.image).is_dir():
        raise ValueError(f"{options.image} is a folder; name an image")
    predictor = Predictor(options.model, options.device, detector=options.detector)
    image = to_pixels(options.image)
    (result,) = predictor(image)
    explain(
        predictor.model,
        crop(image, result.box),
        options.out,
        classes=predictor.classes,
        size=predictor.size,
        node=tuple(options.node) if options.node else None,
        layers=options.layers,
    )
    print(
        f"{result.label} {result.probabilities[result.label]:.0%} ({result.note}); picture in {options.out}"
    )
    return 0


# fer bench, fer data, fer info


def _bench(options: argparse.Namespace) -> int:
    from .train.speed import measure

    rows = measure(
        options.model,
        batch_size=options.batch_size,
        size=options.size,
        device=options.device,
        amp=options.amp,
        seconds=options.seconds,
    )
    print(f"{'backend':10} {'inference':>14} {'training step':>14}   images a second")
    for backend, inference, training in rows:
        print(f"{backend:10} {inference:14.1f} {training:14.1f}")
    if len(rows) == 2:
        print(f"{'ratio':10} {rows[0][1] / rows[1][1]:13.2f}x {rows[0][2] / rows[1][2]:13.2f}x")
    return 0


def _data_check(options: argparse.Namespace) -> int:
    from .data import check

    report = check(options.path, options.name, **pairs(options.data_options))
    print(report)
    return 0 if report.ok else USER_MISTAKE


def _data_preview(options: argparse.Namespace) -> int:
    from .data import preview

    dataset = _dataset(options)
    preview(dataset, options.out)
    print(f"{dataset}\nin {options.out}")
    return 0


def _data_speed(options: argparse.Namespace) -> int:
    from .train.engine import make_transform
    from .train.speed import loading_rate

    transform = make_transform(options.size, options.augment, imagenet=True)
    rate = loading_rate(_dataset(options, transform), workers=options.workers, seconds=options.seconds)
    print(f"{rate:.0f} images a second at {options.size} pixels, {options.workers} processes")
    return 0


def _data_list(options: argparse.Namespace) -> int:
    from .data import DATASETS

    for name, kind in DATASETS.items():
        print(f"{name:12} {(kind.__doc__ or '').splitlines()[0].replace('``', '')}")
    return 0


def _info(options: argparse.Namespace) -> int:
    import torch

    from . import create_model, list_models
    from .train.config import recipes

    print("models" + " " * 20 + "parameters  input")
    for name in list_models():
        with torch.device("meta"):
            model = create_model(name)
        count = sum(parameter.numel() for parameter in model.parameters())
        print(f"  {name:24} {count / 1e6:6.2f} M   {model.default_cfg['input_size'][-1]} pixels")
    if options.models:
        return 0
    print(f"\nrecipes\n  {', '.join(recipes())}\n")
    from fer_kernels import info

    print(info.readable(info.collect()))
    return 0


if __name__ == "__main__":
    from .train.distributed import leave

    leave(main())

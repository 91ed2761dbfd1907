"""A table of the runs OUT/NAME/seed-N that `fer train --seeds` left: `python tools/results.py OUT`."""

import json
import statistics
import sys
from pathlib import Path

import yaml

from fer_models.train.checkpoint import BEST, load_checkpoint
from fer_models.train.config import TrainConfig
from fer_models.train.engine import FREE  # what does not change a result

COLUMNS = ("accuracy", "mean_class_accuracy", "macro_f1")
HEAD = """# Results

From scratch on FERPlus' training split (FER2013Train, probability protocol, votes as targets), validated on
FER2013Valid (majority protocol), no test-time averaging; the best epoch of each run, in the precision that it
was trained in (autocast to bfloat16, unless its command says `--no-amp`). All with the recipe
[ferplus_face2nodes_xs](../fer_models/recipes/ferplus_face2nodes_xs.yaml) and the options listed below.
Everything on this page is written by `tools/ferplus_results.sh DATA OUT EPOCHS SEEDS`. The weights that come
with the package were trained for longer: [weights](weights) says what they reach.

| model | parameters | epochs | seeds | accuracy | mean class accuracy | macro F1 |
|---|---:|---:|---:|---:|---:|---:|"""


def parameters(file: Path) -> int:
    return sum(parameter.numel() for parameter in load_checkpoint(file)[0].parameters())


RECIPE = "ferplus_face2nodes_xs"


def command(run: Path) -> str:
    """What differs from the recipe, as it is typed."""
    recipe, config = TrainConfig.read(RECIPE), TrainConfig.read(run / "config.yaml")
    words = [f"fer train {RECIPE} --root DATA"]
    for name, value in vars(config).items():
        if name in (*FREE, "seed") or value == getattr(recipe, name):
            continue
        if isinstance(value, bool):
            words.append(f"--{'' if value else 'no-'}{name.replace('_', '-')}")
            continue
        if isinstance(value, dict):
            value = " ".join(f'"{key}={json.dumps(item)}"' for key, item in value.items())
        words.append(f"--{name.replace('_', '-')} {value}")
    return " ".join(words)


def main(out: Path) -> None:
    rows, commands = [], []
    for folder in sorted(out.iterdir()):
        runs = sorted(run for run in folder.glob("seed-*") if (run / "metrics.json").is_file())
        if not runs:
            continue
        found = [json.loads((run / "metrics.json").read_text()) for run in runs]
        config = yaml.safe_load((runs[0] / "config.yaml").read_text())
        cells = []
        for name in COLUMNS:
            values = [100 * metrics[name] for metrics in found]
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.2f}{spread}")
        count = parameters(runs[0] / BEST)
        first = [folder.name, f"{count / 1e6:.2f} M", str(config["epochs"]), str(len(runs))]
        commands.append(f"- {folder.name}: `{command(runs[0])}`")
        rows.append((statistics.fmean(metrics["accuracy"] for metrics in found), [*first, *cells]))
    print(HEAD)
    for _, cells in sorted(rows, reverse=True):
        print(f"| {' | '.join(cells)} |")
    print("\nThe commands, each with `--seeds`:\n")
    print("\n".join(commands))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

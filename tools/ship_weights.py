"""Puts a run's best weights into the package as float16, and writes their model card from `fer eval`:

    python tools/ship_weights.py RUN TAG --root DATA

RUN is the folder of a run on FERPlus; the card's numbers are those of the shipped file, not of the run's.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import yaml

from fer_models.train.checkpoint import BEST, load_checkpoint, save_checkpoint

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS, CARDS = ROOT / "fer_models" / "weights", ROOT / "docs" / "weights"

CARD = """# {model}, `{tag}`

`fer_models.create_model("{model}", pretrained="{tag}")`, or `fer predict photo.jpg --model {model}.{tag}`.
{parameters:.2f} million parameters, float16, {size_mb:.1f} MB.

## What it is for

Research on facial expressions, and a start for training on data of your own. It answers what expression a
face *shows* in the sense of its data's annotators, among {classes}.
It does not say what a person feels, and should not be used to judge people, for decisions about them, or to
watch them without their knowledge.

It takes a crop of one face, roughly frontal, as FER2013's crops are: from brow or hair to chin, in gray or
colour (it was trained on gray), resized to {side} x {side} pixels, RGB. A photo with more in it than a face
needs a detector first (`--detector opencv`).

## Data and training

Trained from scratch on FERPlus (Barsoum et al. 2016: ten votes for every image of FER2013), on the official
training split (FER2013Train) alone. The epoch was chosen by accuracy on the validation split (FER2013Valid),
on which the numbers below were measured; the test split was not used. The recipe, as run:

```yaml
{recipe}```

## Measured

On FER2013Valid, majority protocol, {samples} images, no test-time averaging:

```sh
{command}
```

| metric | |
|---|---:|
{metrics}

| class | recognised | images |
|---|---:|---:|
{by_class}

Confusion (rows are the truth, columns the answer):

| |{heads}|
|---|{rules}|
{confusion}

## Limits

- Contempt, disgust and fear are rare in the data; their rates above rest on few images.
{never}- FER2013's images come from web searches for words of emotions; everyday faces are harder.
- The data's balance of ages, origins and sexes is unknown and uneven; error rates differ between groups, and
  were not measured by group because the data does not say who is who.
- FERPlus' training and validation splits share 222 images pixel for pixel (`fer data check DATA`).
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("tag")
    parser.add_argument("--root", required=True, help="FERPlus")
    options = parser.parse_args()
    if not options.tag.isidentifier():
        parser.error(f"the tag must be a word, got {options.tag!r}")

    model, about = load_checkpoint(options.run / BEST)
    name = about["model"]
    file = WEIGHTS / f"{name}.{options.tag}.safetensors"
    WEIGHTS.mkdir(exist_ok=True)
    kept = {key: about[key] for key in ("model", "options", "classes", "size", "data", "epoch")}
    save_checkpoint(file, model, kept, half=True)

    report = options.run / "shipped.json"
    command = ["eval", str(file), "--data", "ferplus", "--root", options.root]
    command += ["--data-options", "protocol=majority", "--json", str(report)]
    try:
        subprocess.run([sys.executable, "-m", "fer_models.cli", *command], check=True)
    except subprocess.CalledProcessError:
        file.unlink()  # no weights without a card
        raise
    result = next(iter(json.loads(report.read_text()).values()))

    recipe = yaml.safe_load((options.run / "config.yaml").read_text())
    recipe["root"] = "DATA"
    matrix, classes, metrics = result["confusion"], result["classes"], result["metrics"]
    lines = []
    for label, row in enumerate(matrix):
        lines.append(f"| {classes[label]} | {row[label] / max(sum(row), 1):.1%} | {sum(row)} |")
    card = CARD.format(
        model=name,
        tag=options.tag,
        parameters=sum(parameter.numel() for parameter in model.parameters()) / 1e6,
        size_mb=file.stat().st_size / 1e6,
        side=about["size"],
        classes=", ".join(classes[:-1]) + " and " + classes[-1],
        recipe=yaml.safe_dump(recipe, sort_keys=False),
        samples=f"{int(metrics['samples']):,}",
        command=f"fer eval fer_models/weights/{file.name} \\\n"
        "  --data ferplus --root DATA --data-options protocol=majority",
        metrics="\n".join(
            f"| {key.replace('_', ' ')} | {value:.2%} |" for key, value in metrics.items() if key != "samples"
        ),
        by_class="\n".join(lines),
        never="".join(
            f"- It recognised none of the {sum(row)} images of {label}.\n"
            for label, row in zip(classes, matrix, strict=True)
            if sum(row) and not row[classes.index(label)]
        ),
        heads="|".join(f" {label} " for label in classes),
        rules="|".join("---:" for _ in classes),
        confusion="\n".join(
            f"| {label} | " + " | ".join(map(str, row)) + " |"
            for label, row in zip(classes, matrix, strict=True)
        ),
    )
    CARDS.mkdir(parents=True, exist_ok=True)
    (CARDS / f"{name}.{options.tag}.md").write_text(card)
    print(f"{file}\n{CARDS / f'{name}.{options.tag}.md'}")


if __name__ == "__main__":
    main()

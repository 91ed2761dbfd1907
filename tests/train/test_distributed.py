"""Two processes on a CPU (gloo) do what one does at the same global batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from fer_models.metrics import Predictions
from fer_models.train.checkpoint import load_checkpoint

ROOT = Path(__file__).resolve().parents[2]
# A network without batch norm, whose statistics are those of a process's part of the batch, and without
# biases of keys, whose gradients are zero but for rounding: AdamW makes whole steps of it
VIT = ("img_size=32", "patch_size=8", "embed_dim=32", "depth=1", "num_heads=2", "qkv_bias=False")
RUN = (
    *("train", "--model", "timm/vit_tiny_patch16_224", "--model-options", *VIT, "--size", "32"),
    *("--epochs", "2", "--batch-size", "16", "--workers", "0", "--accumulate", "2", "--lr", "1e-3"),
    *("--data-options", "length=77", "size=32"),  # neither batch nor processes divide it
)


def run(folder: Path, processes: int) -> None:
    start = [sys.executable, "-m"]
    if processes > 1:
        start += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    done = subprocess.run(
        [*start, "fer_models.cli", *RUN, "--out", str(folder)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]


def test_two_processes_train_and_evaluate_like_one(tmp_path):
    for processes in (1, 2):
        run(tmp_path / str(processes), processes)
    one, two = (load_file(tmp_path / name / "last.safetensors") for name in ("1", "2"))
    assert one.keys() == two.keys()
    largest = {name: float((one[name] - two[name]).abs().max()) for name in one}
    assert max(largest.values()) <= 1e-5, largest
    logs = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("1", "2")]
    assert logs[0]["samples"] == logs[1]["samples"] == 77


EVALUATE = """
import pickle, sys, torch
from fer_models.data import create_dataset, eval_transform
from fer_models.train.checkpoint import load_checkpoint
from fer_models.train.distributed import joined
from fer_models.train.evaluate import evaluate

with joined("cpu") as world:
    model, _ = load_checkpoint(sys.argv[1])
    data = create_dataset("synthetic", None, "valid", transform=eval_transform(32), length=77, size=32)
    found = evaluate(model, data, world=world, batch_size=8, workers=0, progress=False)
    if world.main:
        torch.save({"index": torch.tensor(found.index), "p": torch.tensor(found.probabilities)}, sys.argv[2])
"""


def test_evaluation_is_exact_on_a_set_that_does_not_divide(tmp_path):
    run(tmp_path / "run", 1)
    script = tmp_path / "script.py"
    script.write_text(EVALUATE)
    found = []
    for processes in (1, 2):
        result = tmp_path / f"{processes}.pt"
        start = [sys.executable]
        if processes > 1:
            start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        subprocess.run(
            [*start, str(script), str(tmp_path / "run" / "best.safetensors"), str(result)],
            check=True,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )
        found.append(torch.load(result, weights_only=True))
    one, two = found
    assert one["index"].tolist() == two["index"].tolist() == list(range(77))
    # The batches differ, and with them the last bits of a matrix product
    assert torch.allclose(one["p"], two["p"], rtol=0, atol=1e-6)
    label = torch.arange(77) % 8
    metrics = [
        Predictions(one["index"].numpy(), label.numpy(), part["p"].numpy()).metrics() for part in found
    ]
    assert metrics[0] == metrics[1]
    assert load_checkpoint(tmp_path / "run" / "best.safetensors")[1]["model"].startswith("timm/")


AVERAGE = """
import sys, torch
from torch.nn.parallel import DistributedDataParallel
from fer_models import create_model
from fer_models.train.distributed import joined, leave

with joined("cpu") as world:
    torch.manual_seed(0)
    model = create_model("lnlattennet_xs", num_classes=3, momentum=0.5)
    before = model.region_average.clone()
    torch.manual_seed(world.rank)
    output = DistributedDataParallel(model)(torch.randn(4, 3, 32, 32), full=True)
    output.logits.sum().backward()
    found = {"before": before, "after": model.region_average, "weights": output.aux["region_weights"]}
    torch.save({name: tensor.detach() for name, tensor in found.items()}, f"{sys.argv[1]}/{world.rank}.pt")
leave(0)
"""


def test_region_averages_are_over_all_processes(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(AVERAGE)
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run(
        [*start, str(script), str(tmp_path)],
        check=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert torch.equal(first["after"], second["after"])
    means = [part["weights"].mean(0) for part in (first, second)]
    assert (means[0] - means[1]).abs().max() > 1e-4  # so that it matters whose they are
    expected = first["before"].lerp(sum(means) / 2, 0.5)
    torch.testing.assert_close(first["after"], expected, rtol=0, atol=1e-6)

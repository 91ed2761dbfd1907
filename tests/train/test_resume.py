"""A run that is killed and resumed ends with the weights of an unbroken one."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
RUN = (
    *("train", "--model", "face2nodes_nano", "--data", "synthetic"),
    *("--epochs", "2", "--batch-size", "16", "--save-steps", "2", "--workers", "0", "--ema", "0.9"),
    *("--data-options", "length=96", "size=32", "--size", "32", "--mixup", "0.2"),
    *("--model-options", "dims=[32]", "depths=[1]", "stride=4", "drop_path_rate=0.1", "drop_rate=0.1"),
)


def command(folder: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "fer_models.cli", *RUN, "--out", str(folder), *more]


def run(folder: Path, *more: str, expect: int = 0) -> str:
    done = subprocess.run(command(folder, *more), capture_output=True, text=True, env=environment(), cwd=ROOT)
    assert done.returncode == expect, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    run(folder)
    return folder


def same_weights(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def assert_same(one: Path, other: Path) -> None:
    for name in ("last.safetensors", "best.safetensors"):
        assert same_weights(load_file(one / name), load_file(other / name)), name
    states = [torch.load(folder / "last.pt", weights_only=True) for folder in (one, other)]
    assert same_weights(states[0]["model"], states[1]["model"])
    assert states[0]["step"] == states[1]["step"] == 12
    assert states[0]["best"] == states[1]["best"]


def test_two_runs_are_equal(unbroken, tmp_path):
    run(tmp_path / "run")
    assert_same(unbroken, tmp_path / "run")


@pytest.mark.parametrize("seed", range(2))
def test_killed_at_a_random_moment(unbroken, tmp_path, seed):
    folder = tmp_path / "run"
    draws = random.Random(seed)
    for _ in range(2):
        process = subprocess.Popen(
            command(folder, "--resume", "auto"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment(),
            cwd=ROOT,
        )
        # Once there is a checkpoint to resume from, at any moment, also while one is written
        deadline = time.monotonic() + 120
        while not (folder / "last.pt").is_file() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(draws.uniform(0, 1.0))
        process.kill()
        process.wait()
    run(folder, "--resume", "auto")
    assert_same(unbroken, folder)
    assert not list(folder.glob(".*.tmp")) or (folder / "last.pt").is_file()
    assert len((folder / "log.csv").read_text().splitlines()) == 3


def test_interrupted_by_ctrl_c(unbroken, tmp_path):
    folder = tmp_path / "run"
    process = subprocess.Popen(
        command(folder, "--save-steps", "1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        cwd=ROOT,
    )
    deadline = time.monotonic() + 120
    while not (folder / "last.pt").is_file() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130 and "--resume auto" in errors, errors[-2000:]
    run(folder, "--resume", "must")
    assert_same(unbroken, folder)


def test_resuming_refuses_another_configuration(unbroken):
    text = run(unbroken, "--resume", "auto", "--lr", "0.5", expect=2)
    assert "lr 0.001 -> 0.5" in text
    text = run(unbroken, expect=2)
    assert "holds a run already" in text

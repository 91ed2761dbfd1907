"""The examples run as they stand."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {
        **os.environ,
        "PATH": path,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_NUM_THREADS": "1",
        **more,
    }


@pytest.mark.parametrize(
    "arguments, says",
    [
        (("own_loop.py", "--epochs", "1", "--steps", "2"), "accuracy 0."),
        (("timm_finetune.py", "--epochs", "1", "--steps", "2"), "averaged weights in finetuned.pth"),
        (("kernels_alone.py",), "on the reference"),
    ],
)
def test_example(arguments, says, tmp_path):
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / arguments[0]), *arguments[1:]],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and says in done.stdout, done.stdout + done.stderr


def test_two_hosts(tmp_path):
    """Both on this machine, on the CPU."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    tiny = (
        *("--model", "face2nodes_nano", "--data", "synthetic", "--device", "cpu", "--epochs", "1"),
        *("--batch-size", "16", "--workers", "0", "--size", "32", "--out", str(tmp_path / "run")),
        *("--data-options", "length=64", "size=32", "--model-options", "dims=[32]", "depths=[1]", "stride=4"),
    )
    hosts = [
        subprocess.Popen(
            [str(EXAMPLES / "two_hosts.sh"), *tiny],
            env=environment(HOST=str(host), MAIN="127.0.0.1", PORT=port, GPUS="0"),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for host in range(2)
    ]
    said = [host.communicate(timeout=300)[0] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], said
    assert (tmp_path / "run" / "best.safetensors").is_file()

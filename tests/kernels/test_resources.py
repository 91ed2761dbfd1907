"""What importing costs and how much memory the CPU kernels take: measured in processes of their own."""

import subprocess
import sys

import pytest
from support import backends

PEAK = """
import gc, torch, fer_kernels
torch.set_num_threads(2)
x = torch.randn(8, 3136, 48)
fer_kernels.dilated_knn(x[:, :64].contiguous(), k=9, backend="cpu")  # threads, code

def peak_kib():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

gc.collect()
with open("/proc/self/clear_refs", "w") as reset:
    reset.write("5")
before = peak_kib()
idx = fer_kernels.dilated_knn(x, k=9, backend="cpu")
print(peak_kib() - before - idx.numel() * 8 // 1024)
"""


@pytest.mark.skipif("cpu" not in backends("knn"), reason="no compiled CPU module")
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_knn_holds_less_than_a_mebibyte_a_thread():
    out = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True).stdout
    # The (B, N, M) distances alone would be 300,000 KiB.
    assert int(out) < 2 * 1024, f"{out} KiB beyond the output"


def test_import_loads_no_heavy_module():
    script = (
        "import sys, torch; before = set(sys.modules); import fer_kernels;"
        "print(sorted(m.split('.')[0] for m in set(sys.modules) - before))"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    for heavy in ("triton", "PIL", "matplotlib", "numpy.testing", "timm", "scipy"):
        assert f"'{heavy}'" not in out


def test_import_prints_nothing():
    done = subprocess.run(
        [sys.executable, "-c", "import fer_kernels, fer_models"], capture_output=True, text=True, check=True
    )
    assert done.stdout == ""

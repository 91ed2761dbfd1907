"""What users do to the source tree: sdist, wheel, an install without nvcc, without any compiler."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NVCC = next(
    (
        p
        for p in (os.environ.get("CUDA_HOME", ""), "/usr/local/cuda")
        if p and (Path(p) / "bin" / "nvcc").is_file()
    ),
    None,
)
KNOBS = (
    "CUDA_HOME",
    "FORCE_CUDA",
    "FER_KERNELS_SKIP_CUDA",
    "FER_KERNELS_SKIP_CPU",
    "TORCH_CUDA_ARCH_LIST",
    "CXX",
)


def environment(**settings: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if name not in (*KNOBS, "PYTHONPATH")}
    return clean | settings


def run(*command: object, cwd: Path, expect: int = 0, **settings: str) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment(**settings),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert (done.returncode == 0) == (expect == 0), done.stdout[-6000:]
    return done.stdout


def build(kind: str, tree: Path, into: Path | None = None, expect: int = 0, **settings: str) -> str:
    """`python -m build` of an sdist or a wheel with what is installed; without `into` below the tree."""
    where = ["--outdir", into] if into else []
    options = [f"--{kind}", "--no-isolation", "--skip-dependency-check", *where]
    return run(sys.executable, "-m", "build", *options, cwd=tree, expect=expect, **settings)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """The source tree as an sdist, unpacked: what every build below starts from."""
    folder = tmp_path_factory.mktemp("sdist")
    tree = folder / "tree"
    ignore = shutil.ignore_patterns(
        ".git",
        "build",
        "dist",
        "*.egg-info",
        "*.so",
        "_build_info.json",
        "__pycache__",
        ".*_cache",
        ".hypothesis",
        ".venv",
        "runs",
    )
    shutil.copytree(ROOT, tree, ignore=ignore)
    build(
        "sdist",
        tree,
        folder,
    )
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


def build_wheel(sdist: Path, folder: Path, **settings: str) -> tuple[Path, str]:
    tree = folder / "tree"
    shutil.copytree(sdist, tree)
    log = build(
        "wheel",
        tree,
        folder,
        **settings,
    )
    (wheel,) = folder.glob("*.whl")
    return wheel, log


def installed(wheel: Path, folder: Path) -> Path:
    """The wheel's files as a folder for PYTHONPATH, beside the torch of this environment."""
    target = folder / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def names(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


@pytest.fixture(scope="module")
def cpu_wheel(sdist, tmp_path_factory) -> tuple[Path, Path, str]:
    """Built where no nvcc can be found: CUDA_HOME names a folder that holds none."""
    folder = tmp_path_factory.mktemp("cpu_wheel")
    wheel, log = build_wheel(sdist, folder, CUDA_HOME=str(folder / "no_toolkit"))
    return wheel, installed(wheel, folder), log


def test_sdist_holds_all_sources(sdist):
    held = {str(path.relative_to(sdist)) for path in sdist.rglob("*") if path.is_file()}
    tracked = {
        str(p.relative_to(ROOT))
        for top in ("csrc", "fer_kernels", "fer_models")
        for p in (ROOT / top).rglob("*")
        if p.suffix in (".py", ".cpp", ".h", ".cu", ".typed")
    }
    assert tracked <= held
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE"} <= held
    assert not [name for name in held if name.endswith((".so", "_build_info.json"))]


def test_wheel_without_nvcc(cpu_wheel):
    wheel, site, log = cpu_wheel
    assert "the cuda module is LEFT OUT: no CUDA toolkit found; looked at" in log
    held = names(wheel)
    assert any(name.startswith("fer_kernels/_cpu.") and name.endswith(".so") for name in held)
    assert not any(name.startswith("fer_kernels/_cuda.") for name in held)
    assert "fer_models/__init__.py" in held and "fer_kernels/knn/triton.py" in held
    data = [
        path for path in (ROOT / "fer_models").rglob("*") if path.suffix in (".yaml", ".json", ".safetensors")
    ]
    assert len(data) > 5 and {str(path.relative_to(ROOT)) for path in data} <= set(held)
    assert not [
        name
        for name in held
        if name.endswith((".cpp", ".cu", ".h")) or name.startswith(("tests", "benchmarks"))
    ]
    info = json.loads((site / "fer_kernels" / "_build_info.json").read_text())
    assert "no CUDA toolkit found" in info["cuda_left_out"] and info["torch"]


def test_everything_but_cuda_works_without_nvcc(cpu_wheel, tmp_path):
    _, site, _ = cpu_wheel
    info = json.loads(
        run(sys.executable, "-m", "fer_kernels.info", "--json", cwd=tmp_path, PYTHONPATH=str(site))
    )
    assert info["operators"]["knn"]["cpu"]["missing because"] == []
    reasons = " ".join(info["operators"]["knn"]["cuda"]["missing because"])
    assert "not built: no CUDA toolkit found" in reasons
    script = (
        "import torch, fer_kernels as f\n"
        "x = torch.randn(2, 49, 16)\n"
        "a = f.dilated_knn(x, k=9, backend='cpu')\n"
        "assert (a == f.dilated_knn(x, k=9, backend='reference')).float().mean() > 0.95\n"
        "import fer_models\n"
    )
    run(sys.executable, "-c", script, cwd=tmp_path, PYTHONPATH=str(site))


def test_without_any_compiled_module(sdist, tmp_path):
    wheel, log = build_wheel(sdist, tmp_path, FER_KERNELS_SKIP_CPU="1", FER_KERNELS_SKIP_CUDA="1")
    assert "the cpu module is LEFT OUT: FER_KERNELS_SKIP_CPU" in log
    assert not [name for name in names(wheel) if name.endswith(".so")]
    site = installed(wheel, tmp_path)
    script = (
        # an editable installation would offer its own compiled module
        "import sys\nsys.meta_path = [f for f in sys.meta_path if 'editable' not in str(f)]\n"
        "import torch, fer_kernels as f\n"
        "x = torch.randn(2, 20, 8, requires_grad=True)\n"
        "print(f.available_backends('knn'))\n"
        "idx = f.dilated_knn(x, k=4)\n"
        "graph = torch.compile(lambda x: f.dilated_knn(x, k=4), fullgraph=True, backend='aot_eager')\n"
        "assert (graph(x) == idx).all()\n"
        "try:\n    f.dilated_knn(x, k=4, backend='cpu')\n"
        "except RuntimeError as error:\n    print(error)\n"
    )
    out = run(sys.executable, "-c", script, cwd=tmp_path, PYTHONPATH=str(site))
    assert "['reference']" in out or "['reference', 'triton']" in out
    assert "not built: FER_KERNELS_SKIP_CPU was set when it was installed" in out


def test_force_cuda_without_a_toolkit_fails(sdist, tmp_path):
    shutil.copytree(sdist, tmp_path / "tree")
    log = build(
        "wheel",
        tmp_path / "tree",
        expect=1,
        FORCE_CUDA="1",
        CUDA_HOME=str(tmp_path / "none"),
        FER_KERNELS_SKIP_CPU="1",
    )
    assert "FORCE_CUDA is set, but no CUDA toolkit found; looked at" in log


def test_no_compiler_says_what_to_do(sdist, tmp_path):
    shutil.copytree(sdist, tmp_path / "tree")
    log = build(
        "wheel",
        tmp_path / "tree",
        expect=1,
        CXX="no-such-compiler",
        FER_KERNELS_SKIP_CUDA="1",
    )
    assert "no C++ compiler: looked for 'no-such-compiler'" in log and "FER_KERNELS_SKIP_CPU=1" in log


def test_broken_module_is_told_from_a_missing_one(cpu_wheel, tmp_path):
    site = tmp_path / "site"
    shutil.copytree(cpu_wheel[1], site)
    (module,) = (site / "fer_kernels").glob("_cpu.*.so")
    module.write_bytes(b"not a library")
    out = run(sys.executable, "-m", "fer_kernels.info", cwd=tmp_path, PYTHONPATH=str(site))
    assert "was built (against torch" in out and "but does not load under torch" in out


def test_a_checkout_uses_the_installed_modules(cpu_wheel, tmp_path):
    """Python started in a source tree imports that tree's fer_kernels, which nobody compiled."""
    tree = tmp_path / "checkout"
    shutil.copytree(
        ROOT / "fer_kernels",
        tree / "fer_kernels",
        ignore=shutil.ignore_patterns("*.so", "_build_info.json", "__pycache__"),
    )
    script = "import fer_kernels as f; print(f.__file__, f.available_backends('knn'))"
    out = run(sys.executable, "-c", script, cwd=tree, PYTHONPATH=str(cpu_wheel[1]))
    assert str(tree) in out and "'cpu'" in out


def test_editable_install(sdist, tmp_path):
    """In an environment of its own that sees this one's packages."""
    tree = tmp_path / "tree"
    shutil.copytree(sdist, tree)
    # Without a pip of its own: Python 3.11's would bring a setuptools too old for this build.
    venv.create(tmp_path / "env")
    python = tmp_path / "env" / "bin" / "python"
    site = next((tmp_path / "env").glob("lib/python*/site-packages"))
    # All packages of this environment but an installed fer_kernels, which would come first.
    shared = tmp_path / "shared"
    shared.mkdir()
    for folder in (Path(p) for p in sys.path if p.endswith("site-packages")):
        for entry in folder.iterdir():
            if (
                not entry.name.startswith(("fer_kernels", "fer_models"))
                and not (shared / entry.name).exists()
            ):
                (shared / entry.name).symlink_to(entry)
    (site / "shared.pth").write_text(str(shared))
    run(
        python,
        "-m",
        "pip",
        "install",
        "--no-build-isolation",
        "--no-deps",
        "-e",
        tree,
        cwd=tmp_path,
        FER_KERNELS_SKIP_CUDA="1",
    )
    script = "import fer_kernels as f; print(f.__file__, f.available_backends('knn'))"
    out = run(python, "-c", script, cwd=tmp_path)
    assert str(tree) in out and "'cpu'" in out


@pytest.mark.skipif(NVCC is None, reason="no CUDA toolkit")
def test_wheel_with_nvcc(sdist, tmp_path):
    wheel, _ = build_wheel(sdist, tmp_path, CUDA_HOME=NVCC, TORCH_CUDA_ARCH_LIST="9.0+PTX", FORCE_CUDA="1")
    held = names(wheel)
    assert wheel.stat().st_size < 40e6
    for module in ("_cpu", "_cuda"):
        assert any(name.startswith(f"fer_kernels/{module}.") and name.endswith(".so") for name in held)
    site = installed(wheel, tmp_path)
    info = json.loads((site / "fer_kernels" / "_build_info.json").read_text())
    assert info["cuda_architectures"] == ["9.0+PTX"] and "cuda_left_out" not in info
    out = json.loads(
        run(sys.executable, "-m", "fer_kernels.info", "--json", cwd=tmp_path, PYTHONPATH=str(site))
    )
    reasons = " ".join(out["operators"]["knn"]["cuda"]["missing because"])
    assert "not built" not in reasons and "does not load" not in reasons
    if out["versions"]["cuda of torch"] is not None:
        assert out["cuda build"]["architectures"] == "9.0+PTX"


@pytest.mark.skipif(NVCC is None, reason="no CUDA toolkit")
def test_a_failing_cuda_compile_leaves_the_rest(sdist, tmp_path):
    tree = tmp_path / "broken"
    shutil.copytree(sdist, tree)
    with open(tree / "csrc" / "cuda" / "knn.cu", "a") as source:
        source.write("\nthis is no C++\n")
    log = build(
        "wheel",
        tree,
        tmp_path,
        CUDA_HOME=NVCC,
        TORCH_CUDA_ARCH_LIST="9.0",
        FER_KERNELS_SKIP_CPU="1",
    )
    assert "the cuda module is LEFT OUT: nvcc of" in log
    log = build(
        "wheel",
        tree,
        expect=1,
        CUDA_HOME=NVCC,
        TORCH_CUDA_ARCH_LIST="9.0",
        FER_KERNELS_SKIP_CPU="1",
        FORCE_CUDA="1",
    )
    assert "this is no C" in log

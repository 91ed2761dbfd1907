"""Builds fer_kernels._cpu (always) and fer_kernels._cuda (where nvcc is found) with ninja.

The environment variables are described in docs/environment.md. torch's own build helpers are not
used: they take CUDA's folder from whatever `nvcc` is on PATH, which may be a wrapper script, and
insist on torch's CUDA version, which the stable ABI makes irrelevant.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # torch 2.11: one build runs on every later torch
X86_FLAGS = {
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"],
}
DEFAULT_ARCHITECTURES = "8.0;9.0+PTX"


def flag(name: str) -> bool:
    return os.environ.get(name, "0") not in ("", "0")


def say(message: str) -> None:
    print(f"fer_kernels: {message}", file=sys.stderr, flush=True)


def find_cuda_home() -> tuple[Path | None, str]:
    """The toolkit's folder, and where it was looked for."""
    looked = []
    if os.environ.get("CUDA_HOME"):  # a wish is final: no second guess behind the user's back
        candidates = [("CUDA_HOME", Path(os.environ["CUDA_HOME"]))]
    else:
        candidates = [("default", Path("/usr/local/cuda"))]
        if on_path := shutil.which("nvcc"):
            candidates.append(("PATH", Path(on_path).resolve().parent.parent))
        else:
            looked.append("nvcc on PATH (none)")
    for origin, folder in candidates:
        looked.append(f"{folder} ({origin})")
        if (folder / "bin" / "nvcc").is_file() and (folder / "include" / "cuda_runtime_api.h").is_file():
            return folder, ", ".join(looked)
    return None, ", ".join(looked)


def visible_gpus() -> list[str]:
    """Compute capabilities of this machine's GPUs, without loading a driver into this process."""
    try:
        out = subprocess.run(
            ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return sorted({line.strip() for line in out.splitlines() if line.strip()})


def architectures() -> list[str]:
    wish = os.environ.get("TORCH_CUDA_ARCH_LIST") or ";".join(visible_gpus()) or DEFAULT_ARCHITECTURES
    return wish.replace(",", ";").replace(" ", ";").strip(";").split(";")


def gencode(architecture: str) -> list[str]:
    number = architecture.removesuffix("+PTX").replace(".", "")
    flags = [f"-gencode=arch=compute_{number},code=sm_{number}"]
    if architecture.endswith("+PTX"):
        flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def max_jobs() -> int:
    """MAX_JOBS, else as many compilers as cores and free memory (3 GB each) allow."""
    if os.environ.get("MAX_JOBS"):
        return max(1, int(os.environ["MAX_JOBS"]))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return cores
    return max(1, min(cores, int(free / 3e9)))


class NinjaBuild(build_ext):
    def run(self) -> None:
        import torch

        self.torch_root = Path(torch.__file__).resolve().parent
        self.info = {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "built": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
            "platform": platform.platform(),
        }
        built = []
        if flag("FER_KERNELS_SKIP_CPU"):
            self.leave_out("cpu", "FER_KERNELS_SKIP_CPU was set when it was installed")
        else:
            self.build_cpu()
            built.append("_cpu")
        if self.build_cuda_if_possible():
            built.append("_cuda")
        self.extensions = [e for e in self.extensions if e.name.rsplit(".", 1)[1] in built]
        self.info_path().write_text(json.dumps(self.info, indent=2) + "\n")
        if self.inplace:
            self.copy_extensions_to_source()

    def info_path(self) -> Path:
        folder = ROOT if self.inplace else Path(self.build_lib)
        (folder / "fer_kernels").mkdir(parents=True, exist_ok=True)
        return folder / "fer_kernels" / "_build_info.json"

    def get_outputs(self) -> list[str]:
        return [*super().get_outputs(), str(self.info_path())]

    def leave_out(self, name: str, reason: str) -> None:
        self.info[f"{name}_left_out"] = reason
        say(f"the {name} module is LEFT OUT: {reason}")

    def build_cpu(self) -> None:
        compiler = shlex.split(os.environ.get("CXX", "c++"))
        if shutil.which(compiler[0]) is None:
            raise CompileError(
                f"fer_kernels: no C++ compiler: looked for {compiler[0]!r} (CXX names another). Install one "
                "(Debian and Ubuntu: apt install g++), or set FER_KERNELS_SKIP_CPU=1 to install without "
                "compiled CPU code: the reference and Triton backends work without it."
            )
        self.info["compiler"] = first_line([*compiler, "--version"])
        sources = ROOT / "csrc"
        commands = [self.host_object(compiler, sources / "bindings" / "cpu.cpp", [])]
        isas = {"baseline": []} | (X86_FLAGS if platform.machine() in ("x86_64", "AMD64") else {})
        for source in sorted((sources / "cpu").glob("*.cpp")):
            for isa, flags in isas.items():
                commands.append(self.kernel_object(compiler, source, isa, flags))
        self.link(compiler, "_cpu", commands, ["-ltorch_cpu"])

    def build_cuda_if_possible(self) -> bool:
        """Whether the CUDA module was built; with FORCE_CUDA=1 anything else is an error."""
        force = flag("FORCE_CUDA")
        if flag("FER_KERNELS_SKIP_CUDA"):
            self.leave_out("cuda", "FER_KERNELS_SKIP_CUDA was set when it was installed")
            return False
        home, looked = find_cuda_home()
        if home is None:
            reason = (
                f"no CUDA toolkit found; looked at {looked}. The reference, cpu and triton backends work "
                "without it; to build it, install the toolkit, or name its folder: CUDA_HOME=/path/to/cuda pip install ."
            )
            if force:
                raise CompileError(f"fer_kernels: FORCE_CUDA is set, but {reason}")
            self.leave_out("cuda", reason)
            return False
        try:
            self.build_cuda(home)
        except CompileError as error:
            if force:
                raise
            self.leave_out(
                "cuda",
                f"nvcc of {home} failed ({error}). The reference, cpu and triton backends work without it; "
                "FORCE_CUDA=1 pip install -v . shows the compiler's own words",
            )
            return False
        return True

    def build_cuda(self, home: Path) -> None:
        wanted = architectures()
        compiler = shlex.split(os.environ.get("CXX", "c++"))
        nvcc = home / "bin" / "nvcc"
        self.info["nvcc"] = first_line([str(nvcc), "--version"], -1)
        self.info["cuda_home"] = str(home)
        self.info["cuda_architectures"] = wanted
        sources = ROOT / "csrc"
        include = [f"-I{home / 'include'}", "-DUSE_CUDA", f'-DFER_CUDA_ARCHS="{";".join(wanted)}"']
        commands = [self.host_object(compiler, sources / "bindings" / "cuda.cpp", include)]
        flags = [
            "-std=c++17",
            "-O3",
            "-Xcompiler",
            "-fPIC,-fvisibility=hidden",
            "-lineinfo",
            "--threads",
            "1",
        ]
        for source in sorted((sources / "cuda").glob("*.cu")):
            out = self.object_path(source, "cuda")
            arch = [part for a in wanted for part in gencode(a)]
            commands.append(
                (
                    out,
                    source,
                    [
                        str(nvcc),
                        *flags,
                        *arch,
                        f"-I{sources / 'include'}",
                        f"-I{sources}",
                        "-MD",
                        "-MF",
                        f"{out}.d",
                        "-c",
                        str(source),
                        "-o",
                        str(out),
                    ],
                )
            )
        library = next(p for p in (home / "lib64", home / "lib") if p.is_dir())
        self.link(
            compiler,
            "_cuda",
            commands,
            [
                "-ltorch_cpu",
                "-ltorch_cuda" if self.has("torch_cuda") else "",
                f"-L{library}",
                "-lcudart_static",
                "-lrt",
                "-lpthread",
                "-ldl",
            ],
        )

    def has(self, library: str) -> bool:
        return (self.torch_root / "lib" / f"lib{library}.so").is_file()

    def object_path(self, source: Path, variant: str) -> Path:
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{source.parent.name}_{source.stem}.{variant}.o"

    def kernel_object(self, compiler: list[str], source: Path, isa: str, flags: list[str]) -> tuple:
        out = self.object_path(source, isa)
        return (
            out,
            source,
            [
                *compiler,
                "-std=c++20",
                "-O3",
                "-ffp-contract=fast",
                "-fPIC",
                "-fvisibility=hidden",
                "-Wall",
                "-Wno-maybe-uninitialized",  # gcc's own AVX-512 headers
                *flags,
                f"-I{ROOT / 'csrc' / 'include'}",
                "-MD",
                "-MF",
                f"{out}.d",
                "-c",
                str(source),
                "-o",
                str(out),
            ],
        )

    def host_object(self, compiler: list[str], source: Path, flags: list[str]) -> tuple:
        try:
            import pybind11

            pybind = pybind11.get_include()
        except ImportError:  # torch carries the headers too
            pybind = str(self.torch_root / "include")
        out = self.object_path(source, "host")
        include = self.torch_root / "include"
        return (
            out,
            source,
            [
                *compiler,
                "-std=c++20",
                "-O2",
                "-fPIC",
                "-fvisibility=hidden",
                STABLE_ABI,
                *flags,
                f"-I{ROOT / 'csrc' / 'include'}",
                f"-I{ROOT / 'csrc'}",
                f"-isystem{pybind}",
                f"-isystem{include}",
                f"-isystem{sysconfig.get_paths()['include']}",
                "-MD",
                "-MF",
                f"{out}.d",
                "-c",
                str(source),
                "-o",
                str(out),
            ],
        )

    def link(self, compiler: list[str], name: str, commands: list[tuple], libraries: list[str]) -> None:
        target = Path(self.get_ext_fullpath(f"fer_kernels.{name}")).resolve()
        if self.inplace:  # setuptools copies it to the source tree afterwards
            target = Path(self.build_lib).resolve() / self.get_ext_filename(f"fer_kernels.{name}")
        target.parent.mkdir(parents=True, exist_ok=True)
        objects = [str(out) for out, _, _ in commands]
        link = [
            *compiler,
            "-shared",
            *objects,
            f"-L{self.torch_root / 'lib'}",
            *filter(None, libraries),
            "-Wl,--as-needed",
            "-o",
            str(target),
        ]
        lines = ["ninja_required_version = 1.3", "rule run", "  command = $cmd", "  description = $what", ""]
        for out, source, command in commands:
            lines += [
                f"build {escape(out)}: run {escape(source)}",
                f"  cmd = {quote(command)}",
                f"  what = {name}: {source.name} -> {out.name}",
                f"  depfile = {escape(out)}.d",
                "  deps = gcc",
            ]
        lines += [
            f"build {escape(target)}: run {' '.join(map(escape, objects))}",
            f"  cmd = {quote(link)}",
            f"  what = link {name}",
            f"default {escape(target)}",
            "",
        ]
        script = Path(self.build_temp).resolve() / f"{name}.ninja"
        script.write_text("\n".join(lines))
        self.run_ninja(script)

    def run_ninja(self, script: Path) -> None:
        try:
            import ninja

            program = str(Path(ninja.BIN_DIR) / "ninja")
        except ImportError:
            program = shutil.which("ninja") or ""
        if not program:
            raise CompileError(
                "fer_kernels: ninja is missing: pip install ninja (or build without --no-build-isolation)"
            )
        command = [program, "-f", str(script), "-j", str(max_jobs()), "-C", str(script.parent)]
        say(f"compiling with {max_jobs()} job(s): {script.name}")
        if subprocess.run(command, stdout=sys.stderr).returncode:
            raise CompileError(f"compiling {script.stem} failed; the messages above say why")


def first_line(command: list[str], index: int = 0) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout.strip().splitlines()[index]


def escape(path: Path | str) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def quote(command: list[str]) -> str:
    return shlex.join(map(str, command)).replace("$", "$$")


setup(
    ext_modules=[Extension("fer_kernels._cpu", sources=[]), Extension("fer_kernels._cuda", sources=[])],
    cmdclass={"build_ext": NinjaBuild},
)

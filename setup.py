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
CSRC = ROOT / "csrc"
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # torch 2.11: one build runs on every later torch
X86_FLAGS = {
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"],
}
# For the one kernel file that has products of bfloat16.
BFLOAT16_FLAGS = {"linear": ("avx512bf16", [*X86_FLAGS["avx512"], "-mavx512bf16"])}
DEFAULT_ARCHITECTURES = "8.0;9.0+PTX"


def flag(name: str) -> bool:
    return os.environ.get(name, "0") not in ("", "0")


def cxx() -> list[str]:
    return shlex.split(os.environ.get("CXX", "")) or ["c++"]


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
        try:
            return max(1, int(os.environ["MAX_JOBS"]))
        except ValueError:
            raise CompileError(
                f"fer_kernels: MAX_JOBS must be a number, got {os.environ['MAX_JOBS']!r}"
            ) from None
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
        for name, build in (("_cpu", self.build_cpu_if_wanted), ("_cuda", self.build_cuda_if_possible)):
            if not build():
                # What an earlier build left behind must not be packed as this one's.
                for folder in (Path(self.build_lib), *([ROOT] if self.inplace else [])):
                    self.module_path(folder, name).unlink(missing_ok=True)
                self.extensions = [e for e in self.extensions if e.name != f"fer_kernels.{name}"]
        self.info_path().write_text(json.dumps(self.info, indent=2) + "\n")
        if self.inplace:
            self.copy_extensions_to_source()

    def info_path(self) -> Path:
        folder = ROOT if self.inplace else Path(self.build_lib)
        (folder / "fer_kernels").mkdir(parents=True, exist_ok=True)
        return folder / "fer_kernels" / "_build_info.json"

    def module_path(self, folder: Path, name: str) -> Path:
        return folder / self.get_ext_filename(f"fer_kernels.{name}")

    def get_outputs(self) -> list[str]:
        return [*super().get_outputs(), str(self.info_path())]

    def leave_out(self, name: str, reason: str) -> None:
        self.info[f"{name}_left_out"] = reason
        say(f"the {name} module is LEFT OUT: {reason}")

    def build_cpu_if_wanted(self) -> bool:
        if flag("FER_KERNELS_SKIP_CPU"):
            self.leave_out("cpu", "FER_KERNELS_SKIP_CPU was set when it was installed")
            return False
        compiler = cxx()
        if shutil.which(compiler[0]) is None:
            raise CompileError(
                f"fer_kernels: no C++ compiler: looked for {compiler[0]!r} (CXX names another). Install one "
                "(Debian and Ubuntu: apt install g++), or set FER_KERNELS_SKIP_CPU=1 to install without "
                "compiled CPU code: the reference and Triton backends work without it."
            )
        self.info["compiler"] = first_line([*compiler, "--version"])
        commands = [self.host_object(compiler, CSRC / "bindings" / "cpu.cpp", [])]
        x86 = platform.machine() in ("x86_64", "AMD64")
        for source in sorted((CSRC / "cpu").glob("*.cpp")):
            isas = {"baseline": []} | (X86_FLAGS if x86 else {})
            if x86 and source.stem in BFLOAT16_FLAGS:
                isas |= [BFLOAT16_FLAGS[source.stem]]
            for isa, flags in isas.items():
                commands.append(self.kernel_object(compiler, source, isa, flags))
        self.link(compiler, "_cpu", commands, ["-ltorch_cpu"])
        return True

    def build_cuda_if_possible(self) -> bool:
        """Whether the CUDA module was built; with FORCE_CUDA=1 anything else is an error."""
        import torch

        rest = "The reference, cpu and triton backends work without it"
        if flag("FER_KERNELS_SKIP_CUDA"):
            if flag("FORCE_CUDA"):
                raise CompileError("fer_kernels: FORCE_CUDA and FER_KERNELS_SKIP_CUDA contradict each other")
            self.leave_out("cuda", "FER_KERNELS_SKIP_CUDA was set when it was installed")
            return False
        home, looked = find_cuda_home()
        problem = None
        if home is None:
            problem = (
                f"no CUDA toolkit found; looked at {looked}. {rest}; to build it, install the toolkit, "
                "or name its folder: CUDA_HOME=/path/to/cuda pip install ."
            )
        elif torch.version.cuda is None:
            # Linked without torch's CUDA library, it would load under no torch at all.
            problem = f"torch {torch.__version__}, which it would be built against, has no CUDA. {rest}"
        else:
            try:
                self.build_cuda(home)
            except CompileError as error:
                problem = (
                    f"nvcc of {home} failed ({error}). {rest}; "
                    "FORCE_CUDA=1 pip install -v . shows the compiler's own words"
                )
        if problem is None:
            return True
        if flag("FORCE_CUDA"):
            raise CompileError(f"fer_kernels: FORCE_CUDA is set, but {problem}")
        self.leave_out("cuda", problem)
        return False

    def build_cuda(self, home: Path) -> None:
        wanted = architectures()
        compiler = cxx()
        nvcc = home / "bin" / "nvcc"
        self.info["nvcc"] = first_line([str(nvcc), "--version"], -1)
        self.info["cuda_home"] = str(home)
        self.info["cuda_architectures"] = wanted
        include = [f"-I{home / 'include'}"]
        named = [f'-DFER_CUDA_ARCHS="{";".join(wanted)}"']
        commands = [self.host_object(compiler, CSRC / "bindings" / "cuda.cpp", include + named)]
        flags = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-lineinfo"]
        targets = [part for architecture in wanted for part in gencode(architecture)]
        for source in sorted((CSRC / "cuda").glob("*.cu")):
            command = [str(nvcc), *flags, *targets, f"-I{CSRC / 'include'}", f"-I{CSRC}"]
            commands.append(self.compile(command, source, "cuda"))
        folders = [f"-L{home / name}" for name in ("lib64", "lib")]
        libraries = ["-ltorch_cpu", "-ltorch_cuda", "-lcudart_static", "-lrt", "-lpthread", "-ldl"]
        self.link(compiler, "_cuda", commands, folders + libraries)

    def object_path(self, source: Path, variant: str) -> Path:
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{source.parent.name}_{source.stem}.{variant}.o"

    def compile(self, command: list[str], source: Path, variant: str) -> tuple[Path, Path, list[str]]:
        """(object, source, whole command), with the headers it reads listed for ninja."""
        out = self.object_path(source, variant)
        return out, source, [*command, "-MD", "-MF", f"{out}.d", "-c", str(source), "-o", str(out)]

    def kernel_object(self, compiler: list[str], source: Path, isa: str, flags: list[str]):
        common = ["-std=c++20", "-O3", "-ffp-contract=fast", "-fPIC", "-fvisibility=hidden", "-Wall"]
        # What gcc says of its own AVX-512 headers.
        common += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
        return self.compile([*compiler, *common, *flags, f"-I{CSRC / 'include'}"], source, isa)

    def host_object(self, compiler: list[str], source: Path, flags: list[str]):
        try:
            import pybind11

            pybind = pybind11.get_include()
        except ImportError:  # torch carries the headers too
            pybind = str(self.torch_root / "include")
        ours = [f"-I{CSRC / 'include'}", f"-I{CSRC}"]
        theirs = [pybind, self.torch_root / "include", sysconfig.get_paths()["include"]]
        common = ["-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden"]
        command = [*compiler, *common, STABLE_ABI, *flags, *ours, *(f"-isystem{path}" for path in theirs)]
        return self.compile(command, source, "host")

    def link(self, compiler: list[str], name: str, commands: list[tuple], libraries: list[str]) -> None:
        target = self.module_path(Path(self.build_lib).resolve(), name)
        target.parent.mkdir(parents=True, exist_ok=True)
        objects = [str(out) for out, _, _ in commands]
        link = [*compiler, "-shared", *objects, f"-L{self.torch_root / 'lib'}", *libraries, "-o", str(target)]
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
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip().splitlines()[index]
    except (OSError, IndexError):
        return "unknown"


def escape(path: Path | str) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def quote(command: list[str]) -> str:
    return shlex.join(map(str, command)).replace("$", "$$")


setup(
    ext_modules=[Extension("fer_kernels._cpu", sources=[]), Extension("fer_kernels._cuda", sources=[])],
    cmdclass={"build_ext": NinjaBuild},
)

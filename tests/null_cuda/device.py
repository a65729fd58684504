"""A CUDA device that counts and does not compute: built from two C files, preloaded by a program.

``runtime.c`` stands in for the CUDA runtime, cuBLAS and NCCL, ``driver.c`` for the driver.
PyTorch's own CUDA build, Triton and inductor run on it as on an H100: their checks, their
allocator, their code for sm_90. No number that comes out of it means anything.
"""

import ctypes
import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
RUNTIME, DRIVER, NVML = "libnull_cuda.so", "libcuda.so.1", "libnvidia-ml.so.1"
# The libraries of torch whose calls must be answered, and the beginnings of those calls' names.
CALLERS = ("libtorch_cuda.so", "libtorch_cuda_linalg.so", "libc10_cuda.so", "libcaffe2_nvrtc.so")
CALLS = re.compile(r"\bU ((?:__)?cuda\w+|cublas\w+|nccl\w+|nvrtc\w+|cu[A-Z]\w+)")
# Calls of the driver that torch looks up by their names when it starts.
LOOKED_UP = re.compile(rb"\0((?:cu|nvml)[A-Z][A-Za-z0-9_]{5,})(?=\0)")
# How the names of what changes torch, NCCL or Triton begin in an environment.
SETTINGS = ("CUDA_", "NCCL_", "NVIDIA_", "PYTORCH_", "TORCH", "TRITON_")
# Warnings, the print of Megatron's arguments, and what of Python's report of a crash is long.
SAID_ALWAYS = re.compile(
    r"warnings?\.warn|Warning: |^ +\w+ \.{3,} |^(INFO|WARNING)\b|^>|^-{5,}|^Extension modules"
)

FOLDER = "NULL_CUDA"  # the environment variable of programs on the device


def lacking() -> str | None:
    """What this machine lacks to build the device, in words; None if nothing."""
    for program in ("gcc", "nm"):
        if shutil.which(program) is None:
            return f"the null CUDA device is built with {program}, which is not here"
    if not (_package("torch") / "lib/libtorch_cuda.so").is_file():
        return "this build of torch is without CUDA"
    return None


def engine_lacking() -> str | None:
    """Why Transformer Engine's layers cannot run on the device; None if they can."""
    if engine_libraries():
        return None
    return (
        "Transformer Engine's extension for PyTorch is not installed; it is built by the command "
        "in docs/null-device.md"
    )


def engine_libraries() -> list[Path]:
    """Those of Transformer Engine: its kernels' and that of PyTorch's extension; empty unless both
    are installed."""
    kernels = _package("transformer_engine") / "wheel_lib/libtransformer_engine.so"
    extension = importlib.util.find_spec("transformer_engine_torch")
    if extension is None or not kernels.is_file():
        return []
    return [kernels, Path(extension.origin)]


def build(cache: Path) -> Path:
    """Build the device into a folder of ``cache``, unless it is there; returns the folder."""
    torch, triton, nvidia = (_package(name) for name in ("torch", "triton", "nvidia"))
    sources = [HERE / "runtime.c", HERE / "driver.c"]
    version = hashlib.sha256(b"".join(path.read_bytes() for path in (*sources, Path(__file__))))
    version.update((torch / "version.py").read_bytes())
    engine = engine_libraries()
    version.update(" ".join(f"{path} {path.stat().st_size}" for path in engine).encode())
    callers = [*(torch / "lib" / name for name in CALLERS), *engine]
    folder = cache / version.hexdigest()[:16]
    if (folder / RUNTIME).is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    headers = [*nvidia.glob("*/include"), triton / "backends/nvidia/include"]
    calls = set[str]()
    for caller in callers:
        calls.update(CALLS.findall(_run("nm", "--dynamic", "--undefined-only", caller)))
    for caller in (torch / "lib/libc10_cuda.so", *engine):
        calls.update(name.decode() for name in LOOKED_UP.findall(caller.read_bytes()))
    # The runtime last: it says that all is there.
    for source, library, own in zip(
        reversed(sources), (DRIVER, RUNTIME), (is_of_driver, is_of_runtime), strict=True
    ):
        text = source.read_text(encoding="utf-8")
        missing = sorted(
            name for name in calls if own(name) and not re.search(rf"\b{name}\b", text)
        )
        fill = folder / f"missing_in_{source.name}"
        lines = [f'void {name}(void) {{ null_cuda_missing("{name}"); }}' for name in missing]
        declaration = "void null_cuda_missing(const char *) __attribute__((weak));"
        fill.write_text("\n".join([declaration, *lines, ""]), encoding="utf-8")
        flags = [f"-I{path}" for path in headers]
        partial = folder / f"{library}.{os.getpid()}"
        _run("gcc", "-shared", "-fPIC", "-O1", "-w", *flags, source, fill, "-o", partial, "-ldl")
        if library == DRIVER:
            (folder / NVML).unlink(missing_ok=True)
            (folder / NVML).symlink_to(DRIVER)
        partial.replace(folder / library)
    return folder


def is_of_driver(name: str) -> bool:
    return re.match(r"(cu|nvml)[A-Z]", name) is not None and not name.startswith("cuFile")


def is_of_runtime(name: str) -> bool:
    return re.match(r"(cu|nvml)[A-Z]", name) is None


def environment(folder: Path) -> dict[str, str]:
    """What a program needs to run on the device in ``folder``; compiled kernels are kept beside."""
    # The tests' own process runs on the CPU, and what it has imported may have set more.
    inherited = {n: v for n, v in os.environ.items() if not n.startswith(SETTINGS)}
    return inherited | {
        FOLDER: str(folder),
        "LD_PRELOAD": str(folder / RUNTIME),
        "LD_LIBRARY_PATH": f"{folder}:{os.environ.get('LD_LIBRARY_PATH', '')}",
        "TRITON_LIBCUDA_PATH": str(folder),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "TORCH_NCCL_ENABLE_MONITORING": "0",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
        # As the launchers have it.
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
    }


def run(folder: Path, module: str, arguments: Sequence[str], timeout: float = 1200) -> str:
    """The output of ``python -m module`` on the device.

    Raises:
        AssertionError: it failed; the message ends with the last lines that tell why.
    """
    command = [sys.executable, "-X", "faulthandler", "-m", module, *arguments]
    process = subprocess.run(
        command,
        env=environment(folder),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=timeout,
    )
    output = process.stdout + process.stderr
    assert process.returncode == 0, f"exit code {process.returncode}\n{_telling(output)}"
    return output


def _telling(output: str) -> str:
    """The last lines of ``output`` that are not said by every run."""
    lines = [line for line in output.splitlines() if line.strip() and not SAID_ALWAYS.search(line)]
    return "\n".join(lines[-60:])


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    return Path(spec.submodule_search_locations[0]) if spec else Path()


def _run(*command: str | Path) -> str:
    process = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-6000:]
    return process.stdout


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(Path(os.environ[FOLDER], RUNTIME)))
    library.null_cuda_name.restype = ctypes.c_char_p
    library.null_cuda_count.restype = ctypes.c_long
    return library


@functools.cache
def event_names() -> list[str]:
    """What is counted, in words."""
    library, names = _library(), []
    while (name := library.null_cuda_name(len(names))) is not None:
        names.append(name.decode())
    return names


def counts() -> dict[str, int]:
    """How often each event has happened in this process, which runs on the device."""
    return {name: _library().null_cuda_count(i) for i, name in enumerate(event_names())}


def trace(path: Path | None) -> None:
    """Write each event to ``path`` from now on, ``name, what, bytes`` in a line; None ends it."""
    _library().null_cuda_trace(None if path is None else str(path).encode())

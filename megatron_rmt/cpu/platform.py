"""Run Megatron on a machine without CUDA: gloo, CPU tensors, the same training code.

Megatron-LM asks ``torch.cuda`` for its device, its streams and its random state, and allocates with
``device="cuda"``. ``install()`` lets the CPU answer those questions, so that ``pretrain()`` itself
runs unchanged. Nothing here is used, or imported, where CUDA is present.

Do not load Hugging Face *models* in a process in which this is installed: they also look at
``torch.cuda`` and were seen to build wrong rotary tables. Tokenizers are fine.
"""

import collections
import contextlib
import functools
import os
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.utils.data

from megatron_rmt.cpu import compiled

CPU = torch.device("cpu")

# The Megatron flags without which its CUDA-only kernels would be chosen.
REQUIRED_FLAGS: dict[str, str | None] = {
    "--transformer-impl": "local",
    "--distributed-backend": "gloo",
    "--use-cpu-initialization": None,
    "--disable-jit-fuser": None,
    "--no-gradient-accumulation-fusion": None,
    "--no-masked-softmax-fusion": None,
    "--no-bias-gelu-fusion": None,
    "--no-bias-swiglu-fusion": None,
    "--no-bias-dropout-fusion": None,
    "--no-rope-fusion": None,
    "--no-persist-layer-norm": None,
}

_FACTORIES = [
    "arange",
    "as_tensor",
    "empty",
    "empty_like",
    "empty_strided",
    "eye",
    "full",
    "full_like",
    "linspace",
    "ones",
    "ones_like",
    "rand",
    "rand_like",
    "randint",
    "randn",
    "randn_like",
    "tensor",
    "tril_indices",
    "triu_indices",
    "zeros",
    "zeros_like",
]

_ABSENT = object()
# (owner, name, its own value there or _ABSENT, what ``install()`` put in its place).
_replacements: list[tuple[Any, str, Any, Any]] = []


def is_installed() -> bool:
    """Whether ``install()`` has been called in this process."""
    return bool(_replacements)


def add_required_flags(argv: Sequence[str]) -> list[str]:
    """``argv`` with every flag of ``REQUIRED_FLAGS`` that it lacks; given values are kept.

    SwiGLU's fusion stays on where ``layer_kernels`` provides it.
    """
    given = {word.split("=", 1)[0] for word in argv}
    added: list[str] = []
    for flag, value in REQUIRED_FLAGS.items():
        if flag == "--no-bias-swiglu-fusion" and compiled.is_available():
            continue
        if flag not in given:
            added += [flag] if value is None else [flag, value]
    return [*argv, *added]


def install() -> None:
    """Let the CPU stand in for the CUDA device of Megatron. Harmless when called twice.

    Raises:
        RuntimeError: CUDA is available; the stand-in would hide the GPU.
    """
    if is_installed():
        return
    if torch.cuda.is_available():
        raise RuntimeError(
            "megatron_rmt.cpu.platform.install() was called although CUDA is available; "
            "remove the call, Megatron runs on the GPU as it is."
        )
    _share_cores_between_ranks()
    _leave_the_cores_to_this_thread()
    _answer_device_questions()
    _answer_random_state_questions()
    _let_cuda_device_mean_cpu()
    _name_cuda_tensor_types()
    _load_data_without_pinned_memory()
    _exchange_by_sizes_on_the_host()
    # torch.optim asks the (absent) driver whether a graph is being captured.
    for name in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"):
        _replace(torch.optim.Optimizer, name, lambda self: None)
    _stand_aside_while_torch_compiles()
    from megatron_rmt.cpu import hybrid_layers, layer_kernels, local_attention

    layer_kernels.install()
    local_attention.install()
    hybrid_layers.install()


def _replace(owner: Any, name: str, replacement: Any) -> None:
    _replacements.append((owner, name, vars(owner).get(name, _ABSENT), replacement))
    setattr(owner, name, replacement)


def _stand_aside_while_torch_compiles() -> None:
    """``torch.compile`` asks ``torch.cuda`` what to compile for, and must hear the truth."""

    def put_originals_back(_: Any) -> None:
        for owner, name, original, _ in reversed(_replacements):
            if original is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, original)

    def put_replacements_in(_: Any) -> None:
        for owner, name, _, replacement in _replacements:
            setattr(owner, name, replacement)

    torch._dynamo.callback_handler.register_start_callback(put_originals_back)
    torch._dynamo.callback_handler.register_end_callback(put_replacements_in)


def _share_cores_between_ranks() -> None:
    """torchrun gives each of several ranks OMP_NUM_THREADS=1; give it its share of the cores."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
    if ranks == 0 or os.environ.get("OMP_NUM_THREADS") != "1":
        return
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))


def _leave_the_cores_to_this_thread() -> None:
    """Let gloo's threads compute, copies mostly, by themselves.

    Where one of them has a second OpenMP thread there are more of these than cores, and OpenMP
    then puts threads to sleep at the end of each parallel loop, this thread's too: each loop takes
    60 us more. A thread keeps its own number of threads, a new one takes the number set last.
    """
    torch.set_num_threads(torch.get_num_threads())
    setter = threading.Thread(target=torch.set_num_threads, args=(1,))
    setter.start()
    setter.join()


class _Properties:
    """What ``torch.cuda.get_device_properties`` says of the stand-in."""

    name = "cpu"
    major = minor = 0
    multi_processor_count = 1

    @property
    def total_memory(self) -> int:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _free_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


class _Profiler:
    """What ``torch.cuda.cudart`` starts and stops for an external profiler: nothing."""

    def cudaProfilerStart(self) -> int:  # noqa: N802 CUDA's own name
        return 0

    def cudaProfilerStop(self) -> int:  # noqa: N802
        return 0


class _Done:
    """A CUDA event that has always happened, or a stream with nothing in it: CPU work is done when
    the call returns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def record(self, *args: Any) -> None: ...
    def synchronize(self) -> None: ...
    def wait(self, *args: Any) -> None: ...
    def wait_event(self, *args: Any) -> None: ...
    def wait_stream(self, *args: Any) -> None: ...
    def record_event(self, *args: Any) -> "_Done":
        return _Done()

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: "_Done") -> float:
        return 0.0

    def __enter__(self) -> "_Done":
        return self

    def __exit__(self, *args: Any) -> None: ...


def _answer_device_questions() -> None:
    cuda = torch.cuda
    answers: dict[str, Any] = {
        "is_available": True,
        "is_initialized": True,
        "device_count": max(8, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))),
        "current_device": CPU,
        "set_device": None,
        "synchronize": None,
        "empty_cache": None,
        "get_device_name": "cpu",
        "get_device_capability": (0, 0),
        "get_device_properties": _Properties(),
        "current_stream": _Done(),
        "default_stream": _Done(),
        "set_stream": None,
        "stream": contextlib.nullcontext(),
        "is_current_stream_capturing": False,
        "memory_allocated": 0,
        "max_memory_allocated": 0,
        "memory_reserved": 0,
        "max_memory_reserved": 0,
        "reset_peak_memory_stats": None,
        # There is no caching allocator: every count, by whatever name, is 0.
        "memory_stats": collections.Counter(),
        "memory_snapshot": [],
        # No sensors.
        "temperature": 0,
        "power_draw": 0,
        "utilization": 0,
        "clock_rate": 0,
        "cudart": _Profiler(),
        "check_error": None,
        "_lazy_init": None,
    }
    for name, answer in answers.items():
        _replace(cuda, name, _constant(answer))
    for name in ("Stream", "Event"):
        _replace(cuda, name, _Done)
    _replace(cuda, "_lazy_call", lambda function, **kwargs: function())
    total = _Properties().total_memory
    _replace(cuda, "mem_get_info", lambda *_: (_free_memory(), total))
    _replace(cuda, "device_memory_used", lambda *_: total - _free_memory())
    history = {"segments": [], "device_traces": []}
    _replace(cuda.memory, "_snapshot", _constant(history))
    for name in ("_record_memory_history", "_dump_snapshot"):
        _replace(cuda.memory, name, _constant(None))
    _replace(torch._C, "_cuda_attach_out_of_memory_observer", _constant(None))
    for name in ("range_push", "range_pop", "mark", "range_start", "range_end"):
        _replace(cuda.nvtx, name, _constant(None))
    for name in ("start", "stop"):
        _replace(cuda.profiler, name, _constant(None))
    _replace(torch.autograd.profiler, "emit_nvtx", _constant(contextlib.nullcontext()))


def _constant(answer: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: answer


class _Generators:
    def __getitem__(self, index: int) -> torch.Generator:
        return torch.default_generator

    def __len__(self) -> int:
        return 1


def _answer_random_state_questions() -> None:
    cuda = torch.cuda
    for name in ("manual_seed", "manual_seed_all"):
        _replace(cuda, name, lambda value: torch.default_generator.manual_seed(int(value)))
    for owner in (cuda, cuda.random):
        _replace(owner, "get_rng_state", lambda *_, **__: torch.get_rng_state())
        _replace(owner, "set_rng_state", lambda state, *_, **__: torch.set_rng_state(state))
    _replace(cuda, "default_generators", _Generators())


def _cpu_for_cuda(device: Any) -> Any:
    """The CPU where ``device`` names a CUDA device, else ``device``."""
    if isinstance(device, bool) or not isinstance(device, int | str | torch.device):
        return device
    return CPU if isinstance(device, int) or str(device).startswith("cuda") else device


def _let_cuda_device_mean_cpu() -> None:
    for name in _FACTORIES:
        _replace(torch, name, _with_cpu_device(getattr(torch, name)))
    for owner in (torch.Tensor, torch.nn.Module):
        _replace(owner, "to", _with_cpu_device(owner.to, first_may_be_device=True))
        _replace(owner, "cuda", lambda self, *args, **kwargs: self)
    _replace(torch.Tensor, "new_empty", _with_cpu_device(torch.Tensor.new_empty))
    _replace(torch.Tensor, "pin_memory", lambda self, *args, **kwargs: self)


def _with_cpu_device(
    function: Callable[..., Any], first_may_be_device: bool = False
) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:
            kwargs["device"] = _cpu_for_cuda(kwargs["device"])
        kwargs.pop("pin_memory", None)
        if first_may_be_device and len(args) > 1:
            args = (args[0], _cpu_for_cuda(args[1]), *args[2:])
        return function(*args, **kwargs)

    return call


def _name_cuda_tensor_types() -> None:
    """Megatron's mixed-precision optimizers compare ``Tensor.type()`` with CUDA names."""
    original = torch.Tensor.type

    @functools.wraps(original)
    def named(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        if isinstance(result, str) and not result.startswith("torch.cuda."):
            return result.replace("torch.", "torch.cuda.", 1)
        return result

    _replace(torch.Tensor, "type", named)


def _load_data_without_pinned_memory() -> None:
    original = torch.utils.data.DataLoader.__init__

    @functools.wraps(original)
    def construct(self: Any, *args: Any, **kwargs: Any) -> None:
        # Worker processes would compete with training for the few cores.
        kwargs.update(pin_memory=False, num_workers=0, persistent_workers=False)
        kwargs.pop("prefetch_factor", None)
        original(self, *args, **kwargs)

    _replace(torch.utils.data.DataLoader, "__init__", construct)


def _exchange_by_sizes_on_the_host() -> None:
    """Megatron's token dispatcher makes lists of its split sizes where they lie on a GPU only."""
    original = torch.distributed.all_to_all_single

    @functools.wraps(original)
    def exchange(*args: Any, **kwargs: Any) -> Any:
        for name in ("output_split_sizes", "input_split_sizes"):
            if isinstance(kwargs.get(name), torch.Tensor):
                kwargs[name] = kwargs[name].tolist()
        return original(*args, **kwargs)

    _replace(torch.distributed, "all_to_all_single", exchange)


def install_if_no_cuda() -> bool:
    """``install()`` and add the flags to ``sys.argv`` unless CUDA is there; True if it did."""
    if not is_installed():
        if torch.cuda.is_available():
            return False
        if os.environ.get("RANK", "0") == "0":
            message = "megatron_rmt: there is no CUDA device, so Megatron runs on the CPU"
            print(message, file=sys.stderr)
    install()
    sys.argv[1:] = add_required_flags(sys.argv[1:])
    return True

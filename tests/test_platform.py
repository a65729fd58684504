"""The CPU in the place of CUDA.

Where there is no GPU it is installed in the test process already (``tests.distributed``); what
comes before or during its installation is tested in fresh processes.
"""

import copy
import os
import pickle
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_rmt.cpu import platform as cpu_platform
from megatron_rmt.cpu.platform import REQUIRED_FLAGS, add_required_flags
from tests import tiny_run
from tests.distributed import REPOSITORY
from tests.tiny_run import RMT, TinyInputs

without_cuda = pytest.mark.skipif(
    not cpu_platform.is_installed(), reason="only for machines without CUDA"
)


def _run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONWARNINGS": "ignore"}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_missing_flags_are_added_and_given_ones_kept():
    given = ["--num-layers", "2", "--transformer-impl", "transformer_engine", "--no-rope-fusion"]
    words = add_required_flags(given)
    assert words[: len(given)] == given
    assert words.count("--transformer-impl") == words.count("--no-rope-fusion") == 1
    assert words[words.index("--distributed-backend") + 1] == "gloo"
    assert {word for word in words if word in REQUIRED_FLAGS} == set(REQUIRED_FLAGS)
    assert add_required_flags(words) == words


@pytest.mark.usefixtures("compiling")
def test_swiglu_stays_fused_where_it_is_compiled():
    assert set(REQUIRED_FLAGS) - set(add_required_flags([])) == {"--no-bias-swiglu-fusion"}


def test_a_flag_given_with_an_equals_sign_is_not_added_again():
    words = add_required_flags(["--distributed-backend=nccl"])
    assert "--distributed-backend" not in words


@pytest.mark.multiprocess
def test_refuses_to_hide_a_gpu():
    result = _run(
        """
        import torch
        torch.cuda.is_available = lambda: True
        from megatron_rmt.cpu import platform as cpu_platform
        assert not cpu_platform.install_if_no_cuda()
        assert not cpu_platform.is_installed()
        factory = torch.zeros
        try:
            cpu_platform.install()
        except RuntimeError as error:
            print(error)
        assert torch.zeros is factory
        """
    )
    assert result.returncode == 0, result.stderr
    assert "called although CUDA is available; remove the call" in result.stdout


@without_cuda
@pytest.mark.multiprocess
def test_installing_twice_is_harmless_and_flags_reach_the_command_line():
    result = _run(
        """
        import sys
        import torch
        from megatron_rmt.cpu import platform as cpu_platform
        assert not torch.cuda.is_available()
        assert cpu_platform.install_if_no_cuda()
        once = torch.zeros, torch.Tensor.to, torch.Tensor.type, list(sys.argv)
        assert cpu_platform.install_if_no_cuda()
        cpu_platform.install()
        assert once == (torch.zeros, torch.Tensor.to, torch.Tensor.type, sys.argv)
        assert cpu_platform.is_installed() and torch.cuda.is_available()
        print(sys.argv[1:])
        """,
        "--distributed-backend=gloo",
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("--distributed-backend") == 1
    assert "'--transformer-impl', 'local'" in result.stdout


@without_cuda
def test_cuda_tensors_live_on_the_cpu_under_cuda_names():
    cpu = torch.device("cpu")
    for device in ("cuda", "cuda:0", 0, torch.device("cuda", 0), torch.cuda.current_device()):
        assert torch.zeros(2, device=device).device == cpu, device
        assert torch.zeros(2).to(device).device == cpu, device
        assert torch.zeros(2).to(device=device).device == cpu, device
        assert torch.zeros(2).new_empty(3, device=device).device == cpu, device
    value = torch.arange(3, device="cuda", dtype=torch.int64, pin_memory=True)
    assert value.tolist() == [0, 1, 2]
    assert value.cuda(non_blocking=True).pin_memory() is value
    assert torch.zeros(2).to("cuda", torch.bfloat16).dtype == torch.bfloat16
    assert torch.zeros(2).to(torch.float64).dtype == torch.float64
    module = torch.nn.Linear(2, 3).cuda()
    assert module.to("cuda").weight.device == cpu
    assert copy.deepcopy(module).cuda(0)(torch.ones(1, 2)).shape == (1, 3)
    assert torch.zeros(2).type() == "torch.cuda.FloatTensor"
    assert torch.zeros(2).bfloat16().type() == "torch.cuda.BFloat16Tensor"
    assert torch.zeros(2).type(torch.int32).dtype == torch.int32
    assert torch.zeros(2).half().type("torch.FloatTensor").dtype == torch.float32


@without_cuda
def test_random_state_streams_and_optimizers_answer():
    torch.cuda.manual_seed(3)
    state = torch.cuda.get_rng_state()
    first = torch.rand(4, device="cuda")
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(4), first)
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    assert event.query()
    assert event.elapsed_time(event) == 0
    assert torch.cuda.get_device_properties(0).total_memory > 0
    torch.cuda.synchronize()
    weight = torch.nn.Parameter(torch.ones(2, device="cuda"))
    optimizer = torch.optim.Adam([weight], lr=0.1)
    weight.sum().backward()
    optimizer.step()
    assert (weight < 1).all()
    loader = torch.utils.data.DataLoader(
        [1, 2, 3], num_workers=2, pin_memory=True, persistent_workers=True, prefetch_factor=4
    )
    assert [int(batch) for batch in loader] == [1, 2, 3]


@pytest.mark.parametrize(
    ("variables", "changes"),
    [
        ({}, False),
        ({"OMP_NUM_THREADS": "1"}, False),
        ({"OMP_NUM_THREADS": "2", "LOCAL_WORLD_SIZE": "1"}, False),
        ({"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "1"}, True),
    ],
)
def test_only_the_single_thread_that_torchrun_chose_is_changed(monkeypatch, variables, changes):
    for name in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    cores = len(os.sched_getaffinity(0))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        cpu_platform._share_cores_between_ranks()
        assert torch.get_num_threads() == (cores if changes else 1)
    finally:
        torch.set_num_threads(before)


@pytest.mark.multiprocess
@without_cuda
def test_threads_that_come_later_take_one_core_and_this_one_keeps_its_own():
    """Else gloo's copies make OpenMP put this thread's helpers to sleep after each loop."""
    result = _run(
        """
        import threading, torch
        torch.set_num_threads(3)
        from megatron_rmt.cpu import platform as cpu_platform
        cpu_platform.install()
        counts = [torch.get_num_threads()]
        later = threading.Thread(target=lambda: counts.append(torch.get_num_threads()))
        later.start()
        later.join()
        print(counts)
        """
    )
    assert result.stdout.strip().endswith("[3, 1]"), result.stderr


@without_cuda
def test_memory_and_sensors_answer():
    assert torch.cuda.memory_stats()["allocated_bytes.all.peak"] == 0
    assert not torch.cuda.memory_stats(), "a question leaves nothing behind"
    free, total = torch.cuda.mem_get_info()
    assert 0 < free < total == torch.cuda.get_device_properties(0).total_memory
    assert 0 < torch.cuda.device_memory_used() < total
    sensors = (torch.cuda.temperature, torch.cuda.power_draw, torch.cuda.clock_rate)
    assert all(sensor() == 0 for sensor in sensors)
    assert torch.cuda.memory_snapshot() == []
    torch.cuda.check_error(torch.cuda.cudart().cudaProfilerStart())
    torch.cuda.check_error(torch.cuda.cudart().cudaProfilerStop())


MEASURED = (
    "--log-device-memory-used --log-memory-interval 1 --log-memory-to-tensorboard --log-straggler "
    "--straggler-ctrlr-port 0 --record-memory-history --profile --profile-step-start 0 "
    "--profile-step-end 1 --nvtx-ranges --exit-interval 2"
)


@pytest.mark.multiprocess
@without_cuda
@pytest.mark.parametrize("rmt", [[], RMT], ids=["plain", "RMT"])
def test_what_megatron_measures_is_answered(inputs: TinyInputs, tmp_path: Path, rmt: list[str]):
    snapshot, board = tmp_path / "snapshot.pickle", str(tmp_path / "board")
    flags = [*MEASURED.split(), "--memory-snapshot-path", str(snapshot), "--tensorboard-dir", board]
    log = tiny_run.run(tmp_path / "run", 1, [*inputs.flags(), *rmt, *flags]).log
    assert re.search(r"iteration +2/", log)
    assert re.search(r"total device memory used: [1-9]", log)
    assert pickle.loads(snapshot.read_bytes())["segments"] == []
    events = EventAccumulator(board)
    events.Reload()
    assert [event.value for event in events.Scalars("mem-allocated-bytes")] == [0.0, 0.0]


@without_cuda
def test_megatron_training_imports():
    import megatron.training.training

    assert callable(megatron.training.training.pretrain)


# A model is built, trained for a step by Megatron's own layers, and its parameters are on the CPU.
@without_cuda
def test_a_megatron_model_trains(single_process_megatron):
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        num_layers=1, hidden_size=16, num_attention_heads=2, use_cpu_initialization=True
    )
    model = GPTModel(config, get_gpt_layer_local_spec(), vocab_size=32, max_sequence_length=8)
    tokens = torch.arange(8, device="cuda")[None]
    mask = torch.ones(1, 1, 8, 8, device="cuda").triu(1).bool()
    loss = model(tokens, tokens, mask, labels=tokens).mean()
    loss.backward()
    assert loss.isfinite()
    assert all(p.device.type == "cpu" and p.grad is not None for p in model.parameters())


@without_cuda
@pytest.mark.usefixtures("compiling")
def test_it_stands_aside_while_torch_compiles_also_when_that_fails():
    seen = []

    def backend(graph, inputs):
        seen.append((torch.cuda.is_available(), torch.empty.__name__))
        if len(seen) == 2:
            raise RuntimeError("no code for this")
        return graph.forward

    replaced = torch.empty
    assert torch.equal(
        torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2)), 2 * torch.ones(2)
    )
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="no code for this"):
        torch.compile(lambda x: x * 3, backend=backend)(torch.ones(2))
    assert [available for available, _ in seen] == [False, False]
    assert torch.cuda.is_available()
    assert torch.empty is replaced

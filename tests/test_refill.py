"""Positions that begin where rollouts of others have ended: the tokens of decoding all at once.

On a GPU a batch does so; here the CPU is told limits as a GPU is. ``tests.test_generate`` compares
what is decoded all at once with the stock model.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from megatron.core import parallel_state, tensor_parallel
from torch import Tensor

from megatron_rmt.model.gpt import gpt_model
from megatron_rmt.model.visibility import attach_tree_attention
from megatron_rmt.rollout import generate as generate_module
from megatron_rmt.rollout.generate import StoppedError, generate
from megatron_rmt.rollout.kv_cache import TailCache
from megatron_rmt.rollout.live_rollouts import LiveRollouts, padded_rows
from megatron_rmt.rollout.responses import Rollout
from tests import test_generate as plain
from tests.distributed import run_distributed
from tests.test_forward_step_parallel import Layout, _own_part
from tests.test_generate import CASES, STEM, TOKEN_BYTES, Case, _assert_same, _filled_store
from tests.tiny_model import build_model

pytestmark = pytest.mark.usefixtures("single_process_megatron")

# In the order of the samples, whose documents are of 12 tokens.
MANY = [(0, 0), (0, 4), (0, 11), (1, 1), (1, 5), (1, 6), (2, 2), (2, 3), (2, 10), (3, 0), (3, 9)]
LONG = Case(answer="next", budget=12, temperature=1.5)


def _room_for(positions: int, case: Case) -> int:
    """Bytes of the trunks and of so many positions' tails."""
    thought = case.budget * case.thinks
    bound = case.prompt.bound(thought, warm_up=case.warm_up, truth_tokens=3).tokens
    stem = STEM if case.thinks else STEM + case.close
    tails = positions * case.group * (len(stem) + bound)
    return (sum(map(len, plain._samples())) + tails) * TOKEN_BYTES


@dataclass
class Passes:
    """How many rows each pass of stems began, and each pass of tokens had and wrote."""

    begun: list[int] = field(default_factory=list)
    decoded: list[int] = field(default_factory=list)
    stems_beside_live_rows: int = 0

    def watch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        read, decode = generate_module._Decoder._read_stems, generate_module._Decoder._decode

        def read_stems(decoder: Any, batch: Any, sends: Any) -> None:
            live = batch.live
            if live.begun:
                self.begun.append(len(live.begun))
                self.stems_beside_live_rows += len(live.rows_here) > self.begun[-1] * live.how.group
            read(decoder, batch, sends)

        def decode_tokens(decoder: Any, batch: Any, sends: Any) -> None:
            if batch.live.rows_here:
                self.decoded.append(len(batch.live.rows))
            decode(decoder, batch, sends)

        monkeypatch.setattr(generate_module._Decoder, "_read_stems", read_stems)
        monkeypatch.setattr(generate_module._Decoder, "_decode", decode_tokens)


@pytest.fixture
def by_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate_module, "tells_limits", lambda device: True)


def _both(
    case: Case, at_once: int, monkeypatch: pytest.MonkeyPatch, **changes: Any
) -> tuple[list[list[Rollout]], list[list[Rollout]]]:
    """Responses of positions that take others' places, and of all at once by the CPU's own path."""
    expected = plain._generate(case, MANY, _filled_store())
    monkeypatch.setattr(generate_module, "tells_limits", lambda device: True)
    kv_bytes = _room_for(at_once, case)
    return plain._generate(case, MANY, _filled_store(), kv_bytes=kv_bytes, **changes), expected


@pytest.mark.parametrize("name", CASES)
def test_the_tokens_are_those_of_all_positions_at_once(name: str, monkeypatch: pytest.MonkeyPatch):
    passes = Passes()
    passes.watch(monkeypatch)
    found, expected = _both(CASES[name], 2, monkeypatch)
    _assert_same(found, expected)
    assert passes.begun[0] == len(MANY)
    assert sum(passes.begun[1:]) == len(MANY)
    assert max(passes.begun[1:]) <= 2


@pytest.mark.parametrize("at_once", [1, 3, 10, 11, 50])
def test_the_tokens_do_not_depend_on_how_many_fit(at_once: int, monkeypatch: pytest.MonkeyPatch):
    _assert_same(*_both(LONG, at_once, monkeypatch))


def test_a_few_end_and_others_begin_while_the_rest_goes_on_in_fewer_passes_than_waves(
    monkeypatch: pytest.MonkeyPatch,
):
    expected = plain._generate(LONG, MANY, _filled_store())
    monkeypatch.setattr(generate_module, "tells_limits", lambda device: True)
    passes = Passes()
    passes.watch(monkeypatch)
    plain._generate(LONG, MANY, _filled_store(), kv_bytes=_room_for(4, LONG))
    assert passes.stems_beside_live_rows >= 3
    waves = [expected[:3], expected[3:7], expected[7:]]
    of_waves = sum(max(len(own) for group in wave for own in group) for wave in waves)
    assert len(passes.begun) + len(passes.decoded) < 0.9 * of_waves
    # While positions wait the number of rows stays, and with it what was recorded.
    assert set(passes.decoded[: len(passes.decoded) // 2]) == {padded_rows(4 * LONG.group)}


@pytest.mark.usefixtures("by_limits")
def test_no_more_tails_are_held_than_fit_and_nobodys(monkeypatch: pytest.MonkeyPatch):
    of_layer, held = TailCache.of_layer, set[int]()

    def measured(tails: TailCache, *args: Any) -> tuple[Tensor, Tensor]:
        found = of_layer(tails, *args)
        held.update(len(x) for pair in tails.stored.values() for x in pair)
        return found

    monkeypatch.setattr(TailCache, "of_layer", measured)
    plain._generate(LONG, MANY, _filled_store(), kv_bytes=_room_for(3, LONG))
    assert held == {3 * LONG.group + 1}


@pytest.mark.parametrize("name", ["boxed", "next, forced close", "warm-up", "greedy"])
def test_steps_recorded_before_others_begin_are_run_again_after(
    name: str, monkeypatch: pytest.MonkeyPatch
):
    recorded: list[int] = []

    def record(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        recorded.append(1)
        return plain._record_without_a_gpu(step)

    monkeypatch.setattr(generate_module, "is_recordable", lambda *_: True)
    monkeypatch.setattr(generate_module, "record", record)
    passes = Passes()
    passes.watch(monkeypatch)
    found, expected = _both(CASES[name], 3, monkeypatch)
    _assert_same(found, expected)
    assert len(passes.begun) > 4
    # One for each number of rows, 16 and 8, however often positions begin.
    assert len(recorded) <= 2


@pytest.mark.usefixtures("by_limits")
def test_positions_that_wait_are_given_up_where_a_rank_is_told_to_stop(
    monkeypatch: pytest.MonkeyPatch,
):
    passes, asked = Passes(), []
    passes.watch(monkeypatch)
    how = dataclasses.replace(LONG.settings, kv_bytes=_room_for(2, LONG))

    def stop() -> bool:
        asked.append(1)
        return len(asked) > 4

    with pytest.raises(StoppedError):
        generate(plain._policy(), LONG.prompt, _filled_store(), plain._positions(MANY), how, stop)
    # The flag is read one token late.
    assert len(passes.begun) + len(passes.decoded) <= 7


def test_the_first_positions_begin_and_the_others_where_enough_rows_are_free():
    case = Case(group=3)
    how, bound = case.settings, case.prompt.bound(case.budget)
    on_cpu = torch.device("cpu")
    live = LiveRollouts(plain._positions(MANY), case.prompt, how, bound, on_cpu, True, at_once=3)
    assert live.begun == range(3)
    assert live.rows_here == [*range(9)]
    assert live.alive.tolist() == [True] * 9 + [False] * 7
    for _ in range(2):
        letter = torch.full_like(live.draws(), plain._bytes().index(b"a")).long()
        live.write(letter, torch.zeros(len(letter)))
        live.step += 1
    assert live.steps_of_rows().tolist()[:9] == [2] * 9
    alive = [True] * 9 + [False] * 7
    # Two rows of different positions do not make room for one; nor do eight rows make do with less
    # padding, as long as others wait.
    for ended in (1, 5):
        alive[ended] = False
        assert live.settle(alive) is None
    alive[8] = False
    stay = [0, 2, 3, 4, 6, 7]
    assert live.settle(alive) == stay
    assert live.begun == range(3, 4)
    assert live.rows_here == [*stay, 9, 10, 11]
    assert live.slots.tolist()[:9] == [*stay, 1, 5, 8]
    assert live.steps_of_rows().tolist()[:9] == [2] * 6 + [0] * 3
    assert live.step == 0


def _of_rank(
    layout: Layout, at_once: int, weights: dict[str, Tensor], records: bool
) -> tuple[list[list[Rollout]], int, int, int]:
    """The responses, how many passes of stems and of tokens there were, and how many steps of
    chunks have been recorded. weights: of the whole model. records: steps are."""
    virtual = layout.chunks if layout.chunks > 1 else None
    parallel_state.initialize_model_parallel(
        layout.tensor, layout.pipeline, virtual, create_gloo_process_groups=False
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    rank = parallel_state.get_tensor_model_parallel_rank()
    chunks = []
    for number in range(layout.chunks):
        place = number * layout.pipeline + parallel_state.get_pipeline_model_parallel_rank()
        chunk = build_model(
            torch.float32,
            pre_process=place == 0,
            post_process=place == layout.pipeline * layout.chunks - 1,
            vp_stage=number if virtual else None,
            num_layers=layout.layers,
            tensor_model_parallel_size=layout.tensor,
            pipeline_model_parallel_size=layout.pipeline,
            virtual_pipeline_model_parallel_size=virtual,
            overlap_p2p_comm=bool(virtual),
            batch_p2p_comm=not virtual,
            pipeline_dtype=torch.float32,
        )
        chunk.load_state_dict(_own_part(weights, layout, rank, place), strict=False)
        attach_tree_attention(chunk)
        chunks.append(chunk.eval())
    model = gpt_model(chunks)
    plain._models = lambda: (None, model)
    generate_module.tells_limits = lambda device: True
    passes, recorded = Passes(), list[int]()

    def record(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        recorded.append(1)
        return plain._record_without_a_gpu(step)

    with pytest.MonkeyPatch.context() as monkeypatch:
        passes.watch(monkeypatch)
        monkeypatch.setattr(generate_module, "is_recordable", lambda *_: records)
        monkeypatch.setattr(generate_module, "record", record)
        # Each rank holds a part of the heads, or of the layers, and a bound of its own.
        room = math.ceil(_room_for(at_once, LONG) * layout.chunks / layout.ranks)
        responses = plain._generate(LONG, MANY, _filled_store(), kv_bytes=room)
    return responses, len(passes.begun), len(passes.decoded), len(recorded)


LAYOUTS = {
    "TP2": Layout(tensor=2),
    "PP2": Layout(pipeline=2),
    "PP2 x VP2": Layout(pipeline=2, chunks=2),
}


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("layout", "records"),
    [
        *(pytest.param(layout, False, id=name) for name, layout in LAYOUTS.items()),
        # What is run again here must not wait for ranks that share tensors.
        *(pytest.param(LAYOUTS[name], True, id=f"{name}, recorded") for name in list(LAYOUTS)[1:]),
    ],
)
def test_ranks_of_a_model_agree_on_who_begins_when_also_with_recorded_steps(
    layout: Layout, records: bool, monkeypatch: pytest.MonkeyPatch
):
    model = build_model(torch.float32, num_layers=layout.layers).eval()
    attach_tree_attention(model)
    monkeypatch.setattr(plain, "_models", lambda: (None, model))
    alone = plain._generate(LONG, MANY, _filled_store())
    weights = {n: w for n, w in model.state_dict().items() if isinstance(w, Tensor)}
    # Of the stages each has a batch.
    at_once = 2 * layout.pipeline
    results = run_distributed(2, _of_rank, layout, at_once, weights, records)
    for responses, *passes in results:
        _assert_same(responses, alone)
        stems, tokens, recorded = passes
        assert stems > 3
        assert passes == [*results[0][1:]]
        # Of each batch and chunk, and of a few numbers of rows.
        assert records * recorded <= 4 * layout.pipeline * layout.chunks < 2 * tokens
        assert bool(recorded) == records


def _with_experts(shares: list[Any], kv_bytes: int | None) -> list[list[Rollout]]:
    generate_module.tells_limits = lambda device: True
    return plain._rollouts_of_shares(shares, kv_bytes)


@pytest.mark.multiprocess
def test_ranks_that_share_experts_wait_until_nobody_has_positions_left(
    monkeypatch: pytest.MonkeyPatch,
):
    model = plain._with_experts(1)
    monkeypatch.setattr(plain, "_models", lambda: (None, model))
    case, own = CASES["boxed"], MANY[:7]
    alone = plain._generate(case, own, _filled_store())
    results = run_distributed(2, _with_experts, [own[:1], own[1:]], _room_for(2, case))
    _assert_same([group for part in results for group in part], alone)

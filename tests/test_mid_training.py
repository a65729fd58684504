"""What a run needs in every step: wrappers, evaluation mode, FP8 weights, bounds."""

import dataclasses
from argparse import Namespace

import pytest
import torch
import torch.distributed as dist

from megatron_rmt.algorithm.settings import Settings
from megatron_rmt.mid_training import (
    as_rank_0_rendered,
    batches_of_run,
    cache_size,
    fitting_problem,
    largest_batch_size,
    longest_position,
    prompts_of_a_sample,
    steps_of_run,
)
from megatron_rmt.model.gpt import chunks_of, generating, gpt_model, named_parameters
from megatron_rmt.prompt.prompt import Prompt
from megatron_rmt.prompt.template import TEMPLATES
from tests.distributed import run_distributed
from tests.tiny_model import build_model
from tests.tiny_step import tiny_prompt


@pytest.mark.usefixtures("single_process_megatron")
def test_generating_comes_back_to_training_also_after_an_error():
    model = build_model().train()
    with generating(model):
        assert not model.training
    assert model.training
    with pytest.raises(ZeroDivisionError), generating(model):
        1 / 0  # noqa: B018
    assert model.training
    assert all(module.training for module in model.modules())
    with generating(model.eval()):
        pass
    assert not model.training


@pytest.mark.usefixtures("single_process_megatron")
def test_the_model_is_found_inside_its_wrappers_or_refused():
    class Wrapper(torch.nn.Module):
        def __init__(self, module: torch.nn.Module) -> None:
            super().__init__()
            self.module = module

    model = build_model()
    assert gpt_model([model]) is gpt_model([Wrapper(Wrapper(model))]) is model
    with pytest.raises(ValueError, match=r"the model is a Linear; RMT trains a GPTModel"):
        gpt_model([Wrapper(torch.nn.Linear(1, 1))])


@pytest.mark.usefixtures("single_process_megatron")
def test_chunks_of_a_model_are_one_model_with_all_their_parameters():
    chunks = [build_model(), build_model()]
    model = gpt_model(chunks)
    # What is kept for a run is found by the model.
    assert gpt_model([*chunks]) is model
    assert gpt_model(chunks[::-1]) is not model
    assert chunks_of(model) == chunks
    assert chunks_of(chunks[0]) == chunks[:1]
    assert model.config is chunks[0].config
    named = dict(named_parameters(chunks))
    assert len(named) == 2 * len(dict(chunks[0].named_parameters()))
    assert named["1.decoder.layers.0.mlp.linear_fc1.weight"] is (
        chunks[1].decoder.layers[0].mlp.linear_fc1.weight
    )
    assert named.keys() == dict(model.named_parameters()).keys()
    assert [*dict(named_parameters(chunks[:1]))] == [*dict(chunks[0].named_parameters())]
    # Megatron changes the mode of the chunks.
    for chunk in chunks:
        chunk.eval()
    with generating(model):
        pass
    assert not any(module.training for chunk in chunks for module in chunk.modules())
    chunks[0].config.fp8 = chunks[1].config.fp8 = "e4m3"
    layers = [chunk.decoder.layers[0].mlp.linear_fc1 for chunk in chunks]
    for layer in layers:
        layer.is_first_microbatch = False
    with generating(model):
        assert all(layer.is_first_microbatch for layer in layers)


@pytest.mark.usefixtures("single_process_megatron")
@pytest.mark.parametrize("precision", [None, "fp8", "fp4"])
def test_quantized_weights_are_made_again_before_and_after_rollouts(precision):
    """Else rollouts would read the weights of the step before, and the update those that were made
    without gradient."""
    model = build_model()
    layer = model.decoder.layers[1].mlp.linear_fc1
    # What Transformer Engine's layers have.
    layer.is_first_microbatch = False
    layer._fp8_workspaces = {"weight": torch.ones(1)}
    if precision is not None:
        setattr(model.config, precision, "e4m3")
    with generating(model):
        assert layer.is_first_microbatch == (precision is not None)
        assert layer._fp8_workspaces
    assert bool(layer._fp8_workspaces) == (precision is None)


# "ff" before a document, the budget's digits behind it.
PROMPT = tiny_prompt(answer_tokens=1)


def _batches(schedule: str | None, train_iters: int, seq_length: int = 64) -> Namespace:
    return Namespace(
        global_batch_size=2,
        micro_batch_size=1,
        step_batch_size_schedule=schedule,
        seq_length=seq_length,
        train_iters=train_iters,
        reset_attention_mask=True,
    )


@pytest.mark.parametrize(
    ("schedule", "samples", "batches"),
    [
        (None, 12, [(6, 2)]),
        # Megatron leaves an incomplete step out, and with a schedule takes one more.
        (None, 13, [(6, 2)]),
        ("0:2 256:8", 13, [(2, 2), (2, 8)]),
        ("0:2 256:8", 12, [(2, 2), (1, 8)]),
        ("0:2 256:8", 4, [(2, 2)]),
        ("0:3 256:8", 14, [(2, 3), (1, 8)]),
    ],
)
def test_samples_are_counted_in_steps_as_megatron_does(
    schedule: str | None, samples: int, batches: list[tuple[int, int]]
):
    from megatron.core import num_microbatches_calculator as calculator
    from megatron.training import training

    args = _batches(schedule, train_iters=0)
    args.train_iters, args.train_samples = None, samples
    assert batches_of_run(args) == batches
    steps = steps_of_run(args)
    assert steps == sum(count for count, _ in batches)
    calculator.destroy_num_microbatches_calculator()
    calculator.init_num_microbatches_calculator(
        rank=1,
        global_batch_size=None if schedule else args.global_batch_size,
        micro_batch_size=1,
        data_parallel_size=1,
        step_batch_size_schedule=schedule,
        seq_length=args.seq_length,
    )
    training.update_train_iters(args)
    calculator.destroy_num_microbatches_calculator()
    assert args.train_iters == steps == steps_of_run(args)


@pytest.mark.parametrize(
    ("schedule", "train_iters", "largest"),
    [
        (None, 6, 2),
        # Thresholds are tokens: two steps of 2 samples of 64, then 8.
        ("0:2 256:8", 6, 8),
        ("0:2 256:8", 3, 8),
        ("0:2 256:8", 2, 2),
        ("0:2 256:8 1B:64", 1000, 8),
        ("0:2,256:8,1K:4", 1000, 8),
        ("0:16 256:8", 1000, 16),
    ],
)
def test_the_largest_batch_is_that_of_the_schedule_as_far_as_the_run_goes(
    schedule: str | None, train_iters: int, largest: int
):
    args, settings = _batches(schedule, train_iters), Settings(positions_per_sample=3, group_size=4)
    assert largest_batch_size(args) == largest
    size = cache_size(args, settings, PROMPT, token_bytes=4, data_parallel_size=2, in_flight=1)
    assert (size.rows, size.trunk_tokens) == (largest // 2 * 12, largest // 2 * (64 + 2))


def test_room_is_made_for_the_tier_that_may_think_longest():
    args = _batches(None, 6)
    how = {"token_bytes": 4, "data_parallel_size": 2, "in_flight": 1}
    plain = Settings(initial_budget=6)
    # 6 * 0.5, 6 * 1 and 6 * 2 tokens; a stem of two digits, and an answer.
    tiered = Settings(initial_budget=6, tier_budgets=(2.0, 0.5, 1.0))
    tails = [cache_size(args, own, PROMPT, **how).tail_tokens for own in (plain, tiered)]
    assert tails == [1 + 12 + 1, 2 + 24 + 1]
    longest = [longest_position(64, own, PROMPT) for own in (plain, tiered)]
    assert longest == [64 + 2 + tail for tail in tails]
    fits = Namespace(
        padded_vocab_size=None, seq_length=64, position_embedding_type="rope", micro_batch_size=1
    )
    fits.max_position_embeddings = longest[0]
    assert fitting_problem(fits, plain, PROMPT) is None
    assert "2 * 12 tokens of thought" in fitting_problem(fits, tiered, PROMPT)


def test_numbers_that_count_one_prompt_a_sample_say_so_where_there_may_be_more():
    args = _batches(None, 6)
    assert "each further one adds its prompt of 2 tokens" in prompts_of_a_sample(args, PROMPT)
    args.reset_attention_mask = False
    assert prompts_of_a_sample(args, PROMPT) == ""


def _heads_of_a_midnight() -> tuple[str, list[int]]:
    template = dataclasses.replace(TEMPLATES["rpt"], head=f"Day {dist.get_rank()}: ")
    prompt = Prompt(
        template=template,
        encode=lambda text: [*text.encode()],
        bytes_of=[],
        stop=[],
        end_of_document=0,
        answer_tokens=1,
    )
    shared = as_rank_0_rendered(prompt)
    return shared.rendering()["head"], shared.preamble


@pytest.mark.multiprocess
def test_ranks_that_start_on_two_days_ask_with_one_prompt():
    assert run_distributed(2, _heads_of_a_midnight) == [("Day 0: ", [*b"Day 0: "])] * 2

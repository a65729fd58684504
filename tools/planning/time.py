"""Seconds of one step of RMT on stated hardware. Estimates: no GPU was at hand to measure one.

The trunk pass and the update are bound by arithmetic: their operations at the stated share of the
device's peak. Decoding is bound by memory and by launches: each token of the longest rollout takes
one pass, which reads all weights, the trunk's and the rollouts' keys and values, and launches every
kernel, from a recorded graph or one by one; positions that do not fit begin where others have
ended. Data-parallel communication is taken to hide behind the update, which leaves out that ranks
with short rollouts wait for others.
"""

import math
from argparse import Namespace
from dataclasses import dataclass

from megatron_rmt.rollout.live_rollouts import SHARE_TO_BEGIN
from megatron_rmt.rollout.memory import in_bytes
from planning.memory import FP32, cache_of_step, parameters
from planning.work import SampleWork, StepFlops, flops, model_cost


@dataclass(frozen=True)
class Hardware:
    """One device, by its maker's data sheet. tflops: dense bf16. bandwidth: of its memory, GB/s.
    memory: GiB that a program can have. link: to its neighbours in one direction, GB/s."""

    name: str
    tflops: float
    bandwidth: float
    memory: float
    link: float


HARDWARE = {
    "h100": Hardware("H100 SXM", 989, 3350, 79, 450),
    "h200": Hardware("H200 SXM", 989, 4800, 139, 450),
    "a100": Hardware("A100 SXM 80 GB", 312, 2039, 79, 300),
}
# Of a layer with Transformer Engine 11 (read), and, counted on the null device, to rotate and store
# its new tokens 1 and of its attention 2; of a token 71, of which 46 to take its number, to draw it
# and to write it.
LAYER_LAUNCHES, TOKEN_LAUNCHES = 11 + 1 + 2, 71
# Of a layer in FP8 besides, by blocks and by tensors, counted as well.
FP8_LAUNCHES = 4, 14
# Estimates: seconds of the host for each, and for each call of a module of Transformer Engine, of
# which a layer makes 6; seconds of the device for each where a step is recorded as a graph.
LAUNCH, MODULE, LAYER_MODULES, RECORDED = 5e-6, 65e-6, 6, 1.5e-6
# Of an all-reduce of a few kilobytes.
COLLECTIVE = 15e-6
# Parts that the keys of a row are read in (estimate; the kernel has up to 32): each leaves an
# output in fp32, which is written and read again. Scores are not written out.
PARTS = 8


@dataclass(frozen=True)
class StepSeconds:
    """Wall seconds of the phases of a step. passes: decode passes, one after the other."""

    trunk: float
    rollout: float
    update: float
    passes: float

    @property
    def total(self) -> float:
        return self.trunk + self.rollout + self.update


def step_seconds(
    args: Namespace,
    work: SampleWork,
    step: StepFlops,
    longest: float,
    passes: float,
    hardware: Hardware,
    efficiency: float,
    bandwidth_efficiency: float,
) -> StepSeconds:
    """Of a step with ``work`` and ``step`` operations, where the longest response has ``longest``
    tokens. passes: of decoding, were all rollouts decoded at once. efficiency,
    bandwidth_efficiency: attained shares of the peaks.

    Raises:
        ValueError: not even one position fits into ``--rmt-rollout-kv-gib``.
    """
    peak = hardware.tflops * 1e12 * efficiency * (2 if args.fp8 else 1)
    stages, micro_batches = args.pipeline_model_parallel_size, args.micro_batches
    samples = args.global_batch_size // args.data_parallel_size
    layer = args.hidden_size * args.params_bytes * 2 * args.num_layers
    tp = args.tensor_model_parallel_size
    # Two all-reduces a layer and direction, each of which sends nearly twice its size.
    all_reduced = 0.0
    if tp > 1:
        all_reduced = layer * 2 * (tp - 1) / tp / (hardware.link * 1e9 * bandwidth_efficiency)
    trunk = step.trunk / (args.world_size * peak)
    trunk += samples * work.tokens.trunk * all_reduced / stages
    directions = 3 if step.recompute else 2
    update = (step.update + step.recompute) / (args.world_size * peak)
    update += directions * samples * work.update.tokens * all_reduced / stages
    rollout, passes = _rollout(args, work, longest, passes, hardware, peak, bandwidth_efficiency)
    stems = flops(work.stems, model_cost(args)) * args.global_batch_size
    return StepSeconds(
        # Each micro-batch passes through all stages before the next.
        trunk=trunk * stages,
        rollout=rollout + stems / (args.world_size * peak),
        # The stages' idle time at both ends of a 1F1B schedule, shorter with virtual stages.
        update=update * (micro_batches + (stages - 1) / args.chunks) / micro_batches,
        passes=passes,
    )


def _rollout(
    args: Namespace,
    work: SampleWork,
    longest: float,
    passes: float,
    hardware: Hardware,
    peak: float,
    bandwidth_efficiency: float,
) -> tuple[float, float]:
    """(seconds, passes) of decoding all positions."""
    samples = args.global_batch_size // args.data_parallel_size
    positions = samples * args.positions_drawn
    stages, tp = args.pipeline_model_parallel_size, args.tensor_model_parallel_size
    cache = cache_of_step(args, work, longest)
    fit = cache.positions_at_once(in_bytes(args.rmt_rollout_kv_gib))
    at_once = min(fit, -(-positions // stages))
    mean = work.tokens.branch / (args.rmt_positions_per_sample * args.rmt_group_size)
    # How often all that can be decoded at a time is. Rows of rollouts that have ended wait until
    # enough are free, and all for the stems of those that begin; at worst it is one after another.
    turns = max(1.0, positions / stages / at_once)
    each = mean * (1 + SHARE_TO_BEGIN / 2) + 1 / SHARE_TO_BEGIN
    in_turn = min(passes + (turns - 1) * each, math.ceil(turns) * passes)
    # Rollouts end one after the other.
    alive = min(1.0, turns * mean / in_turn) if in_turn else 1.0
    rows = at_once * args.rmt_group_size * alive
    in_wave = at_once / args.positions_drawn
    stem = work.tokens.stem / args.rmt_positions_per_sample
    tail = stem + max(0.0, longest - 1) / 2

    held = [parameters(args, stage) for stage in range(stages)]
    touched = 1.0
    if args.num_moe_experts:
        # Experts that no token of the ranks that share them was sent to are not read.
        routed = rows * args.moe_router_topk * args.expert_model_parallel_size
        touched = 1 - (1 - 1 / args.num_moe_experts) ** routed
    # The embedding is looked up; a tied one is read by the head.
    looked_up = args.padded_vocab_size * args.hidden_size / tp
    tied = not args.untie_embeddings_and_output_weights and stages == 1
    weights = max(part.dense + part.experts * touched for part in held)
    weights -= 0 if tied or stages > 1 else looked_up
    read = weights * args.params_bytes
    read += cache.token_bytes * (in_wave * work.span + rows * tail)
    read += rows * args.query_width / tp * args.layers_per_stage * PARTS * 2 * FP32
    read += rows * args.head_columns / tp * 3 * FP32
    by_memory = read / (hardware.bandwidth * 1e9 * bandwidth_efficiency)
    launches = args.layers_per_stage * LAYER_LAUNCHES + TOKEN_LAUNCHES
    if args.fp8:
        launches += args.layers_per_stage * FP8_LAUNCHES[args.fp8_recipe == "tensorwise"]
    if not (args.num_moe_experts or args.rmt_no_decode_graph):
        by_launches = launches * RECORDED
    else:
        by_launches = launches * LAUNCH
        if args.transformer_impl == "transformer_engine":
            by_launches += args.layers_per_stage * LAYER_MODULES * MODULE
    if tp > 1:
        by_launches += args.layers_per_stage * 2 * COLLECTIVE
    of_all = flops(work.decode, model_cost(args)) * args.global_batch_size
    by_arithmetic = of_all / (args.world_size * peak)
    # Each stage works at the batches of all stages in turn.
    decoded = in_turn * stages
    return max(decoded * max(by_memory, by_launches), by_arithmetic), decoded

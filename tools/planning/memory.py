"""Memory of one rank in a step of RMT, from its settings alone.

Two phases follow one another on top of weights, gradients and optimizer state: rollouts, which hold
keys and values, and the update, which holds activations and the head. The planned peak is the
larger. Saved activations are those that autograd keeps of Megatron's layers, tensor by tensor; what
is made and freed inside a layer is planned at its largest.
"""

import dataclasses
from argparse import Namespace
from dataclasses import dataclass

import torch

from megatron_rmt.algorithm.settings import Settings
from megatron_rmt.mid_training import rows_at_once
from megatron_rmt.rollout.memory import GIB, CacheSize, in_bytes
from planning.work import SampleWork

FP32 = 4
# CUDA's context, NCCL's buffers and what the allocator cannot reuse. An assumption, not measured.
GPU_RESERVE = 4 * GIB


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank. activations: saved for backward. head: scores and gradients of the
    language-model head. backward: of one layer, activations made again included. key_values: of the
    rollouts. decoding: what rollouts hold besides. reserve: of the device's runtime."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    head: float
    backward: float
    key_values: float
    decoding: float
    reserve: float

    @property
    def static(self) -> float:
        """Held all the time."""
        return self.weights + self.gradients + self.optimizer + self.reserve

    @property
    def rollout_peak(self) -> float:
        return self.static + self.key_values + self.decoding

    @property
    def update_peak(self) -> float:
        return self.static + self.activations + max(self.head, self.backward)

    @property
    def peak(self) -> float:
        return max(self.rollout_peak, self.update_peak)


@dataclass(frozen=True)
class MicroBatch:
    """The trees of a micro-batch of the update, and the trunks of one before it.

    rows, predictions: of the trees. trunk_rows: of the trunks.
    """

    rows: float
    predictions: float
    trunk_rows: float


def micro_batch(args: Namespace, work: SampleWork) -> MicroBatch:
    """The micro-batch of a step of like samples, dealt out again under ``--rmt-max-tokens``."""
    rows = work.update.tokens
    samples = args.micro_batch_size
    if args.rmt_max_tokens is not None:
        own, count = args.global_batch_size // args.data_parallel_size, args.micro_batches
        at_once = max(1, int(args.rmt_max_tokens // rows))
        least = count if args.pipeline_model_parallel_size > 1 else 1
        samples = -(-own // min(count, max(least, -(-own // at_once))))
    return MicroBatch(
        samples * rows, samples * work.update.predictions, args.micro_batch_size * work.tokens.trunk
    )


@dataclass(frozen=True)
class Parameters:
    """Of one rank. dense: divided over the data-parallel ranks by the distributed optimizer;
    experts: over those that hold the same experts. largest: of one matrix. tables: of the
    embedding, positions and the head, in dense."""

    dense: float
    experts: float
    largest: float
    tables: float

    @property
    def total(self) -> float:
        return self.dense + self.experts


def parameters(args: Namespace, stage: int, tensor_parallel: int | None = None) -> Parameters:
    """Weights of a rank of pipeline ``stage``; of the whole stage with ``tensor_parallel`` 1."""
    tp = tensor_parallel or args.tensor_model_parallel_size
    etp = tensor_parallel or args.expert_tensor_parallel_size
    ep = 1 if tensor_parallel else args.expert_model_parallel_size
    hidden, heads, keys = args.hidden_size, args.query_width, args.key_width
    norm = hidden * (2 if args.normalization == "LayerNorm" else 1)
    biased = args.add_bias_linear
    qkv = (heads + 2 * keys) * (hidden + (biased or args.add_qkv_bias)) / tp
    attention = qkv + heads * hidden / tp + hidden * biased + norm
    if args.qk_layernorm:
        attention += 2 * args.kv_channels
    up = 2 if args.gated_linear_unit else 1

    def mlp(width: float, ranks: int) -> float:
        return (up + 1) * hidden * width / ranks + biased * (up * width / ranks + hidden)

    dense, experts = attention + norm, 0.0
    if args.num_moe_experts:
        dense += args.num_moe_experts * hidden
        if args.moe_shared_expert_intermediate_size:
            dense += mlp(args.moe_shared_expert_intermediate_size, tp)
        experts = args.num_moe_experts / ep * mlp(args.moe_ffn_hidden_size, etp)
        largest = up * hidden * args.moe_ffn_hidden_size / etp
    else:
        dense += mlp(args.ffn_hidden_size, tp)
        largest = up * hidden * args.ffn_hidden_size / tp
    layers = args.layers_per_stage
    dense, experts = dense * layers, experts * layers
    last = args.pipeline_model_parallel_size - 1
    table = args.padded_vocab_size * hidden / tp
    tables = 0.0
    if stage == 0:
        tables += table
        if args.position_embedding_type == "learned_absolute":
            tables += args.max_position_embeddings * hidden
    if stage == last:
        dense += norm
        # A tied head needs a copy where the embedding is on another stage.
        if args.untie_embeddings_and_output_weights or last > 0:
            tables += table
    dense += tables
    if stage in (0, last):
        largest = max(largest, table)
    return Parameters(dense, experts, largest, tables)


def model_parameters(args: Namespace) -> float:
    """Weights of the whole model, each once, the padding of the vocabulary left out."""
    one_stage = Namespace(
        **vars(args) | {"pipeline_model_parallel_size": 1, "layers_per_stage": args.num_layers}
    )
    tables = 2 if args.untie_embeddings_and_output_weights else 1
    padding = tables * (args.padded_vocab_size - args.true_vocab_size) * args.hidden_size
    return parameters(one_stage, 0, tensor_parallel=1).total - padding


def rank_memory(args: Namespace, work: SampleWork, longest: float, stage: int) -> RankMemory:
    """Of a rank of pipeline ``stage`` in a step with ``work``.

    longest: most tokens that a response may take, for which keys and values are allocated.
    """
    held = parameters(args, stage)
    batch = micro_batch(args, work)
    activations, head, backward = _update(args, batch, held, stage)
    key_values, decoding = _rollouts(args, work, batch, longest)
    weights, linear = held.total * args.params_bytes, held.total - held.tables
    if args.fp8_param_gather:
        # In FP8 alone, with the transpose that a Hopper GPU's products of backward need.
        weights = 2 * linear + held.tables * args.params_bytes
    elif args.fp8:
        # Transformer Engine makes copies in FP8: for rollouts, and with transposes for the update.
        decoding, activations = decoding + linear, activations + 2 * linear
    return RankMemory(
        weights=weights,
        gradients=held.total * args.gradient_bytes,
        optimizer=_optimizer(args, held),
        activations=activations,
        head=head,
        backward=backward,
        key_values=key_values,
        decoding=decoding,
        reserve=0.0 if args.on_cpu else GPU_RESERVE,
    )


def _optimizer(args: Namespace, held: Parameters) -> float:
    """Adam's two moments, SGD's one, and the fp32 weights that half precision needs."""
    # Without the precision-aware optimizer Megatron keeps all of them in fp32.
    width = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}
    aware = args.use_precision_aware_optimizer
    moments = FP32 if args.optimizer == "sgd" else 2 * FP32
    if aware and args.optimizer != "sgd":
        moments = width.get(args.exp_avg_dtype, FP32) + width.get(args.exp_avg_sq_dtype, FP32)
    main = 0 if args.params_bytes == FP32 else FP32
    if aware and main:
        main = width.get(args.main_params_dtype, FP32)
    dense, experts = held.dense, held.experts
    if args.use_distributed_optimizer:
        dense /= args.data_parallel_size
        experts /= args.expert_data_parallel_size
    kept = 1.0
    if args.optimizer_cpu_offload:
        kept -= args.optimizer_offload_fraction
    return (moments + main) * (dense + experts) * kept


@dataclass(frozen=True)
class _Row:
    """Bytes that one token of the update takes. saved: by a layer, until its backward. inside:
    made besides while a layer goes backward. norm: saved by a norm, its output included. hidden:
    one hidden state, of which a rank holds its part under sequence parallelism; gathered: all of
    it."""

    saved: float
    inside: float
    norm: float
    hidden: float
    gathered: float


def _row(args: Namespace) -> _Row:
    size, tp = args.params_bytes, args.tensor_model_parallel_size
    gathered = args.hidden_size * size
    hidden = gathered / tp if args.sequence_parallel else gathered
    heads, keys = args.query_width / tp * size, args.key_width / tp * size
    # torch's RMSNorm on a CPU is made of parts: it keeps what it normalised and its input, in fp32.
    decomposed = args.on_cpu and args.normalization == "RMSNorm"
    norm = hidden + (2 * FP32 / size if decomposed else 1) * hidden
    # The value is a part of the projection's output, which so is kept beside the rotated query and
    # key; log-sum-exp in fp32; tables of cosines and sines for query and key.
    attention = (heads + 2 * keys) + (heads + keys) + heads
    attention += args.num_attention_heads / tp * FP32
    if args.position_embedding_type == "rope" and not args.apply_rope_fusion:
        attention += 4 * args.kv_channels * size
    if args.qk_layernorm:
        attention += (heads + keys) * (2 * FP32 / size if decomposed and size < FP32 else 1)
    if args.num_moe_experts:
        width = args.moe_ffn_hidden_size * args.moe_router_topk / args.expert_tensor_parallel_size
        width += (args.moe_shared_expert_intermediate_size or 0) / tp
        # Tokens go to their experts as copies, and come back as copies.
        routing = 2 * args.moe_router_topk * gathered + args.num_moe_experts * FP32
    else:
        width, routing = args.ffn_hidden_size / tp, 0.0
    return _Row(
        saved=2 * norm + attention + width * _saved_by_mlp(args) * size + routing,
        inside=width * size + 2 * gathered,
        norm=norm,
        hidden=hidden,
        gathered=gathered,
    )


def _saved_by_mlp(args: Namespace) -> int:
    """Numbers that an MLP saves for each unit of its width: fc1's output and fc2's input, and
    between them, where the activation is not fused, the activated gate and its factor."""
    if not args.gated_linear_unit:
        return 2
    return 3 if args.bias_swiglu_fusion else 5


def _update(
    args: Namespace, batch: MicroBatch, held: Parameters, stage: int
) -> tuple[float, float, float]:
    """(activations, head, backward) of the update; the last two follow one another."""
    row = _row(args)
    multiple = args.tensor_model_parallel_size if args.sequence_parallel else 1
    rows = -(-batch.rows // multiple) * multiple
    saved, again = _saved(args, row)
    last = args.pipeline_model_parallel_size - 1
    activations = in_flight(args, stage) * saved * rows
    backward = (again + row.inside) * rows
    if not args.gradient_accumulation_fusion:
        # A matrix's gradient before it is added to the gradient buffer.
        backward += held.largest * args.params_bytes
    if stage != last:
        return activations, 0.0, backward
    if last == 0 and not args.untie_embeddings_and_output_weights:
        # Autograd keeps the gradient of a tied head until the embedding's arrives.
        backward += _table(args) * args.hidden_size * args.params_bytes
    return activations + rows * row.norm, _head(args, batch.predictions, rows, row), backward


def in_flight(args: Namespace, stage: int) -> float:
    """Micro-batches whose activations ``stage`` holds at most, those of one chunk as its part."""
    stages = args.pipeline_model_parallel_size
    held = stages - stage
    if args.chunks > 1:
        together = args.microbatch_group_size_per_vp_stage or stages
        held = (2 * (stages - stage - 1) + (args.chunks - 1) * together + 1) / args.chunks
    return min(args.micro_batches, held)


def _saved(args: Namespace, row: _Row) -> tuple[float, float]:
    """Bytes of a token that all layers of a stage save, and that are made again at a time."""
    layers = args.layers_per_stage
    if args.recompute_granularity == "full":
        count = args.recompute_num_layers or 1
        if args.recompute_method == "block":
            count = min(count * args.chunks, layers)
            return count * row.hidden + (layers - count) * row.saved, row.saved
        return -(-layers // count) * row.hidden, min(count, layers) * row.saved
    saved = layers * row.saved
    if args.recompute_granularity == "selective":
        # Core attention runs again: its output is made anew, its log-sum-exp too.
        width = args.query_width * args.params_bytes + args.num_attention_heads * FP32
        saved -= layers * width / args.tensor_model_parallel_size
    return saved, 0.0


def _table(args: Namespace) -> float:
    """Rows of the embedding, or of the head, on a rank."""
    return args.padded_vocab_size / args.tensor_model_parallel_size


def _head(args: Namespace, predictions: float, rows: float, row: _Row) -> float:
    """The larger of what the head holds while it makes its gradients and while it gives them to
    autograd in the dtype of the weights."""
    size = args.params_bytes
    picked, weight = predictions * args.hidden_size, _table(args) * args.hidden_size
    gradients = FP32 * (picked + weight)
    device = torch.device("cpu" if args.on_cpu else "cuda")
    chunk = min(rows_at_once(Settings.of(args), device), predictions) * _table(args)
    making = picked * size + gradients + FP32 * chunk
    if size != FP32:
        making += chunk * size  # the gradient of the scores, rounded for the products
    if args.sequence_parallel:
        making += rows * row.gathered
    converted = 0 if size == FP32 else size * (picked + weight)
    return max(making, gradients + converted)


def _rollouts(
    args: Namespace, work: SampleWork, batch: MicroBatch, longest: float
) -> tuple[float, float]:
    """(keys and values, what else decoding holds at its largest)."""
    size, tp = args.params_bytes, args.tensor_model_parallel_size
    cache = cache_of_step(args, work, longest)
    fit = cache.positions_at_once(in_bytes(args.rmt_rollout_kv_gib)) * cache.in_flight
    at_once = min(cache.positions, fit)
    key_values = cache.trunk_bytes + at_once * cache.position_bytes
    rows = at_once * args.rmt_group_size
    columns = args.head_columns / tp
    gathered = args.hidden_size * size
    row = _row(args)
    # A layer without gradients: its input, its residual and the widest step of its MLP.
    through_a_layer = 2 * gathered + row.saved / 2
    reading = max(batch.trunk_rows, at_once * work.tokens.stem / args.rmt_positions_per_sample)
    # Scores and their weights, which are summed in fp64 by blocks.
    drawing = rows * columns * 2 * FP32
    scores = 0.0
    if not args.on_cpu:
        # Of one sample at a time, written out; stems ask more queries than a group of rollouts.
        stem = work.tokens.stem / args.rmt_positions_per_sample
        queries = args.positions_drawn * max(args.rmt_group_size, stem)
        seen = work.span + stem + longest
        scores = queries * args.num_attention_heads / tp * seen * (2 * FP32 + 2 * size)
    # When rows leave at most half of them move, keys or values of a layer at a time.
    moved = at_once * cache.position_bytes / max(1, args.layers_per_stage) / 4
    # Of a half-precision head a CPU holds a copy in fp32.
    wide = FP32 * _table(args) * args.hidden_size if args.on_cpu and size != FP32 else 0.0
    return key_values, wide + max(reading * through_a_layer, drawing + scores, moved)


def cache_of_step(args: Namespace, work: SampleWork, longest: float) -> CacheSize:
    """Keys and values of a step with responses of at most ``longest`` tokens."""
    samples = args.global_batch_size // args.data_parallel_size
    per_rank = max(1, args.key_width // args.kv_channels // args.tensor_model_parallel_size)
    return CacheSize(
        token_bytes=args.layers_per_stage * 2 * per_rank * args.kv_channels * args.params_bytes,
        trunk_tokens=round(samples * work.tokens.trunk),
        rows=samples * args.positions_drawn * args.rmt_group_size,
        rows_per_position=args.rmt_group_size,
        tail_tokens=round(work.tokens.stem / args.rmt_positions_per_sample + longest),
        in_flight=args.pipeline_model_parallel_size,
    )


def largest_rank(args: Namespace, work: SampleWork, longest: float) -> RankMemory:
    """The rank that needs most, over all pipeline stages.

    Raises:
        ValueError: not even one position fits into ``--rmt-rollout-kv-gib``.
    """
    stages = range(args.pipeline_model_parallel_size)
    return max((rank_memory(args, work, longest, s) for s in stages), key=lambda m: m.peak)


def as_gib(memory: RankMemory) -> dict[str, float]:
    """Each part, and the two peaks, in GiB."""
    parts = dataclasses.asdict(memory) | {
        "rollout_peak": memory.rollout_peak,
        "update_peak": memory.update_peak,
        "peak": memory.peak,
    }
    return {name: value / GIB for name, value in parts.items()}

"""How much memory the keys and values of rollouts take, and in how many waves they fit."""

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from torch.distributed import ProcessGroup

from megatron_rmt.model.gpt import Model, decoder_modules
from megatron_rmt.rollout.state_cache import NO_STATES, StateBytes

GIB = 2**30


def in_bytes(gib: float | None) -> int | None:
    """GiB in bytes; None stays None, no bound."""
    return None if gib is None else int(gib * GIB)


def key_value_bytes(model: Model) -> int:
    """Bytes of the keys and values of one token in all layers of this rank's stage."""
    config = model.config
    kinds = SelfAttention | MLASelfAttention
    layers = sum(isinstance(module, kinds) for module in decoder_modules(model))
    if config.multi_latent_attention:
        # Whole on every tensor-parallel rank.
        latent = config.kv_lora_rank + config.qk_pos_emb_head_dim
        return layers * latent * config.params_dtype.itemsize
    heads = config.num_query_groups or config.num_attention_heads
    per_rank = max(1, heads // config.tensor_model_parallel_size)
    return layers * 2 * per_rank * config.kv_channels * config.params_dtype.itemsize


class CacheError(ValueError):
    """Keys and values do not fit into ``--rmt-rollout-kv-gib``; one sentence with the remedy."""


@dataclass(frozen=True)
class CacheSize:
    """Keys and values of one step of rollouts on one rank.

    token_bytes: of one token. trunk_tokens: stored once. rows: rollouts, ``rows_per_position`` for
    each position. tail_tokens: most tokens of a stem and a response. in_flight: batches at a time.
    states: of state-space layers.
    """

    token_bytes: int
    trunk_tokens: int
    rows: int
    rows_per_position: int
    tail_tokens: int
    in_flight: int = 1
    states: StateBytes = NO_STATES

    @property
    def trunk_bytes(self) -> int:
        return self.trunk_tokens * (self.token_bytes + self.states.trunk_token)

    @property
    def position_bytes(self) -> int:
        tail = self.tail_tokens * self.token_bytes + self.states.rollout
        return self.rows_per_position * tail

    @property
    def positions(self) -> int:
        return self.rows // self.rows_per_position

    @property
    def total_bytes(self) -> int:
        """With all positions at a time."""
        return self.trunk_bytes + self.positions * self.position_bytes

    def describe(self) -> str:
        """The size in words."""
        return (
            f"{self.rows} rollouts x {self.tail_tokens} tokens "
            f"({self.positions * self.position_bytes / GIB:.3g} GiB) + trunk of "
            f"{self.trunk_tokens} tokens ({self.trunk_bytes / GIB:.3g} GiB), "
            f"{self.token_bytes} bytes a token"
            + (f", {self.states.rollout} of states a rollout" if self.states.rollout else "")
        )

    def positions_at_once(self, bound: int | None) -> int:
        """Most positions of one batch within ``bound`` bytes.

        Raises:
            CacheError: not even one position of each batch in flight fits.
        """
        if bound is None:
            return max(1, self.positions)
        fit = (bound - self.trunk_bytes) // max(1, self.position_bytes * self.in_flight)
        if fit < 1 and self.positions:
            least = self.trunk_bytes + self.position_bytes * self.in_flight
            raise CacheError(
                f"--rmt-rollout-kv-gib is {bound / GIB:.3g}, but the keys and values of the trunk "
                f"and of {self.in_flight} position(s) take {least / GIB:.3g} GiB "
                f"({self.describe()}); raise it, or lower --rmt-initial-budget, --rmt-group-size, "
                "--seq-length or the samples of a rank and step (--global-batch-size)."
            )
        return max(1, fit)


def positions_at_once(size: CacheSize, kv_bytes: int | None) -> int:
    """Most positions of one batch in ``kv_bytes``; the same number on all stages of a pipeline.

    Raises:
        CacheError: not even one position of each batch in flight fits.
    """
    if kv_bytes is not None and size.in_flight > 1:
        # Stages may hold different numbers of layers.
        stages = parallel_state.get_pipeline_model_parallel_group()
        size = replace(size, token_bytes=_largest(size.token_bytes, stages))
    share = max(1, -(-size.positions // size.in_flight))
    return min(size.positions_at_once(kv_bytes), share)


def rollout_waves(positions: int, at_once: int, experts: ProcessGroup | None) -> list[slice]:
    """Which positions are decoded together, ``at_once`` at most.

    At least one wave, which may be empty; the same number on all ranks that share ``experts``.
    """
    waves = max(1, -(-positions // at_once))
    if experts is not None:
        waves = _largest(waves, experts)
    return equal_parts(positions, waves)


def equal_parts(positions: int, parts: int) -> list[slice]:
    """Neighbouring positions, in parts of nearly equal size."""
    ends = [positions * index // parts for index in range(parts + 1)]
    return [slice(first, limit) for first, limit in pairwise(ends)]


def _largest(value: int, group: ProcessGroup) -> int:
    held = torch.tensor([value], device=torch.cuda.current_device())
    dist.all_reduce(held, op=dist.ReduceOp.MAX, group=group)
    return int(held)

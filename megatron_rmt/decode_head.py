"""From the hidden states of rollouts to their next tokens."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from megatron_rmt.head import selected_logits, vocab_range
from megatron_rmt.sampling import greedy_tokens, sample_tokens, token_log_probs


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from its scores.

    temperature: above 0, also divides the scores of ``greedy``'s log-probs. greedy: the most likely
    token. top_k, top_p: see ``sampling.sample_tokens``.
    """

    temperature: float
    greedy: bool = False
    top_k: int | None = None
    top_p: float | None = None


def output_weight(model: GPTModel) -> Tensor:
    """The output layer's weight ``[vocab/tp, hidden]``, on the last stage."""
    if model.share_embeddings_and_output_weights:
        return model.shared_embedding_or_output_weight()
    return model.output_layer.weight


def needs_wide_copy(weight: Tensor) -> bool:
    """Whether scores in fp32 need the weight in fp32: torch's CPU product of half-precision
    matrices rounds its result, its CUDA product does not have to."""
    return weight.device.type == "cpu" and weight.dtype in (torch.bfloat16, torch.float16)


class DecodeHead:
    """The language-model head for one rollout of many steps, on the last pipeline stage.

    On a CPU a half-precision weight is converted once and not for every token; the copy (4 bytes an
    element) lives as long as this object.
    """

    def __init__(self, model: GPTModel, vocab_size: int, sampling: Sampling) -> None:
        self.tp_group = parallel_state.get_tensor_model_parallel_group()
        self.vocab_size = vocab_size
        self.sampling = sampling
        self.weight = output_weight(model)
        self.start, _ = vocab_range(self.weight.shape[0], vocab_size, self.tp_group)
        self.exact_in_bf16 = self.weight.dtype == torch.bfloat16
        if needs_wide_copy(self.weight):
            self.weight = self.weight.float()

    def scores(self, hidden: Tensor) -> Tensor:
        """fp32 scores ``[rows, vocab/tp]`` of ``hidden`` ``[rows, hidden]``, without padding."""
        if hidden.device.type == "cpu":
            hidden = hidden.to(self.weight.dtype)
        with _bf16_products() if self.exact_in_bf16 else contextlib.nullcontext():
            return selected_logits(
                hidden, self.weight, vocab_size=self.vocab_size, tp_group=self.tp_group
            )

    def draw(self, scores: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """A token ``[rows]`` and its log-prob fp32 for each row of ``scores``."""
        shard = {"vocab_start": self.start, "tp_group": self.tp_group}
        sampling = self.sampling
        if not sampling.greedy:
            return sample_tokens(
                scores,
                uniforms,
                temperature=sampling.temperature,
                top_k=sampling.top_k,
                top_p=sampling.top_p,
                **shard,
            )
        tokens = greedy_tokens(scores, **shard)
        return tokens, token_log_probs(scores, tokens, temperature=sampling.temperature, **shard)


@contextlib.contextmanager
def _bf16_products() -> Iterator[None]:
    """Let a CPU multiply fp32 matrices as bf16, summed and returned in fp32.

    Twice as fast where the processor multiplies bf16, and exact where the fp32 numbers came from
    bf16, as they do here.
    """
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before

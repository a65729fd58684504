"""From the hidden states of rollouts to their next tokens."""

from dataclasses import dataclass

from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from megatron_rmt.model.head import selected_logits, vocab_range
from megatron_rmt.model.head_products import wide_copy
from megatron_rmt.rollout.sampling import greedy_tokens, sample_tokens, token_log_probs


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


class DecodeHead:
    """The language-model head while rollouts are generated, on the last pipeline stage."""

    def __init__(self, model: GPTModel, vocab_size: int, sampling: Sampling) -> None:
        self.tp_group = parallel_state.get_tensor_model_parallel_group()
        self.vocab_size = vocab_size
        self.sampling = sampling
        self.weight = output_weight(model)
        self.start, _ = vocab_range(self.weight.shape[0], vocab_size, self.tp_group)
        self._wide_weight = wide_copy(self.weight)
        self._scores: Tensor | None = None

    def scores(self, hidden: Tensor) -> Tensor:
        """fp32 scores ``[rows, vocab/tp]`` of ``hidden`` ``[rows, hidden]``, without padding; the
        next call overwrites them."""
        memory = self._scores
        if memory is not None and len(memory) < len(hidden):
            memory = None
        scores = selected_logits(
            hidden,
            self.weight,
            vocab_size=self.vocab_size,
            tp_group=self.tp_group,
            memory=memory,
            wide_weight=self._wide_weight,
        )
        if memory is None:
            self._scores = scores
        return scores

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

"""A step of decoding as a CUDA graph: launched as a whole, without Python and Megatron's modules.

A step that reads and writes the same memory with the same operations each time is recorded once and
then replayed. Every number of rows has its own graph; all end with the batch, whose keys and values
are freed before the update. Recording takes the host about as long as one step without a graph.
"""

import functools
import warnings
from collections.abc import Callable

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

# What it returns is written anew, in its place, by each replay.
Step = Callable[[], Tensor]


def is_recordable(config: TransformerConfig, device: torch.device) -> bool:
    """Whether a step of this rank's layers asks the host nothing.

    Experts ask how many tokens each gets; latent attention was not looked at; with Megatron's own
    CUDA graphs there is nothing left to record. In FP8 the weights lie quantized since the trunk
    pass, and the recipes that RMT takes scale what layers read by nothing that the host holds.
    """
    return (
        device.type == "cuda"
        and not config.num_moe_experts
        and not config.multi_latent_attention
        and not config.fp4
        and config.cuda_graph_impl == "none"
    )


class StepGraph:
    """Runs the steps of one batch. The first with a number of rows runs as it is, and so warms up
    what the next one records; ``record`` returns what runs it again."""

    def __init__(self, record: Callable[[Step], Step]) -> None:
        self._record = record
        self._rows: int | None = None
        self._replay: Step | None = None

    def run(self, rows: int, step: Step) -> Tensor:
        """Run ``step``, of ``rows`` rows; it must differ from the last in nothing but those."""
        if rows != self._rows:
            self._rows, self._replay = rows, None
            return step()
        if self._replay is None:
            self._replay = self._record(step)
        return self._replay()


def record(step: Step) -> Step:
    """``step`` as a CUDA graph, or itself, with a warning, where it cannot be recorded."""
    graph, stream, current = torch.cuda.CUDAGraph(), _side_stream(), torch.cuda.current_stream()
    stream.wait_stream(current)
    try:
        with torch.cuda.stream(stream):
            # NCCL's watchdog, another thread, may ask for its events meanwhile.
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                result = step()
            finally:
                graph.capture_end()
    except RuntimeError as error:
        # Nothing has run: the step goes on without.
        warnings.warn(f"decoding runs without a CUDA graph, which is slower: {error}", stacklevel=2)
        return step
    current.wait_stream(stream)

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


@functools.cache
def _side_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()

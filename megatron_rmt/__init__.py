"""Reinforcement Mid-Training (RMT, arXiv 2509.24375) for Megatron-LM.

Two lines add it to an existing job, before ``pretrain`` is called::

    import megatron_rmt
    megatron_rmt.patch()

Or none: ``python -m megatron_rmt.run their_script.py`` (``megatron_rmt.run``).
"""

import os

__version__ = "0.1.0"
# The process that started this one: it may be gone when Megatron, which takes seconds, is imported.
STARTED_BY = os.getppid()


def patch() -> None:
    """Install RMT's hooks into ``megatron.training``; see ``megatron_rmt.job.patches.patch``.

    Where CUDA is absent, the CPU stands in for it from now on (``megatron_rmt.cpu.platform``), and
    the flags that Megatron needs there are added to ``sys.argv``.
    """
    import torch

    if not torch.cuda.is_available():
        from megatron_rmt.cpu import platform as cpu_platform

        cpu_platform.install_if_no_cuda()
    from megatron_rmt.job.patches import patch as install

    install()


def unpatch() -> None:
    """Take RMT's hooks out of ``megatron.training``; see ``megatron_rmt.job.patches.unpatch``."""
    from megatron_rmt.job.patches import unpatch as remove

    remove()

"""Reinforcement Mid-Training (RMT, arXiv 2509.24375) for Megatron-LM.

Two lines add it to an existing job, before ``pretrain`` is called::

    import megatron_rmt
    megatron_rmt.patch()
"""

__version__ = "0.1.0"


def patch() -> None:
    """Install RMT's hooks into ``megatron.training``; see ``megatron_rmt.patches.patch``."""
    from megatron_rmt.patches import patch as install

    install()

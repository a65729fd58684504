"""Processes of a job end with the one that started them: torchrun's ranks, a rank's save worker.

Else ranks of an agent that was killed go on writing to ``--save`` beside those of the next start,
and each rank that was killed leaves its save worker, some 700 MB, behind.
"""

import ctypes
import os
import signal
from typing import Any

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent() -> None:
    """Let the kernel send SIGKILL to this process when its parent dies. Linux; elsewhere nothing.

    The parent is the thread that started it, so only long-lived threads may start processes that
    call this.
    """
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    except (OSError, AttributeError):
        return


def end_with_torchrun() -> None:
    """``end_with_parent`` for a rank that torchrun started; and for the worker that writes its
    checkpoints, which then ends with the rank."""
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()
    PersistentAsyncCaller.async_loop = staticmethod(save_worker)


def save_worker(*args: Any) -> None:
    """Megatron's worker that writes checkpoints, in the process that is started for it."""
    end_with_parent()
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    PersistentAsyncCaller.async_loop(*args)

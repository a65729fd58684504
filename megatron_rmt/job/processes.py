"""Processes of a job end with the one that started them: torchrun's ranks, and what a rank starts
to save checkpoints. Ctrl-C ends a rank in a sentence.

Else ranks of an agent that was killed go on writing to ``--save`` beside those of the next start,
and each rank that was killed leaves processes of some 700 MB behind.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing.managers import SyncManager
from typing import Any

import megatron_rmt

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
    parent = multiprocessing.parent_process()
    if os.getppid() != (megatron_rmt.STARTED_BY if parent is None else parent.pid):
        # It died before the kernel was asked.
        os.kill(os.getpid(), signal.SIGKILL)


def end_with_torchrun() -> None:
    """``end_with_parent`` for a rank that torchrun started."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()


def end_when_interrupted() -> None:
    """Let this process end at Ctrl-C (SIGINT) with exit code 130 and one sentence; or, where
    ``--exit-signal-handler`` waits for a signal, take it for that one. A second one ends it at
    once. Nothing where the job has a handler of its own."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return
    own = os.getpid()

    def interrupted(*_: object) -> None:
        from megatron.training import global_vars

        if os.getpid() != own:  # a process that reads data
            raise KeyboardInterrupt
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        told = global_vars._GLOBAL_SIGNAL_HANDLER
        if told is None:
            print("RMT: interrupted; the last checkpoint is as it was.", file=sys.stderr)
            raise SystemExit(130)
        told._signal_received = True

    signal.signal(signal.SIGINT, interrupted)


def start_save_worker(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Megatron's process that writes checkpoints (``original`` starts it, once), which ends with
    this one."""
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    loop = PersistentAsyncCaller.async_loop
    PersistentAsyncCaller.async_loop = staticmethod(save_worker)
    try:
        return original(*args, **kwargs)
    finally:
        PersistentAsyncCaller.async_loop = staticmethod(loop)


def write_results_queue(original: Callable[..., Any], mp_mode: str = "spawn") -> Any:
    """Megatron's queue for what was written; the process that holds it, made at the first save of
    a rank, ends with this one."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if filesystem_async._results_queue is None:
        manager = SyncManager(ctx=multiprocessing.get_context(mp_mode))
        manager.start(initializer=end_with_parent)
        filesystem_async._results_queue = manager.Queue()
    return original(mp_mode)


def save_worker(*args: Any) -> None:
    """Megatron's worker that writes checkpoints, in the process that is started for it."""
    end_with_parent()
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    PersistentAsyncCaller.async_loop(*args)

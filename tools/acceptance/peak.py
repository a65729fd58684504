"""examples/pretrain_rmt.py, and the most memory that its allocator had given out and reserved.

Of the last step: in the first the optimizer has no state, and kernels are compiled.
"""

import json
import os
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

PRETRAIN = Path(__file__).resolve().parents[2] / "examples/pretrain_rmt.py"


def main() -> None:
    """Run with the flags of ``sys.argv``; writes JSON to the file that ACCEPT_PEAK names."""
    from megatron_rmt.job import patches

    step = patches.run_step

    def watched(*args: Any, **kwargs: Any) -> Any:
        torch.cuda.reset_peak_memory_stats()
        result = step(*args, **kwargs)
        peak = {
            "allocated": torch.cuda.max_memory_allocated(),
            "reserved": torch.cuda.max_memory_reserved(),
        }
        Path(os.environ["ACCEPT_PEAK"]).write_text(json.dumps(peak), encoding="utf-8")
        return result

    run_step: Callable[..., Any] = watched
    patches.run_step = run_step
    runpy.run_path(str(PRETRAIN), run_name="__main__")


if __name__ == "__main__":
    main()

"""Run a Megatron pre-training script, unedited, with RMT's patches in place.

    python -m megatron_rmt.run pretrain_gpt.py <its flags> --rmt ...
    torchrun --nproc-per-node 8 -m megatron_rmt.run pretrain_gpt.py <its flags> --rmt ...
    torchrun --nproc-per-node 8 -m megatron_rmt.run -m company.pretrain <its flags> --rmt ...

The script runs as Python itself would run it: as ``__main__``, with its own folder first on the
import path and its own ``sys.argv``. Where CUDA is absent the CPU stands in for it. Without
``--rmt`` the training is the script's own, digit for digit.
"""

import os
import runpy
import sys
from pathlib import Path

import megatron_rmt

USAGE = "usage: python -m megatron_rmt.run SCRIPT.py [flags]   or   -m MODULE [flags]"


def main() -> None:
    """Patch Megatron, then become the script that the command line names."""
    words = sys.argv[1:]
    if not words:
        sys.exit(f"megatron_rmt.run: no script given; {USAGE}")
    if words[0] in ("-h", "--help"):
        print(__doc__)
        return
    as_module = words[0] == "-m"
    if as_module and len(words) < 2:
        sys.exit(f"megatron_rmt.run: -m needs the name of a module; {USAGE}")
    target, flags = (words[1], words[2:]) if as_module else (words[0], words[1:])
    if not as_module and not Path(target).is_file():
        sys.exit(f"megatron_rmt.run: there is no script {target} in {Path.cwd()}; {USAGE}")

    # Before patching, which may add flags that the CPU needs.
    sys.argv = [target, *flags]
    try:
        megatron_rmt.patch()
    except RuntimeError as error:
        sys.exit(str(error))
    if as_module:
        runpy.run_module(target, run_name="__main__", alter_sys=True)
        return
    _let_script_import_its_neighbours(Path(target))
    runpy.run_path(target, run_name="__main__")


def _let_script_import_its_neighbours(script: Path) -> None:
    """Put the script's folder where ``python -m`` put the working directory."""
    package_root = str(Path(__file__).resolve().parents[1])
    sys.path[0] = str(script.resolve().parent)
    # Processes that Megatron starts to write checkpoints import the package again.
    if package_root not in map(os.path.abspath, sys.path):
        sys.path.append(package_root)


if __name__ == "__main__":
    main()

"""Conversion by NVIDIA's Megatron-Bridge, for families that ``weight_names.py`` has no table of.

Megatron-Bridge needs Transformer Engine and many other packages; it is not a dependency. It builds
the model, so memory is not bounded here, and it writes its own description of the model
(``run_config.yaml``) instead of ``model_flags.txt``.
"""

import argparse
import importlib.util

INSTALL = (
    "--backend megatron-bridge needs NVIDIA's Megatron-Bridge (pip install megatron-bridge, which "
    "needs Transformer Engine and a GPU environment)"
)


def run(arguments: argparse.Namespace) -> None:
    """Hand one command of ``convert_checkpoint.py`` over.

    Raises:
        ValueError: Megatron-Bridge is not installed, cannot be imported, or fails; or an option was
            given that it does not have.
    """
    given = [
        f"--{name.replace('_', '-')}"
        for name in ("dtype", "verify", "print_flags", "iteration")
        if getattr(arguments, name, None)
    ]
    if given:
        raise ValueError(f"{given[0]} is not available with --backend megatron-bridge.")
    if arguments.command == "to-huggingface" and arguments.tokenizer is None:
        raise ValueError(
            "--backend megatron-bridge needs --tokenizer HF_DIR, the original model, for the way "
            "back."
        )
    if arguments.target.exists():
        raise ValueError(f"--target {arguments.target} exists; remove it or choose another name.")
    if importlib.util.find_spec("megatron") is None or not importlib.util.find_spec(
        "megatron.bridge"
    ):
        raise ValueError(f"{INSTALL}; it is not installed in this environment.")
    try:
        from megatron.bridge import AutoBridge
    except ImportError as error:
        raise ValueError(f"{INSTALL}; its import failed ({error}).") from error
    if arguments.command == "to-megatron":
        AutoBridge.import_ckpt(arguments.source, str(arguments.target))
    else:
        bridge = AutoBridge.from_hf_pretrained(str(arguments.tokenizer))
        bridge.export_ckpt(str(arguments.source), str(arguments.target))

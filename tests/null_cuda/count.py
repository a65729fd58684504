"""What a decode step of Qwen3-14B asks of the host, as one rank of tensor parallel 4.

    python -m tests.null_cuda.count [--samples 4 16] [--layers 40] [--cache FOLDER]

One step of the recipe's model, 8 positions a sample and 8 rollouts a position, Megatron's local
layers. Operations are launches, products, copies (and fills) and collectives of one token of all
rows, drawing and writing included; "graph" is what the step is once it is replayed.
"""

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.null_cuda import device
from tests.tiny_tokenizer import build_tokenizer

RANKS = 4
MODEL = (
    "--hidden-size 5120 --ffn-hidden-size 17408 --num-attention-heads 40 "
    "--group-query-attention --num-query-groups 8 --kv-channels 128 --qk-layernorm --bf16 "
    "--max-position-embeddings 40960 --position-embedding-type rope --rotary-base 1000000 "
    "--normalization RMSNorm --swiglu --disable-bias-linear "
    "--untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 "
    "--transformer-impl local --no-gradient-accumulation-fusion --no-masked-softmax-fusion "
    "--no-persist-layer-norm --no-rope-fusion --disable-jit-fuser --padded-vocab-size 151936 "
    "--tensor-model-parallel-size 4 --sequence-parallel --use-distributed-optimizer "
    "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
)
TRAINING = (
    "--mock-data --split 100,0,0 --micro-batch-size 1 --seq-length 512 --train-iters 1 --lr 1e-6 "
    "--lr-decay-style constant --eval-iters 0 --eval-interval 1000 --log-interval 1 "
    "--disable-gloo-process-groups --tokenizer-type HuggingFaceTokenizer --num-workers 0"
)
RMT = (
    "--rmt --rmt-template inline --rmt-initial-budget 16 --rmt-positions-per-sample 8 "
    "--rmt-group-size 8 --rmt-answer-tokens 1 --rmt-force-close --rmt-attention sdpa"
)
OPERATIONS = (
    "launch",
    "gemm",
    "pageable copy to device",
    "pinned copy to device",
    "pageable copy to host",
    "pinned copy to host",
    "copy on device",
    "memset",
    "collective",
)


def operations(events: Mapping[str, int]) -> int:
    """Calls that hand the device something to do, graphs apart."""
    return sum(events.get(name, 0) for name in OPERATIONS)


def is_replayed(events: Mapping[str, int]) -> bool:
    """Whether a decode step was one launch of a graph and nothing else."""
    return events == {"graph launch": 1}


def largest_step(phases: Mapping[str, Sequence[Mapping[str, Any]]]) -> Mapping[str, Any]:
    """The decode step of a report, not replayed, with the most operations."""
    return max(phases["decode"], key=lambda own: operations(own["events"]))


def main() -> None:
    """Run a step for each number of samples, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--samples", type=int, nargs="+", default=[4, 16], help="of the rank (default 4 16)")
    add("--layers", type=int, default=40)
    add("--cache", type=Path, default=device.REPOSITORY / ".pytest_cache/d/null_cuda")
    given = parser.parse_args()
    if lacking := device.lacking():
        parser.error(lacking)
    folder = device.build(given.cache)
    print("| samples | rows | launches | products | copies | collectives | all | waits | graph |")
    print("|---" * 9 + "|")
    for samples in given.samples:
        with tempfile.TemporaryDirectory() as root:
            build_tokenizer().save_pretrained(f"{root}/tokenizer")
            flags = f"{MODEL} {TRAINING} {RMT} --num-layers {given.layers}".split()
            flags += ["--global-batch-size", str(samples)]
            flags += ["--tokenizer-model", f"{root}/tokenizer"]
            options = ["--world-size", str(RANKS), "--report", f"{root}/report.json"]
            device.run(folder, "tests.null_cuda.rehearsal", [*options, "--", *flags])
            phases = json.loads(Path(root, "report.json").read_text(encoding="utf-8"))["phases"]
        step = largest_step(phases)
        events, total = step["events"], operations(step["events"])
        launches, products, told = (events.get(n, 0) for n in ("launch", "gemm", "collective"))
        waits = max(own["events"].get("wait", 0) for own in phases["take tokens"])
        replayed = sum(is_replayed(own["events"]) for own in phases["decode"])
        graph = "1 launch" if replayed else "none"
        cells = (samples, step["known"]["rows"], launches, products)
        cells += (total - launches - products - told, told, total, waits, graph)
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()

"""A tiny model, corpus and launcher, with which tests run the whole pre-training program.

The model is briefly trained, on text in which thoughts are closed and answers boxed here and there,
so that its entropies reach every tier, its thoughts end at different lengths and some of its
answers are right: a random one would give RMT hardly anything to reward.
"""

import json
import multiprocessing
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as distributed_checkpoint
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_rmt.cpu import platform as cpu_platform
from tests.distributed import REPOSITORY, run_distributed

PRETRAIN = REPOSITORY / "examples/pretrain_rmt.py"
# A process of its own, where the CPU does not stand in for CUDA.
MAKE_MODEL = r"""
import json, sys
from pathlib import Path
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

corpus, target = map(Path, sys.argv[1:])
torch.manual_seed(1)
torch.set_num_threads(1)
texts = [json.loads(line)["text"] for line in open(corpus, encoding="utf-8")]
bpe = Tokenizer(models.BPE())
bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
bpe.decoder = decoders.ByteLevel()
alphabet = pre_tokenizers.ByteLevel.alphabet()
bpe.train_from_iterator(texts, trainers.BpeTrainer(
    vocab_size=380, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False))
bpe.add_tokens([AddedToken(t, normalized=False) for t in ("<think", "</think>", "\\boxed{")])
tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>")
tokenizer.save_pretrained(target)
end, close, box, brace = (bpe.token_to_id(t) for t in ("<|end|>", "</think>", "\\boxed{", "}"))
stream = []
for text in texts:
    ids = [*bpe.encode(text).ids, end]
    for index, token in enumerate(ids):
        kind = torch.rand(()).item()
        if kind < 0.1:
            budget, length = torch.randint(1, 7, (2,)).tolist()
            stem = bpe.encode(f"<think budget={budget}>").ids
            stream += [*stem, *ids[max(0, index - length) : index], close]
        elif kind > 0.95:
            stream += [close, box, token, brace]
        stream.append(token)
stream = torch.tensor(stream)
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024,
    tie_word_embeddings=True, bos_token_id=end, eos_token_id=end))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for step in range(300):
    starts = torch.randint(len(stream) - 64, (16, 1))
    batch = stream[starts + torch.arange(64)]
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print("loss", loss.item(), "tokens", len(stream))
model.save_pretrained(target)
"""

# Budgets 6, 4, 3, 2, 2, 1 over six steps.
STEPS = 6
TRAINING = shlex.split(
    f"--train-iters {STEPS} --seq-length 64 --micro-batch-size 1 --global-batch-size 4 --seed 7 "
    "--split 100,0,0 --lr 1e-3 --min-lr 1e-4 --lr-decay-style cosine --weight-decay 0.01 "
    "--clip-grad 0.2 --eval-iters 0 --eval-interval 1000 --log-interval 1 --ckpt-format torch_dist"
)
RMT = shlex.split(
    "--rmt --rmt-template inline --rmt-positions-per-sample 3 --rmt-group-size 4 "
    "--rmt-initial-budget 6 --rmt-answer-tokens 1 --rmt-force-close"
)

Line = dict[str, float | None]


@dataclass(frozen=True)
class TinyInputs:
    """What every run reads: the model, its converted checkpoint and its flags, the corpus."""

    huggingface: Path
    checkpoint: Path
    data: Path

    def flags(self, resume_from: Path | None = None) -> list[str]:
        """Megatron's flags for a few short steps from the converted checkpoint, or from a run's."""
        model = (self.checkpoint / "model_flags.txt").read_text(encoding="utf-8")
        start = ["--load", str(resume_from or self.checkpoint)]
        start += [] if resume_from else ["--finetune"]
        data = ["--data-path", str(self.data)]
        return [*shlex.split(model, comments=True), *start, *data, *TRAINING]


def build_inputs(root: Path) -> TinyInputs:
    """Write corpus, model, checkpoint and token files, with the project's own tools."""
    tools = REPOSITORY / "tools"
    corpus, huggingface, megatron = root / "corpus", root / "huggingface", root / "megatron"
    text, tokens = corpus / "train.jsonl", root / "data/train"
    _python(f"{tools}/generate_corpus.py --output {corpus} --train-documents 200")
    _python("-c", MAKE_MODEL, text, huggingface)
    _python(f"{tools}/convert_checkpoint.py to-megatron --source {huggingface} --target {megatron}")
    _python(
        f"{tools}/preprocess_data.py --input {text} --output-prefix {tokens} "
        f"--tokenizer {huggingface}"
    )
    return TinyInputs(huggingface, megatron, tokens)


def _python(words: str, *others: str | Path) -> None:
    process = subprocess.run(
        [sys.executable, *words.split(), *map(str, others)],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
    )
    assert process.returncode == 0, process.stderr


@dataclass(frozen=True)
class Run:
    """A finished run: the lines of its metrics file, and the stdout and stderr of all ranks."""

    metrics: list[Line]
    log: str

    def printed(self, name: str) -> list[str]:
        """The digits behind ``name`` in Megatron's line of each iteration."""
        lines = re.findall(r"^.* iteration +\d+/ .*$", self.log, re.MULTILINE)
        return [re.search(rf"\| {name}: ([^|]+) \|", line)[1].strip() for line in lines]


def run(directory: Path, ranks: int, flags: Sequence[str], program: Path = PRETRAIN) -> Run:
    """Run ``program`` with ``flags`` on ``ranks`` ranks, forked where Megatron is imported already.

    Metrics go to ``directory``, which is made.
    """
    directory.mkdir()
    metrics = directory / "metrics.jsonl"
    if "--rmt" in flags:
        flags = [*flags, "--rmt-metrics-file", str(metrics)]
    try:
        run_distributed(ranks, _run_program, str(program), list(flags), str(directory))
    except RuntimeError as error:
        raise AssertionError(f"{error}\n{_log(directory)[-3000:]}") from error
    return Run(read_metrics(metrics), _log(directory))


def _run_program(program: str, flags: list[str], directory: str) -> None:
    """On each rank, with everything that it prints in a file."""
    rank = torch.distributed.get_rank()
    with open(f"{directory}/rank{rank}.log", "wb") as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
    # What a shell starts in the background ignores Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Saving a checkpoint starts a process of its own.
    multiprocessing.current_process().daemon = False
    _fork_what_saves()
    torch.set_num_threads(1)
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    sys.argv = [program, *cpu_platform.add_required_flags(flags)]
    try:
        runpy.run_path(program, run_name="__main__")
    except SystemExit as end:
        # --exit-interval ends the program this way.
        if end.code not in (None, 0):
            raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _fork_what_saves() -> None:
    """Processes that save a checkpoint are forked: new ones would import everything again, 5 s."""
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    from megatron_rmt.job import processes

    PersistentAsyncCaller._get_process.__func__.__defaults__ = ("fork", 10, None)
    processes.write_results_queue.__defaults__ = ("fork",)


def _log(directory: Path) -> str:
    return "\n".join(path.read_text(errors="replace") for path in sorted(directory.glob("*.log")))


def read_metrics(path: Path) -> list[Line]:
    """The lines of a metrics file without the timings; none if there is no file."""
    if not path.exists():
        return []
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.endswith("seconds")} for line in lines]


def checkpoint_tensors(directory: Path, iteration: int) -> dict[str, torch.Tensor]:
    """Every tensor of a torch_dist checkpoint: weights and optimizer state, whole."""
    reader = distributed_checkpoint.FileSystemReader(directory / f"iter_{iteration:07d}")
    stored: dict[str, Any] = reader.read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in stored.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    distributed_checkpoint.load(tensors, storage_reader=reader, no_dist=True)
    return tensors

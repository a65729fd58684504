"""Next-token accuracy on held-out text, predicted at once and after a thought, on entropy splits.

    python tools/evaluate.py --load CHECKPOINT --data heldout.jsonl --output before.json
    python tools/evaluate.py --load RUN --model-flags CHECKPOINT --data heldout.jsonl \\
        --positions-from before.json --output after.json
    python tools/evaluate.py --compare before.json after.json
    python tools/evaluate.py --tasks examples/tasks/gsm8k.yaml --data heldout.jsonl \\
        --load HUGGINGFACE_DIR --output tasks.json

The splits are the papers' (RPT, arXiv 2506.08007; RMT, arXiv 2509.24375): positions whose next
token the model predicts with an entropy above 0.5 (easy), 1.0 (medium) and 1.5 nats (hard). They
are nested; "average" is the mean of the three, "all" that of all positions whatever their entropy.
The most likely token after the plain document is judged at every position, and the perplexity is
that of the plain text, over all tokens that count. Some positions of each document (--positions)
are predicted in four ways:

- next token: at once, from the plain document;
- thought: after a thought within the budget, by the engine that training uses;
- swapped thought: after the thought of another position of the same file, half way round all of
  them, so that each thought is used once;
- no thought: the thought is closed before its first token.

If thoughts help, "thought" is above the others; if it is not above "swapped thought", it is not
what the thought says that helps. Three things are judged: the answer that is drawn, as in training;
where the answer stands right after the thought (--rmt-template inline, not in a box), whether the
true token is the most likely one there, which is what "next token" is judged by; and log p of the
truth, mean nats a token over the next --rmt-target-tokens true tokens, at temperature 1. A
--rmt-reward that wants no answer gets none drawn.

An answer counts by the template's rule of training: it must be a byte prefix of the true text and
end where a token ends. With --positions answers it is judged as a whole answer, too: the first line
of what is said must be the text of the span, and no more. Answers are sampled as in training unless
--rmt-greedy; with several --samples the accuracy is their mean. Intervals (95 %) are bootstrapped
over documents, because the positions of one document are not independent; there is none for fewer
than two documents.

Two evaluations can be compared on the same positions and with the same prompt only:
--positions-from takes documents, positions and splits from an earlier output, whatever the
entropies of the model at hand. The output holds the prompt's texts, because a chat template may
write the date, or be edited; another prompt is refused.

--tasks asks the tasks of lm-evaluation-harness instead (pip install 'megatron_rmt[tasks]'), of a
model that convert_checkpoint.py to-huggingface exported: by their names in the harness, with data
of the Hugging Face hub, or as YAML files, whose test split --data names. --documents, --seed and
--rollouts-at-once have their meaning; the table, also of --compare, is one of its own.

Flags that are not listed are Megatron's (--bf16, --tensor-model-parallel-size, --ckpt-step, ...).
These have their meaning of training: --rmt-template, --rmt-no-chat, --rmt-answer-tokens,
--rmt-force-close, --rmt-greedy, --rmt-temperature, --rmt-reward, --rmt-target-tokens,
--rmt-entropy-thresholds, --rmt-entropy-top-k, --rmt-head-chunk-size. Start it with torchrun for
several ranks; data-parallel replicas share the documents. The table goes to stdout, everything else
to stderr.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from document_tokens import SPECIAL_TOKENS, DocumentTokenizer
from evaluation import (
    NOT_COUNTED,
    Measured,
    Record,
    check_same_prompt,
    compare,
    read_output,
    summary,
    write_output,
)
from evaluation_documents import Document, documents_of, names_of, read_texts, tokenize
from model_on_hand import loading_flags, model_flags, quiet_unless_it_fails, start_mid_training
from task_harness import compare_scores, is_scores, run_tasks, table, write_scores

if TYPE_CHECKING:
    from evaluation_passes import Reasoning
    from megatron_rmt.mid_training import MidTraining

POSITIONS = ("uncertain", "answers")
# Flags of this tool that mean something to --tasks.
WITH_TASKS = ("load", "data", "output", "documents", "seed", "rollouts_at_once")
# The prompt and sampling flags of training that mean the same here; the others only train.
SHARED_FLAGS = frozenset(
    (
        "--rmt-template",
        "--rmt-no-chat",
        "--rmt-answer-tokens",
        "--rmt-reward",
        "--rmt-target-tokens",
        "--rmt-force-close",
        "--rmt-greedy",
        "--rmt-temperature",
        "--rmt-entropy-thresholds",
        "--rmt-entropy-top-k",
        "--rmt-head-chunk-size",
    )
)


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
    add(
        "--data",
        type=Path,
        nargs="+",
        metavar="JSONL",
        help="one document a line; each file gets its own rows, and all of them a total",
    )
    add("--output", type=Path, help="JSON to be written")
    add(
        "--tasks",
        nargs="+",
        metavar="TASK",
        help="ask these of the model in --load, of Hugging Face's form: names, or YAML files",
    )
    add(
        "--model-flags",
        type=Path,
        help="where the model's Megatron flags are: a file, or the directory of a converted "
        "checkpoint (default: --load; a training run's --save directory has none)",
    )
    add("--documents", type=int, help="evaluate the first N documents of a file (default: all)")
    add(
        "--positions",
        choices=POSITIONS,
        help="which positions are predicted by reasoning: uncertain, drawn from those above the "
        "lowest threshold (default), or answers, from those whose next token is the first one in "
        'a span of the line\'s answer_spans, such as "answer_spans": [[10, 12]], [first, limit) '
        "characters of its text",
    )
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
    add("--no-swap", action="store_true", help="leave out the thoughts of other positions")
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
    add(
        "--special-tokens",
        choices=SPECIAL_TOKENS,
        default="plain",
        help="what a special token is that a text spells out, as in preprocess_data.py (default "
        "plain: text)",
    )
    return parser


def check_flags(flags: argparse.Namespace, others: Sequence[str]) -> None:
    """Refuse what cannot be meant.

    Raises:
        ValueError: one sentence that names flag, value and remedy.
    """
    for name in ("load", "data", "output"):
        if getattr(flags, name) is None:
            raise ValueError(f"--{name} is missing; pass --load, --data and --output (see --help).")
    least_one = dict.fromkeys(("documents", "budget", "samples", "rollouts_at_once"), 1)
    for name, least in (least_one | {"seq_length": 2, "positions_per_document": 0}).items():
        value = getattr(flags, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; pass {least} or more.")
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
            "--positions": flags.positions,
            "--rmt-entropy-thresholds": given & {"--rmt-entropy-thresholds"} or None,
        }
        for name, value in fixed.items():
            if value is not None:
                raise ValueError(f"{name} is fixed by --positions-from; leave it out.")
    _check_output(flags.output)


def evaluate_tasks(flags: argparse.Namespace) -> None:
    """Ask ``--tasks``, write ``--output`` and print the table.

    Raises:
        ValueError: something that the user passed cannot be used.
    """
    for name in ("load", "output"):
        if getattr(flags, name) is None:
            raise ValueError(f"--{name} is missing; --tasks needs --load and --output.")
    for name in ("documents", "rollouts_at_once"):
        value = getattr(flags, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; pass 1 or more.")
    _check_output(flags.output)
    settings = {
        "load": str(flags.load),
        "tasks": flags.tasks,
        "data": [str(path) for path in flags.data or []],
        "documents": flags.documents,
        "seed": flags.seed,
    }
    scores = run_tasks(
        flags.load,
        flags.tasks,
        flags.data or [],
        documents=flags.documents,
        seed=flags.seed,
        at_once=flags.rollouts_at_once,
    )
    write_scores(flags.output, scores, settings)
    print(table(scores, flags.seed))


def _check_output(path: Path) -> None:
    """Refuse a folder in the place of the file to be written.

    Raises:
        ValueError: it is one.
    """
    if path.is_dir():
        raise ValueError(f"--output {path} is a directory; name a file in it.")


def megatron_flags(flags: argparse.Namespace, length: int, others: Sequence[str]) -> list[str]:
    """What Megatron's own parser gets; what the user passed comes last and wins."""
    return [
        *model_flags(flags.load, flags.model_flags),
        *loading_flags(flags.load, length),
        *("--rmt", "--seed", str(flags.seed), "--rmt-initial-budget", str(flags.budget)),
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
    positions = flags.positions
    per_document = 16 if flags.positions_per_document is None else flags.positions_per_document
    if earlier is not None:
        kept = kept_settings(earlier, flags.positions_from)
        length, positions = kept["seq_length"], kept["positions"]
        per_document = 0
    words = megatron_flags(flags, length, others)
    # All lines are read before the model is loaded, so that a mistake in them shows at once.
    files = names_of(flags.data)
    answers = positions == "answers"
    texts = [
        text
        for name, path in files.items()
        for text in read_texts(
            path, flags.json_key, flags.solution_only, flags.documents, answers=answers, name=name
        )
    ]
    if earlier is not None:
        missing = sorted({record.file for record in earlier.records} - {*files})
        if missing:
            raise ValueError(
                f"--positions-from {flags.positions_from} was measured on {', '.join(missing)} "
                f"too, and --data holds {', '.join(files)}; pass the same files."
            )
        lines = {(record.file, record.line) for record in earlier.records}
        texts = [text for text in texts if (text.file, text.line) in lines]

    with quiet_unless_it_fails():
        run = start_mid_training(words)
    # Imported here, as both import Megatron, which has to be started first.
    from megatron.training import get_tokenizer

    from evaluation_passes import Reasoning, measure
    from megatron_rmt.prompt.ids_of_text import DOCUMENTS, check_ids_are_text

    check_ids_are_text(get_tokenizer(), [one.text for one in texts[:DOCUMENTS]])
    if earlier is not None:
        theirs = earlier.settings["prompt"]
        check_same_prompt(flags.positions_from, theirs, "this evaluation", asked_with(run))
    leads = dist.get_rank() == 0
    tokenizer = DocumentTokenizer(get_tokenizer(), flags.special_tokens)
    documents = tokenize(texts, tokenizer, run.prompt.bytes_of)
    if leads and tokenizer.written:
        print(tokenizer.report(), file=sys.stderr)
    work: list[tuple[Document, Record | None]] = [(document, None) for document in documents]
    if earlier is not None:
        work = list(documents_of(earlier, flags.positions_from, documents))
    how = Reasoning(
        length=length,
        positions=per_document,
        answers=answers,
        budget=flags.budget,
        samples=flags.samples,
        swap=not flags.no_swap,
        at_once=flags.rollouts_at_once,
        seed=flags.seed,
    )
    check_something_is_measured(run)
    records = []
    for name in files:
        own = [(document, record) for document, record in work if document.file == name]
        records += measure(run, own, how, show_progress=leads)
    if leads:
        settings = settings_of(flags, run, how, earlier)
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


def check_something_is_measured(run: "MidTraining") -> None:
    """Refuse prompts after which nothing is predicted.

    Raises:
        ValueError: the reward wants no answer, and the template has the truth in a box.
    """
    if run.prompt.template.answer == "boxed" and not run.prompt.answer_tokens:
        raise ValueError(
            f"--rmt-reward {run.settings.reward} asks for no answer, and with --rmt-template "
            f"{run.settings.template} the truth does not follow the thought; leave --rmt-reward "
            "out, or pass --rmt-template inline."
        )


def asked_with(run: "MidTraining") -> dict[str, str]:
    """The texts of the prompt, and a digest of them and of the tokens that they become."""
    return run.prompt.rendering() | {"digest": run.prompt.digest}


def kept_settings(earlier: Measured, path: Path) -> dict[str, Any]:
    """The settings that --positions-from takes from the ``earlier`` output in ``path``.

    Raises:
        ValueError: one is missing, or is none that evaluate.py writes.
    """
    kinds = {
        "seq_length": int,
        "solution_only": bool,
        "positions": str,
        "positions_per_document": int,
        "entropy_thresholds": list,
        "entropy_top_k": int | None,
    }
    found = {name: earlier.settings.get(name, ...) for name in kinds}
    longest = max(record.tokens for record in earlier.records)
    for name, kind in kinds.items():
        if not isinstance(found[name], kind) or (name == "seq_length" and found[name] < longest):
            raise ValueError(
                f"--positions-from {path} is not an output of evaluate.py: its {name} is "
                f"{found[name]!r}."
            )
    return found


def settings_of(
    flags: argparse.Namespace, run: "MidTraining", how: "Reasoning", earlier: Measured | None
) -> dict[str, Any]:
    """What the output says of how it was made."""
    tracker = flags.load / "latest_checkpointed_iteration.txt"
    shared = run.settings
    settings = {
        "load": str(flags.load),
        "iteration": str(run.args.ckpt_step or tracker.read_text().strip()),
        "data": [str(path) for path in flags.data],
        "json_key": flags.json_key,
        "special_tokens": flags.special_tokens,
        "seq_length": how.length,
        "solution_only": flags.solution_only,
        "positions": flags.positions or POSITIONS[0],
        "positions_per_document": how.positions,
        "positions_from": None,
        "entropy_thresholds": list(shared.entropy_thresholds),
        "entropy_top_k": shared.entropy_top_k,
        "template": shared.template,
        "chat": not shared.no_chat,
        "prompt": asked_with(run),
        "budget": flags.budget,
        "samples": flags.samples,
        "greedy": shared.greedy,
        "temperature": shared.temperature,
        "answer_tokens": shared.answer_tokens,
        "reward": shared.reward,
        "target_tokens": shared.target_tokens,
        "swap": how.swap,
        "force_close": shared.force_close,
        "dtype": str(run.args.params_dtype).removeprefix("torch."),
        "seed": flags.seed,
    }
    if earlier is not None:
        settings |= kept_settings(earlier, flags.positions_from)
        settings["positions_from"] = str(flags.positions_from)
    return settings


def main() -> None:
    """Evaluate or compare; bad input ends it with one sentence."""
    parser = build_parser()
    flags, others = parser.parse_known_args()
    given = {name for name, value in vars(flags).items() if value != parser.get_default(name)}
    try:
        if flags.compare is not None:
            if others or given != {"compare"}:
                raise ValueError("--compare takes files and no other flag; leave the others out.")
            is_of_tasks = len(flags.compare) > 1 and is_scores(flags.compare[0])
            print((compare_scores if is_of_tasks else compare)(flags.compare))
        elif flags.tasks is not None:
            strays = sorted(given - {"tasks", *WITH_TASKS})
            words = [*(f"--{name.replace('_', '-')}" for name in strays), *others]
            if words:
                raise ValueError(f"{' '.join(words)} means nothing to --tasks; leave it out.")
            evaluate_tasks(flags)
        else:
            evaluate(flags, others)
            dist.destroy_process_group()
    except ValueError as error:
        sys.exit(f"{Path(__file__).name}: {error}")


if __name__ == "__main__":
    main()

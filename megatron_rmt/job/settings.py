"""The ``--rmt-*`` flags: one group of ``--help``, each with its unit, default and source.

Sources: "paper" is RMT (arXiv 2509.24375), "RPT" is arXiv 2506.08007, "ours" is what neither says.
``docs/hyperparameters.md`` sets what the papers say beside what we chose.
"""

import importlib.metadata
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from typing import Any, NoReturn

from megatron_rmt.job.config_file import read_config_when_parsing

GROUP_TITLE = "reinforcement mid-training (RMT)"


@dataclass(frozen=True)
class Flag:
    """One flag.

    kind: ``bool`` for a switch. unit: of the value. source: paper, RPT or ours. metavar: names of
    the values where there are several. unset: what ``None`` as the default means.
    """

    name: str
    description: str
    source: str
    kind: type = bool
    default: Any = False
    unit: str = ""
    metavar: tuple[str, ...] = ()
    unset: str = ""

    @property
    def attribute(self) -> str:
        """Its name in the parsed arguments."""
        return self.name.removeprefix("--").replace("-", "_")

    @property
    def stated_default(self) -> str:
        """The default as one would type it."""
        if self.kind is bool:
            return "off"
        if self.default is None:
            return self.unset
        if self.metavar:
            return " ".join(str(value) for value in self.default)
        return str(self.default)

    @property
    def help(self) -> str:
        """The line of ``--help``."""
        unit = f", in {self.unit}" if self.unit else ""
        return f"{self.description}{unit} (default {self.stated_default}; {self.source})."

    def add_to(self, group: Any) -> None:
        """Add the flag to a group of a parser."""
        if self.kind is bool:
            group.add_argument(self.name, action="store_true", help=self.help)
            return
        several: dict[str, Any] = {}
        if self.metavar:
            several = {"nargs": len(self.metavar), "metavar": self.metavar}
        default = list(self.default) if self.metavar else self.default
        group.add_argument(self.name, type=self.kind, default=default, help=self.help, **several)


_TIERS = ("EASY", "MEDIUM", "HARD")

FLAGS: tuple[Flag, ...] = (
    Flag("--rmt", "Train with RMT; without it nothing changes", "ours"),
    Flag(
        "--rmt-config",
        "YAML file of these settings, such as group-size: 8; flags on the command line win",
        "ours",
        str,
        None,
        unset="no file",
    ),
    Flag(
        "--rmt-positions-per-sample",
        "Most positions chosen in each sample of the batch",
        "ours",
        int,
        16,
        "positions",
    ),
    Flag("--rmt-group-size", "G: responses to each position", "paper", int, 8, "rollouts"),
    Flag(
        "--rmt-temperature",
        "Sampling temperature of the rollouts",
        "paper",
        float,
        0.8,
        "units of the logits",
    ),
    Flag("--rmt-greedy", "Most likely token instead of sampling, for tests", "ours"),
    Flag(
        "--rmt-top-k",
        "Draw only from tokens at least as probable as the K th; the update still trains the whole "
        "distribution at --rmt-temperature",
        "paper",
        int,
        None,
        "tokens",
        unset="all",
    ),
    Flag(
        "--rmt-top-p",
        "Draw only from the most probable tokens that together have probability P, after "
        "--rmt-top-k; the update as for --rmt-top-k",
        "paper",
        float,
        None,
        "parts of 1",
        unset="all",
    ),
    Flag(
        "--rmt-logprob-tolerance",
        "Stop before the optimizer's step if the mean |log-prob in the update - log-prob when "
        "drawn| of a step's tokens is larger",
        "ours",
        float,
        None,
        "nats",
        unset="1e-3 in fp32, 0.2 in half precision",
    ),
    Flag(
        "--rmt-rollout-kv-gib",
        "Bound on the keys and values that the rollouts of a rank hold at a time; positions are "
        "decoded in waves that fit",
        "ours",
        float,
        None,
        "GiB",
        unset="no bound",
    ),
    Flag("--rmt-initial-budget", "B_0: thought asked for at first", "paper", int, 800, "tokens"),
    Flag("--rmt-minimum-budget", "B_min: least thought asked for", "paper", int, 1, "tokens"),
    Flag(
        "--rmt-budget-decay",
        "gamma: B_t = max(B_min, floor(B_0 * gamma^(t/T)))",
        "paper",
        float,
        0.2,
        "parts of B_0 left at the end",
    ),
    Flag("--rmt-no-budget-decay", "The budget stays B_0", "ablation of the paper"),
    Flag("--rmt-answer-tokens", "Most that an answer may take", "ours", int, 32, "tokens"),
    Flag(
        "--rmt-force-close",
        "Write the end of thought at 2*B_t tokens and let the model answer, instead of giving up; "
        "for models that rarely end a thought by themselves",
        "ours",
    ),
    Flag(
        "--rmt-warmup-iters",
        "Format warm-up: in the first steps thoughts are closed at B_t, the true answer is "
        "supervised, and only the length is rewarded; for small base models",
        "ours",
        int,
        0,
        "steps",
    ),
    Flag(
        "--rmt-warmup-thought",
        "Thoughts of the warm-up: drawn by the model, with the answer alone supervised, or text: "
        "the text's own next B_t tokens, supervised like the answer, so that the model learns to "
        "draft the text and to answer from the draft",
        "ours",
        str,
        "drawn",
    ),
    Flag(
        "--rmt-length-reward-weight",
        "w: reward = (1-w) * match + w * length reward",
        "ours",
        float,
        0.2,
        "parts of 1",
    ),
    Flag(
        "--rmt-length-reward-maximum",
        "Length reward at exactly B_t tokens",
        "ours",
        float,
        1.0,
        "rewards of a match",
    ),
    Flag("--rmt-no-length-reward", "Reward = match alone", "ablation of the paper"),
    Flag(
        "--rmt-entropy-thresholds",
        "Lower ends of the tiers",
        "RPT",
        float,
        (0.5, 1.0, 1.5),
        "nats",
        _TIERS,
    ),
    Flag(
        "--rmt-entropy-top-k",
        "Entropy over the most likely tokens only; RPT takes 16",
        "ours",
        int,
        None,
        "tokens",
        unset="the whole vocabulary",
    ),
    Flag(
        "--rmt-curriculum-start",
        "t1: end of the first phase",
        "paper",
        float,
        0.3,
        "parts of --train-iters",
    ),
    Flag(
        "--rmt-curriculum-end",
        "t2: start of the last phase",
        "paper",
        float,
        0.7,
        "parts of --train-iters",
    ),
    Flag(
        "--rmt-start-probabilities",
        "Share of each tier until t1",
        "ours",
        float,
        (0.6, 0.3, 0.1),
        "parts of 1",
        _TIERS,
    ),
    Flag(
        "--rmt-end-probabilities",
        "Share of each tier from t2 on",
        "ours",
        float,
        (0.1, 0.3, 0.6),
        "parts of 1",
        _TIERS,
    ),
    Flag("--rmt-no-curriculum", "Positions uniformly over all tiers", "ablation of the paper"),
    Flag(
        "--rmt-ntp-coefficient",
        "lambda: loss = L_GRPO + lambda * L_NTP",
        "paper",
        float,
        0.1,
        "parts of L_NTP",
    ),
    Flag("--rmt-no-ntp", "L_GRPO alone", "ablation of the paper"),
    Flag(
        "--rmt-no-rl",
        "Plain pre-training, digit for digit: no entropy pass, no rollouts",
        "ablation of the paper",
    ),
    Flag(
        "--rmt-template",
        "Prompt: rpt (instruction first), raw (document first), inline (for small base models) or "
        "a JSON file",
        "RPT",
        str,
        "rpt",
    ),
    Flag(
        "--rmt-no-chat",
        "Leave out the tokenizer's chat markers from rpt and raw prompts",
        "ours",
    ),
    Flag(
        "--rmt-seed",
        "Seed of positions and rollouts",
        "ours",
        int,
        None,
        unset="--seed",
    ),
    Flag(
        "--rmt-max-tokens",
        "Deal the samples of a step out again after the rollouts: evenly over the data-parallel "
        "ranks, several in one micro-batch up to N packed tokens, if they fit in the number of "
        "micro-batches that --global-batch-size gives",
        "ours",
        int,
        None,
        "tokens",
        unset="as read",
    ),
    Flag(
        "--rmt-attention",
        "Attention of the update: lse (CPU), flex (CUDA, compiled), sdpa (anywhere, slower); auto "
        "takes the first of them that runs",
        "ours",
        str,
        "auto",
    ),
    Flag(
        "--rmt-head-chunk-size",
        "Logits held at a time by the fused head",
        "ours",
        int,
        384,
        "rows",
    ),
    Flag(
        "--rmt-metrics-file",
        "JSON lines, one per step",
        "ours",
        str,
        None,
        unset="rmt_metrics.jsonl in --save",
    ),
    Flag(
        "--rmt-log-samples-interval",
        "Write a few rollouts as text in the first step after the warm-up and every N th after "
        "that: into rmt_samples.jsonl beside the metrics, and as a table to wandb; 0 writes none",
        "ours",
        int,
        0,
        "steps",
    ),
)


def add_rmt_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Add the ``--rmt-*`` group to Megatron's parser. Harmless when called twice."""
    if all(group.title != GROUP_TITLE for group in parser._action_groups):
        group = parser.add_argument_group(GROUP_TITLE)
        for flag in FLAGS:
            flag.add_to(group)
        read_config_when_parsing(parser, FLAGS)
        _shorten_errors(parser)
    return parser


def _shorten_errors(parser: ArgumentParser) -> None:
    """For RMT's flags leave out the usage, which for Megatron's parser is hundreds of lines."""
    show = parser.error

    def error(message: str) -> NoReturn:
        if message.startswith("argument --rmt"):
            parser.exit(2, f"{message}; --help says what it takes.\n")
        show(message)

    parser.error = error


def readable_help(parser: ArgumentParser) -> ArgumentParser:
    """Let ``--help`` work: Megatron 0.19.2 has a plain % in a help text, and argparse raises."""
    formatter = parser._get_formatter()
    for action in parser._actions:
        try:
            formatter._expand_help(action)
        except (KeyError, TypeError, ValueError):
            action.help = (action.help or "").replace("%", "%%")
    return parser


def is_enabled(args: Namespace) -> bool:
    """Whether training steps are RMT's (``--rmt`` without ``--rmt-no-rl``)."""
    return bool(getattr(args, "rmt", False)) and not args.rmt_no_rl


def rmt_settings(args: Namespace) -> dict[str, Any]:
    """The ``--rmt-*`` values of a run, by name."""
    return {flag.attribute: getattr(args, flag.attribute) for flag in FLAGS}


def versions() -> dict[str, str]:
    """Versions of the packages that decide what a run computes; those that are absent left out."""
    found = {}
    for name in ("megatron_rmt", "megatron-core", "torch", "transformers", "transformer-engine"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


__all__ = [
    "FLAGS",
    "Flag",
    "add_rmt_arguments",
    "is_enabled",
    "readable_help",
    "rmt_settings",
    "versions",
]

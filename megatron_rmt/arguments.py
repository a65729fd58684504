"""The ``--rmt-*`` flags: one group of ``--help``, each with its unit, default and source.

Sources: "paper" is RMT (arXiv 2509.24375), "RPT" is arXiv 2506.08007, "ours" is what neither says.
"""

from argparse import ArgumentParser, Namespace
from typing import Any

GROUP_TITLE = "reinforcement mid-training (RMT)"

Flag = tuple[str, dict[str, Any]]

FLAGS: tuple[Flag, ...] = (
    ("--rmt", {"action": "store_true", "help": "Train with RMT; without it nothing changes."}),
    (
        "--rmt-positions-per-sample",
        {
            "type": int,
            "default": 16,
            "help": "Positions chosen in each sample of the batch (default 16, ours).",
        },
    ),
    (
        "--rmt-group-size",
        {"type": int, "default": 8, "help": "Rollouts G per position (default 8, paper)."},
    ),
    (
        "--rmt-temperature",
        {"type": float, "default": 0.8, "help": "Sampling temperature (default 0.8, paper)."},
    ),
    (
        "--rmt-greedy",
        {"action": "store_true", "help": "Most likely token instead of sampling (for tests)."},
    ),
    (
        "--rmt-top-k",
        {
            "type": int,
            "default": None,
            "help": "Draw only from tokens at least as probable as the K th (default: all, "
            "paper). The update still trains the whole distribution at --rmt-temperature.",
        },
    ),
    (
        "--rmt-top-p",
        {
            "type": float,
            "default": None,
            "help": "Draw only from the most probable tokens that together have probability P, "
            "after --rmt-top-k (default: all, paper). The update as for --rmt-top-k.",
        },
    ),
    (
        "--rmt-logprob-tolerance",
        {
            "type": float,
            "default": None,
            "help": "Stop before the optimizer's step if the mean |log-prob in the update - "
            "log-prob when drawn| of a step's tokens is larger, in nats (default: by precision, "
            "1e-3 in fp32, 0.2 in half; ours).",
        },
    ),
    (
        "--rmt-rollout-kv-gib",
        {
            "type": float,
            "default": None,
            "help": "Bound, in GiB, on the keys and values that the rollouts of a rank hold at a "
            "time; positions are decoded in waves that fit (default: no bound, ours).",
        },
    ),
    (
        "--rmt-initial-budget",
        {
            "type": int,
            "default": 800,
            "help": "Tokens B_0 of thought at the first step (default 800, paper).",
        },
    ),
    (
        "--rmt-minimum-budget",
        {"type": int, "default": 1, "help": "Least tokens B_min of thought (default 1, paper)."},
    ),
    (
        "--rmt-budget-decay",
        {
            "type": float,
            "default": 0.2,
            "help": "gamma: B_t = B_0 * gamma^(t/T) (default 0.2, paper).",
        },
    ),
    (
        "--rmt-no-budget-decay",
        {"action": "store_true", "help": "Ablation: the budget stays B_0."},
    ),
    (
        "--rmt-answer-tokens",
        {"type": int, "default": 32, "help": "Most tokens of an answer (default 32, ours)."},
    ),
    (
        "--rmt-force-close",
        {
            "action": "store_true",
            "help": "Write the end of thought at 2*B_t tokens and let the model answer, instead of "
            "giving up (ours; for models that rarely end a thought by themselves).",
        },
    ),
    (
        "--rmt-warmup-iters",
        {
            "type": int,
            "default": 0,
            "help": "Format warm-up: in the first N steps thoughts are closed at B_t, the true "
            "answer is supervised, and only the length is rewarded (default 0; ours, for small "
            "base models).",
        },
    ),
    (
        "--rmt-length-reward-weight",
        {
            "type": float,
            "default": 0.2,
            "help": "w: reward = (1-w) * match + w * length reward (default 0.2, ours).",
        },
    ),
    (
        "--rmt-length-reward-maximum",
        {
            "type": float,
            "default": 1.0,
            "help": "Length reward at exactly B_t tokens (default 1, ours).",
        },
    ),
    (
        "--rmt-no-length-reward",
        {"action": "store_true", "help": "Ablation: reward = match alone."},
    ),
    (
        "--rmt-entropy-thresholds",
        {
            "type": float,
            "nargs": 3,
            "default": [0.5, 1.0, 1.5],
            "metavar": ("EASY", "MEDIUM", "HARD"),
            "help": "Lower ends of the tiers in nats (default 0.5 1.0 1.5, RPT).",
        },
    ),
    (
        "--rmt-entropy-top-k",
        {
            "type": int,
            "default": None,
            "help": "Entropy over the K most likely tokens only (RPT: 16; default: all, ours).",
        },
    ),
    (
        "--rmt-curriculum-start",
        {
            "type": float,
            "default": 0.3,
            "help": "t1 as a fraction of the training steps (default 0.3, paper).",
        },
    ),
    (
        "--rmt-curriculum-end",
        {
            "type": float,
            "default": 0.7,
            "help": "t2 as a fraction of the training steps (default 0.7, paper).",
        },
    ),
    (
        "--rmt-start-probabilities",
        {
            "type": float,
            "nargs": 3,
            "default": [0.6, 0.3, 0.1],
            "metavar": ("EASY", "MEDIUM", "HARD"),
            "help": "Tier probabilities until t1 (default 0.6 0.3 0.1, ours).",
        },
    ),
    (
        "--rmt-end-probabilities",
        {
            "type": float,
            "nargs": 3,
            "default": [0.1, 0.3, 0.6],
            "metavar": ("EASY", "MEDIUM", "HARD"),
            "help": "Tier probabilities from t2 on (default 0.1 0.3 0.6, ours).",
        },
    ),
    (
        "--rmt-no-curriculum",
        {
            "action": "store_true",
            "help": "Ablation: positions uniformly over all tiers.",
        },
    ),
    (
        "--rmt-ntp-coefficient",
        {
            "type": float,
            "default": 0.1,
            "help": "lambda: loss = L_GRPO + lambda * L_NTP (default 0.1, paper).",
        },
    ),
    ("--rmt-no-ntp", {"action": "store_true", "help": "Ablation: L_GRPO alone."}),
    (
        "--rmt-no-rl",
        {
            "action": "store_true",
            "help": "Ablation: plain pre-training, digit for digit (no entropy pass, no rollouts).",
        },
    ),
    (
        "--rmt-template",
        {
            "type": str,
            "default": "rpt",
            "help": "Prompt: rpt (instruction first), raw (document first), inline (for small base "
            "models) or a JSON file (default rpt, as RPT).",
        },
    ),
    (
        "--rmt-no-chat",
        {
            "action": "store_true",
            "help": "Leave out the tokenizer's chat markers from rpt and raw prompts.",
        },
    ),
    (
        "--rmt-seed",
        {
            "type": int,
            "default": None,
            "help": "Seed of positions and rollouts (default: --seed).",
        },
    ),
    (
        "--rmt-max-tokens",
        {
            "type": int,
            "default": None,
            "help": "Deal the samples of a step out again after the rollouts: evenly over the data-"
            "parallel ranks, several in one micro-batch up to N packed tokens, if they fit in the "
            "number of micro-batches that --global-batch-size gives (default: as read; ours).",
        },
    ),
    (
        "--rmt-head-chunk-size",
        {
            "type": int,
            "default": 256,
            "help": "Rows of logits held at a time by the fused head (default 256).",
        },
    ),
    (
        "--rmt-attention",
        {
            "type": str,
            "choices": ["auto", "sdpa", "lse", "flex"],
            "default": "auto",
            "help": "Attention of the update: lse (CPU), flex (CUDA, compiled), sdpa (anywhere, "
            "slower); auto takes the first of them that runs (default auto).",
        },
    ),
    (
        "--rmt-metrics-file",
        {
            "type": str,
            "default": None,
            "help": "JSON lines, one per step (default: rmt_metrics.jsonl in --save).",
        },
    ),
)


def add_rmt_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Add the ``--rmt-*`` group to Megatron's parser. Harmless when called twice."""
    if all(group.title != GROUP_TITLE for group in parser._action_groups):
        group = parser.add_argument_group(GROUP_TITLE)
        for name, options in FLAGS:
            group.add_argument(name, **options)
    return parser


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


def _problems(args: Namespace) -> list[str]:
    """One sentence for each setting that cannot work."""
    problems = []

    def require(condition: bool, flag: str, remedy: str) -> None:
        if not condition:
            value = getattr(args, flag.removeprefix("--").replace("-", "_"), None)
            problems.append(f"{flag} is {value}; {remedy}.")

    for flag in (
        "--rmt-positions-per-sample",
        "--rmt-initial-budget",
        "--rmt-minimum-budget",
        "--rmt-answer-tokens",
        "--rmt-head-chunk-size",
    ):
        require(getattr(args, flag[2:].replace("-", "_")) >= 1, flag, "pass 1 or more")
    require(args.rmt_group_size >= 2, "--rmt-group-size", "an advantage needs 2 or more rollouts")
    require(
        args.rmt_temperature > 0, "--rmt-temperature", "pass more than 0, also with --rmt-greedy"
    )
    require(args.rmt_top_k is None or args.rmt_top_k >= 1, "--rmt-top-k", "pass 1 or more")
    require(
        args.rmt_top_p is None or 0 < args.rmt_top_p <= 1, "--rmt-top-p", "pass a number in (0, 1]"
    )
    require(
        args.rmt_logprob_tolerance is None or args.rmt_logprob_tolerance > 0,
        "--rmt-logprob-tolerance",
        "pass more than 0 (inf never stops)",
    )
    require(
        args.rmt_rollout_kv_gib is None or args.rmt_rollout_kv_gib > 0,
        "--rmt-rollout-kv-gib",
        "pass more than 0, or leave it out for no bound",
    )
    require(0 < args.rmt_budget_decay <= 1, "--rmt-budget-decay", "pass a number in (0, 1]")
    require(
        args.rmt_minimum_budget <= args.rmt_initial_budget,
        "--rmt-minimum-budget",
        f"pass at most --rmt-initial-budget ({args.rmt_initial_budget})",
    )
    require(
        0 <= args.rmt_length_reward_weight <= 1,
        "--rmt-length-reward-weight",
        "pass a number in [0, 1]",
    )
    require(args.rmt_length_reward_maximum > 0, "--rmt-length-reward-maximum", "pass more than 0")
    require(
        0 <= args.rmt_curriculum_start <= args.rmt_curriculum_end <= 1,
        "--rmt-curriculum-start",
        f"pass 0 <= start <= --rmt-curriculum-end ({args.rmt_curriculum_end}) <= 1",
    )
    for flag in ("--rmt-start-probabilities", "--rmt-end-probabilities"):
        values = getattr(args, flag[2:].replace("-", "_"))
        require(
            min(values) >= 0 and abs(sum(values) - 1) < 1e-6,
            flag,
            "pass three numbers of 0 or more whose sum is 1",
        )
    easy, medium, hard = args.rmt_entropy_thresholds
    require(0 <= easy < medium < hard, "--rmt-entropy-thresholds", "pass three ascending numbers")
    require(
        args.rmt_entropy_top_k is None or args.rmt_entropy_top_k >= 2,
        "--rmt-entropy-top-k",
        "pass 2 or more",
    )
    require(args.rmt_ntp_coefficient >= 0, "--rmt-ntp-coefficient", "pass 0 or more")
    require(args.rmt_warmup_iters >= 0, "--rmt-warmup-iters", "pass 0 or more")
    problems += _unsupported(args)
    return problems


def _unsupported(args: Namespace) -> list[str]:
    """What of Megatron RMT cannot run with, each with the remedy."""
    refused = {
        "--attention-dropout": (args.attention_dropout, 0.0, "generation and update must agree"),
        "--hidden-dropout": (args.hidden_dropout, 0.0, "generation and update must agree"),
        "--context-parallel-size": (args.context_parallel_size, 1, "the tree is not split by it"),
        "--num-virtual-stages-per-pipeline-rank": (
            args.virtual_pipeline_model_parallel_size,
            None,
            "rollouts run one model chunk per stage",
        ),
        "--multi-latent-attention": (
            args.multi_latent_attention,
            False,
            "the key-value store holds plain keys and values",
        ),
        "--mtp-num-layers": (args.mtp_num_layers, None, "the head predicts one token"),
        "--window-size": (getattr(args, "window_size", None), None, "branches see their trunk"),
        "--softmax-type": (args.softmax_type, "vanilla", "tree attention has no attention sink"),
        "--experimental-attention-variant": (
            args.experimental_attention_variant,
            None,
            "tree attention stands in for softmax attention only",
        ),
        "--qk-clip": (args.qk_clip, False, "tree attention does not record its largest score"),
        "--log-max-attention-logit": (
            args.log_max_attention_logit,
            False,
            "tree attention does not record its largest score",
        ),
        "--cuda-graph-impl": (args.cuda_graph_impl, "none", "every tree has another shape"),
        "--overlap-moe-expert-parallel-comm": (
            args.overlap_moe_expert_parallel_comm,
            False,
            "its schedule bypasses the forward step",
        ),
    }
    problems = [
        f"{flag} is {value}; RMT needs {'it left out' if needed is None else needed}: {why}."
        for flag, (value, needed, why) in refused.items()
        if value != needed and not (needed is None and not value)
    ]
    if args.expert_model_parallel_size > 1 and args.moe_token_dispatcher_type == "allgather":
        problems.append(
            "--moe-token-dispatcher-type is allgather; with --expert-model-parallel-size "
            f"{args.expert_model_parallel_size} ranks hold different numbers of rollouts, pass "
            "alltoall."
        )
    if args.position_embedding_type not in ("rope", "learned_absolute", "none"):
        problems.append(
            f"--position-embedding-type is {args.position_embedding_type}; RMT supports rope, "
            "learned_absolute and none."
        )
    if args.train_iters is None:
        problems.append(
            "--train-iters is not set; RMT's schedules need it (not --train-samples alone)."
        )
    if getattr(args, "fp8", None) and args.fp8_recipe == "delayed":
        problems.append(
            "--fp8-recipe is delayed; rollouts would leak into its scaling history, pass "
            "blockwise or tensorwise."
        )
    return problems


def check_rmt_arguments(args: Namespace) -> None:
    """Refuse what cannot work, all problems at once.

    Raises:
        ValueError: one sentence per problem, each naming flag, value and remedy.
    """
    if not getattr(args, "rmt", False):
        given = [
            name
            for name, options in FLAGS[1:]
            if getattr(args, name[2:].replace("-", "_"), None)
            != options.get("default", False if options.get("action") else None)
        ]
        if given:
            raise ValueError(f"{', '.join(given)} given without --rmt; add --rmt or leave it out.")
        return
    if args.rmt_no_rl:
        return
    problems = _problems(args)
    if problems:
        raise ValueError("RMT cannot train with these settings: " + " ".join(problems))


def rmt_settings(args: Namespace) -> dict[str, Any]:
    """The ``--rmt-*`` values of a run, by name."""
    return {key: value for key, value in vars(args).items() if key.split("_")[0] == "rmt"}


__all__ = [
    "add_rmt_arguments",
    "check_rmt_arguments",
    "is_enabled",
    "readable_help",
    "rmt_settings",
]

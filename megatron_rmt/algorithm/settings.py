"""The settings of RMT: meaning, default, interval, unit and source of each, in this file alone.

``job.settings`` makes the ``--rmt-*`` flags of them and checks the intervals;
``docs/hyperparameters.md`` sets what the papers say beside what we chose. Sources: "paper" is RMT
(arXiv 2509.24375), "RPT" is arXiv 2506.08007, "ours" is what neither says.
"""

import dataclasses
from argparse import Namespace
from dataclasses import dataclass
from typing import Any, Literal, Self


def setting(
    default: Any,
    interval: str = "",
    unit: str = "",
    *,
    source: str = "ours",
    unset: str = "",
    because: str = "",
    **argparse: Any,
) -> Any:
    """A field of ``Settings``.

    interval: where its value, or each of its values, lies, as in mathematics: "[0, 1)". because:
    why, where it is not plain. unset: what None as the default means. argparse: more keywords of
    ``ArgumentParser.add_argument``.
    """
    metadata = {
        "interval": interval,
        "unit": unit,
        "source": source,
        "unset": unset,
        "because": because,
        "argparse_meta": argparse,
    }
    return dataclasses.field(default=default, metadata=metadata)


_TIERS: dict[str, Any] = {"metavar": ("EASY", "MEDIUM", "HARD")}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The values of one run, each named as its flag without ``--rmt-``."""

    rmt: bool = setting(False)
    """Train with RMT; without it nothing changes"""
    config: str | None = setting(None, unset="no file")
    """YAML file of these settings, such as group-size: 8; flags on the command line win"""

    positions_per_sample: int = setting(16, "[1, inf)", "positions")
    """Most positions chosen in each sample of the batch"""
    group_size: int = setting(
        8, "[2, inf)", "rollouts", source="paper", because="an advantage needs 2 or more rollouts"
    )
    """G: responses to each position"""
    temperature: float = setting(
        0.8, "(0, inf)", "units of the logits", source="paper", because="also with --rmt-greedy"
    )
    """Sampling temperature of the rollouts"""
    greedy: bool = setting(False)
    """Most likely token instead of sampling, for tests"""
    top_k: int | None = setting(None, "[1, inf)", "tokens", source="paper", unset="all")
    """Draw only from tokens at least as probable as the K th; the update still trains the whole
    distribution at --rmt-temperature"""
    top_p: float | None = setting(None, "(0, 1]", "parts of 1", source="paper", unset="all")
    """Draw only from the most probable tokens that together have probability P, after --rmt-top-k;
    the update as for --rmt-top-k"""
    logprob_tolerance: float | None = setting(
        None,
        "(0, inf]",
        "nats",
        unset="1e-3 in fp32, 0.2 in half precision",
        because="inf never stops",
    )
    """Stop before the optimizer's step if the mean |log-prob in the update - log-prob when drawn|
    of a step's tokens is larger"""
    max_bad_steps: int = setting(0, "[0, inf)", "steps")
    """Skip a step whose numbers are not finite instead of stopping, and write its samples to
    rmt_quarantine.jsonl beside the metrics; N of them in a row stop"""
    rollout_kv_gib: float | None = setting(None, "(0, inf)", "GiB", unset="no bound")
    """Bound on the keys and values that the rollouts of a rank hold at a time; positions that do
    not fit are decoded later"""

    no_decode_graph: bool = setting(False)
    """Do not record steps of decoding as CUDA graphs, which is done for dense models on a GPU, but
    not in FP8"""

    initial_budget: int = setting(800, "[1, inf)", "tokens", source="paper")
    """B_0: thought asked for at first"""
    minimum_budget: int = setting(1, "[1, inf)", "tokens", source="paper")
    """B_min: least thought asked for"""
    budget_decay: float = setting(0.2, "(0, 1]", "parts of B_0 left at the end", source="paper")
    """gamma: B_t = max(B_min, floor(B_0 * gamma^((t/T)^k)))"""
    budget_exponent: float = setting(1.0, "(0, inf)", "power of t/T", source="paper")
    """k: shape of the decay; above 1 the budget falls late, below 1 early"""
    no_budget_decay: bool = setting(False, source="ablation of the paper")
    """The budget stays B_0"""
    tier_budgets: tuple[float, float, float] | None = setting(
        None, "(0, inf)", "parts of B_t", unset="B_t in every tier", **_TIERS
    )
    """Thought asked for in each tier, at least B_min: harder positions may think longer"""
    answer_tokens: int = setting(32, "[1, inf)", "tokens")
    """Most that an answer may take"""
    force_close: bool = setting(False)
    """Write the end of thought at 2*B_t tokens and let the model answer, instead of giving up; for
    models that rarely end a thought by themselves"""

    warmup_iters: int = setting(0, "[0, inf)", "steps")
    """Format warm-up: in the first steps thoughts are closed at B_t, the true answer is supervised,
    and only the length is rewarded; for small base models"""
    warmup_thought: Literal["drawn", "text"] = setting("drawn")
    """Thoughts of the warm-up: drawn by the model, with the answer alone supervised, or text: the
    text's own next B_t tokens, supervised like the answer, so that the model learns to draft the
    text and to answer from the draft"""

    reward: str = setting("match", source="paper")
    """What a response earns beside its length: match; information-gain, how much likelier the
    thought makes the true next token, without an answer (for templates such as inline, where it
    would follow the thought at once); or your own function as module:function, see
    docs/change.md"""
    target_tokens: int = setting(1, "[1, 64]", "tokens", source="paper")
    """How many of the next tokens are to be predicted: match then earns the share of them that the
    answer begins with, information-gain the mean over them (RLPT's segments, arXiv 2509.19249)"""
    baseline_decay: float | None = setting(
        None, "[0, 1)", "parts of the average a step", unset="the policy itself"
    )
    """What --rmt-reward information-gain measures a thought against: the prediction of a moving
    average of the weights, fp32 and saved with the checkpoint, instead of the policy's own
    (RLP)"""
    length_reward_weight: float = setting(0.2, "[0, 1]", "parts of 1")
    """w: reward = (1-w) * match + w * length reward"""
    length_reward_maximum: float = setting(1.0, "(0, inf)", "rewards of a match")
    """Length reward at exactly B_t tokens"""
    no_length_reward: bool = setting(False, source="ablation of the paper")
    """Reward = match alone"""
    no_advantage_std: bool = setting(False)
    """Advantage = reward - mean of the group, not divided by the group's deviation: for dense
    rewards, whose small differences then stay small (Dr. GRPO)"""

    entropy_thresholds: tuple[float, float, float] = setting(
        (0.5, 1.0, 1.5), "[0, inf]", "nats", source="RPT", **_TIERS
    )
    """Lower ends of the tiers"""
    threshold_quantiles: tuple[float, float, float] | None = setting(
        None, "[0, 1)", "parts of the tokens", unset="thresholds in nats", **_TIERS
    )
    """Lower ends of the tiers as quantiles of the entropies of each step's global batch, to 0.01
    nats, in the place of --rmt-entropy-thresholds"""
    entropy_ceiling: float | None = setting(None, "(0, inf)", "nats", unset="none")
    """Positions of a greater entropy are never chosen: names and random digits are hard, and no
    thought tells them"""
    entropy_top_k: int | None = setting(None, "[2, inf)", "tokens", unset="the whole vocabulary")
    """Entropy over the most likely tokens only; RPT takes 16"""
    curriculum_start: float = setting(0.3, "[0, 1]", "parts of --train-iters", source="paper")
    """t1: end of the first phase"""
    curriculum_end: float = setting(0.7, "[0, 1]", "parts of --train-iters", source="paper")
    """t2: start of the last phase"""
    start_probabilities: tuple[float, float, float] = setting(
        (0.6, 0.3, 0.1), "[0, 1]", "parts of 1", **_TIERS
    )
    """Share of each tier until t1"""
    end_probabilities: tuple[float, float, float] = setting(
        (0.1, 0.3, 0.6), "[0, 1]", "parts of 1", **_TIERS
    )
    """Share of each tier from t2 on"""
    select: str = setting("tiers", source="paper")
    """How positions are chosen: tiers; gain-variance, likewise, but groups that all earn the same
    beside the length reward give way to a reserve drawn at the same time; or your own function as
    module:function, see docs/change.md"""
    reserve_positions: int | None = setting(
        None, "[0, inf)", "positions", unset="as many as --rmt-positions-per-sample"
    )
    """The reserve of --rmt-select gain-variance in each sample: rolled out with the others, trained
    only in the place of others"""
    no_curriculum: bool = setting(False, source="ablation of the paper")
    """Positions uniformly over all tiers"""
    skip_sources: tuple[str, ...] | None = setting(None, unset="none")
    """Corpora of the training blend whose samples train on next tokens alone, without prompt and
    rollouts: prefixes as the data flags name them, or their last parts"""

    loss: str = setting("hybrid", source="paper")
    """Loss on tokens: hybrid, or your own function as module:function; see docs/change.md"""
    ntp_coefficient: float = setting(0.1, "[0, inf)", "parts of L_NTP", source="paper")
    """lambda: loss = L_GRPO + lambda * L_NTP"""
    no_ntp: bool = setting(False, source="ablation of the paper")
    """L_GRPO alone"""
    no_rl: bool = setting(False, source="ablation of the paper")
    """Plain pre-training, digit for digit: no entropy pass, no rollouts"""

    template: str = setting("rpt", source="RPT")
    """Prompt: rpt (instruction first), raw (document first), inline (for small base models) or a
    JSON file"""
    no_chat: bool = setting(False)
    """Leave out the tokenizer's chat markers from rpt and raw prompts"""

    seed: int | None = setting(None, unset="--seed")
    """Seed of positions and rollouts"""
    allow_changed_settings: bool = setting(False)
    """Go on from a checkpoint of RMT that was trained with other settings, which are named once;
    else they are refused"""
    no_digests: bool = setting(False)
    """Neither write nor check digests of a checkpoint's files, which find bits that flipped on
    disk"""
    max_tokens: int | None = setting(None, "[1, inf)", "tokens", unset="as read")
    """Deal the samples of a step out again after the rollouts: evenly over the data-parallel ranks,
    several in one micro-batch up to N packed tokens, if they fit in the number of micro-batches
    that --global-batch-size gives"""
    attention: Literal["auto", "sdpa", "lse", "flex"] = setting("auto")
    """Attention of the update: lse (CPU), flex (CUDA, compiled), sdpa (anywhere, slower); auto
    takes the first of them that runs"""
    head_chunk_size: int | None = setting(
        None, "[1, inf)", "rows", unset="4096 on a GPU, 384 on a CPU"
    )
    """Logits held at a time by the fused head"""
    eval_interval: int = setting(0, "[0, inf)", "steps")
    """Measure predictions of --rmt-eval-data with a thought, with an empty one and plainly, before
    the first step and after every N th: into the metrics, TensorBoard and wandb; 0 never"""
    eval_data: str | None = setting(None, unset="none")
    """JSON lines of held-out documents for --rmt-eval-interval, each with a text"""
    eval_documents: int = setting(32, "[1, inf)", "documents")
    """The first N documents of --rmt-eval-data"""
    eval_positions_per_document: int = setting(4, "[1, inf)", "positions")
    """Most positions measured in each of them, the same ones every time"""
    eval_positions: Literal["any", "answers"] = setting("any")
    """Which: any, drawn from the whole text, or answers, from those whose next token is the first
    one in a span of the line's answer_spans, [[first, limit], ...] in characters"""
    eval_samples: int = setting(0, "[0, inf)", "samples")
    """Measure the same, at as many positions, in the first N samples of each of Megatron's own
    evaluations (--eval-interval, --eval-iters), of the validation and of the test split"""
    metrics_file: str | None = setting(None, unset="rmt_metrics.jsonl in --save")
    """JSON lines, one per step"""
    log_samples_interval: int = setting(0, "[0, inf)", "steps")
    """Write a few rollouts as text in the first step after the warm-up and every N th after that:
    into rmt_samples.jsonl beside the metrics, and as a table to wandb; 0 writes none"""

    @classmethod
    def of(cls, args: Namespace) -> Self:
        """The settings among Megatron's parsed arguments; those that are absent get defaults."""
        given = {}
        for field in dataclasses.fields(cls):
            value = getattr(args, argument_name(field.name), field.default)
            given[field.name] = tuple(value) if isinstance(value, list) else value
        return cls(**given)

    @property
    def trains_with_rl(self) -> bool:
        """Whether training steps are RMT's: ``--rmt`` without ``--rmt-no-rl``."""
        return self.rmt and not self.no_rl


def argument_name(name: str) -> str:
    """What the setting ``name`` is called among Megatron's parsed arguments."""
    return name if name == "rmt" else f"rmt_{name}"

"""The ``--rmt-*`` flags in Megatron's own parser."""

import argparse
import functools
import re
from argparse import Namespace
from typing import Any

import pytest
from megatron.training.arguments import add_megatron_arguments

from megatron_rmt.arguments import (
    FLAGS,
    GROUP_TITLE,
    add_rmt_arguments,
    check_rmt_arguments,
    is_enabled,
    readable_help,
    rmt_settings,
)

# What RMT needs of Megatron's defaults to be changed.
NEEDED = ["--attention-dropout", "0", "--hidden-dropout", "0", "--train-iters", "10"]
NEEDED += ["--position-embedding-type", "rope"]


@functools.cache
def _parser() -> argparse.ArgumentParser:
    # A patched Megatron adds the flags itself.
    add = getattr(add_megatron_arguments, "megatron_rmt_original", add_megatron_arguments)
    return readable_help(add_rmt_arguments(add(argparse.ArgumentParser(allow_abbrev=False))))


def _parse(*flags: str) -> Namespace:
    args = _parser().parse_args([*NEEDED, *flags])
    args.virtual_pipeline_model_parallel_size = None  # Megatron's validate_args sets it
    return args


def _refusal(args: Namespace) -> str:
    with pytest.raises(ValueError, match=r"^RMT cannot train with these settings: ") as error:
        check_rmt_arguments(args)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_defaults_are_the_papers_and_are_accepted():
    args = _parse("--rmt")
    check_rmt_arguments(args)
    assert is_enabled(args)
    paper = {
        "rmt_group_size": 8,
        "rmt_temperature": 0.8,
        "rmt_initial_budget": 800,
        "rmt_minimum_budget": 1,
        "rmt_budget_decay": 0.2,
        "rmt_curriculum_start": 0.3,
        "rmt_curriculum_end": 0.7,
        "rmt_ntp_coefficient": 0.1,
        "rmt_entropy_thresholds": [0.5, 1.0, 1.5],
    }
    assert paper.items() <= rmt_settings(args).items()


def _group() -> Any:
    groups = [group for group in _parser()._action_groups if group.title == GROUP_TITLE]
    assert len(groups) == 1
    return groups[0]


def test_help_shows_all_flags_in_one_group():
    names = [action.option_strings for action in _group()._group_actions]
    assert names == [[name] for name, _ in FLAGS]
    _, _, section = _parser().format_help().partition(f"{GROUP_TITLE}:")
    for name, _ in FLAGS:
        assert f"  {name}" in section


def test_adding_the_flags_twice_is_harmless():
    add_rmt_arguments(_parser())
    assert len(_group()._group_actions) == len(FLAGS)


def test_a_percent_sign_in_a_help_text_does_not_break_help():
    parser = argparse.ArgumentParser(prog="x")
    parser.add_argument("--plain", help="headroom (e.g. 1.10 = 10%).")
    parser.add_argument("--good", help="%(prog)s of 10 %%, default %(default)s", default=3)
    parser.add_argument("--hidden", help=argparse.SUPPRESS)
    text = readable_help(parser).format_help()
    assert "headroom (e.g. 1.10 = 10%)." in text
    assert "x of 10 %, default 3" in text
    assert "hidden" not in text


@pytest.mark.parametrize("flag", [name for name, options in FLAGS if not options.get("action")])
def test_help_states_the_default_that_holds(flag):
    options = dict(FLAGS)[flag]
    (stated,) = re.findall(r"default:? ([^,;)]+)", options["help"])
    default = options["default"]
    if default is None:
        known = ("all", "--seed", "rmt_metrics.jsonl in --save", "by precision", "no bound")
        known += ("as read",)
        assert stated in known
    elif isinstance(default, list):
        assert [float(number) for number in stated.split()] == default
    else:
        assert type(default)(stated) == default


def test_without_rmt_nothing_is_checked():
    args = _parser().parse_args([])
    check_rmt_arguments(args)
    assert not is_enabled(args)
    assert not is_enabled(Namespace())


@pytest.mark.parametrize(
    "flags",
    [
        ["--rmt-group-size", "4"],
        ["--rmt-no-ntp"],
        ["--rmt-entropy-thresholds", "0.1", "0.2", "0.3"],
        ["--rmt-metrics-file", "x"],
        ["--rmt-entropy-top-k", "16"],
    ],
)
def test_flags_of_rmt_without_rmt_are_refused(flags):
    with pytest.raises(ValueError, match=f"^{flags[0]} given without --rmt; add --rmt or leave"):
        check_rmt_arguments(_parse(*flags))


def test_all_stray_flags_are_named_at_once():
    with pytest.raises(ValueError, match=r"^--rmt-group-size, --rmt-no-rl given without --rmt"):
        check_rmt_arguments(_parse("--rmt-group-size", "4", "--rmt-no-rl"))


def test_the_ablation_without_rl_needs_nothing_of_rmt():
    args = _parse("--rmt", "--rmt-no-rl", "--attention-dropout", "0.1", "--rmt-group-size", "1")
    check_rmt_arguments(args)
    assert not is_enabled(args)


# flags -> what the sentence says: the flag, its value, the remedy.
BAD = {
    ("--rmt-positions-per-sample", "0"): "--rmt-positions-per-sample is 0; pass 1 or more.",
    ("--rmt-initial-budget", "0", "--rmt-minimum-budget", "-1"): "--rmt-initial-budget is 0; pass",
    ("--rmt-minimum-budget", "900"): "--rmt-minimum-budget is 900; pass at most "
    "--rmt-initial-budget (800).",
    ("--rmt-answer-tokens", "0"): "--rmt-answer-tokens is 0; pass 1 or more.",
    ("--rmt-head-chunk-size", "0"): "--rmt-head-chunk-size is 0; pass 1 or more.",
    ("--rmt-group-size", "1"): "--rmt-group-size is 1; an advantage needs 2 or more rollouts.",
    ("--rmt-temperature", "0"): "--rmt-temperature is 0.0; pass more than 0",
    ("--rmt-budget-decay", "1.5"): "--rmt-budget-decay is 1.5; pass a number in (0, 1].",
    ("--rmt-length-reward-weight", "2"): "--rmt-length-reward-weight is 2.0; pass a number in",
    ("--rmt-length-reward-maximum", "0"): "--rmt-length-reward-maximum is 0.0; pass more than 0.",
    ("--rmt-curriculum-start", "0.8"): "--rmt-curriculum-start is 0.8; pass 0 <= start <= "
    "--rmt-curriculum-end (0.7) <= 1.",
    ("--rmt-curriculum-end", "1.1"): "--rmt-curriculum-end (1.1)",
    ("--rmt-start-probabilities", "1", "1", "0"): "--rmt-start-probabilities is [1.0, 1.0, 0.0]",
    ("--rmt-end-probabilities", "2", "-1", "0"): "--rmt-end-probabilities is [2.0, -1.0, 0.0]",
    ("--rmt-entropy-thresholds", "1", "1", "2"): "--rmt-entropy-thresholds is [1.0, 1.0, 2.0]; "
    "pass three ascending numbers.",
    ("--rmt-entropy-top-k", "1"): "--rmt-entropy-top-k is 1; pass 2 or more.",
    ("--rmt-ntp-coefficient", "-1"): "--rmt-ntp-coefficient is -1.0; pass 0 or more.",
    ("--rmt-warmup-iters", "-1"): "--rmt-warmup-iters is -1; pass 0 or more.",
    ("--attention-dropout", "0.1"): "--attention-dropout is 0.1; RMT needs 0.0:",
    ("--hidden-dropout", "0.1"): "--hidden-dropout is 0.1; RMT needs 0.0:",
    ("--context-parallel-size", "2"): "--context-parallel-size is 2; RMT needs 1:",
    ("--multi-latent-attention",): "--multi-latent-attention is True; RMT needs False:",
    ("--mtp-num-layers", "1"): "--mtp-num-layers is 1; RMT needs it left out:",
    ("--window-size", "128,0"): "--window-size is (128, 0); RMT needs it left out:",
    ("--softmax-type", "learnable"): "--softmax-type is learnable; RMT needs vanilla:",
    ("--experimental-attention-variant", "dsa"): "--experimental-attention-variant is dsa; RMT",
    ("--qk-clip",): "--qk-clip is True; RMT needs False:",
    ("--log-max-attention-logit",): "--log-max-attention-logit is True; RMT needs False:",
    ("--cuda-graph-impl", "local"): "--cuda-graph-impl is local; RMT needs none:",
    ("--overlap-moe-expert-parallel-comm",): "--overlap-moe-expert-parallel-comm is True; RMT",
    ("--position-embedding-type", "mrope"): "--position-embedding-type is mrope; RMT supports",
    ("--fp8-format", "e4m3"): "--fp8-recipe is delayed; ",
}


@pytest.mark.parametrize("flags", BAD, ids=" ".join)
def test_what_cannot_work_is_refused_with_flag_value_and_remedy(flags):
    assert BAD[flags] in _refusal(_parse("--rmt", *flags))


def test_virtual_pipeline_stages_are_refused():
    args = _parse("--rmt")
    args.virtual_pipeline_model_parallel_size = 2
    assert "--num-virtual-stages-per-pipeline-rank is 2; RMT needs it left out" in _refusal(args)


def test_the_schedules_need_a_number_of_steps():
    args = _parse("--rmt")
    args.train_iters = None
    assert "--train-iters is not set" in _refusal(args)


def test_all_problems_are_reported_at_once():
    flags = [
        flag
        for flags in BAD
        for flag in flags
        if flags[0] not in ("--rmt-minimum-budget", "--rmt-curriculum-end")
    ]
    refusal = _refusal(_parse("--rmt", *flags))
    for flag in dict.fromkeys(flag for flag in flags if flag.startswith("--")):
        if flag != "--fp8-format":
            assert f"{flag} is " in refusal, flag


def test_every_flag_that_a_refusal_names_exists():
    known = {name for action in _parser()._actions for name in action.option_strings}
    flags = [flag for flags in BAD for flag in flags]
    args = _parse("--rmt", *flags)
    args.train_iters, args.virtual_pipeline_model_parallel_size = None, 2
    assert set(re.findall(r"--[a-z0-9-]+", _refusal(args))) <= known


@pytest.mark.parametrize("flags", [["--fp8-format", "e4m3", "--fp8-recipe", "blockwise"]])
def test_what_works_is_accepted(flags):
    check_rmt_arguments(_parse("--rmt", *flags))


@pytest.mark.parametrize(
    ("flag", "value", "remedy"),
    [
        ("--rmt-top-k", "0", "--rmt-top-k is 0; pass 1 or more."),
        ("--rmt-top-p", "1.5", "--rmt-top-p is 1.5; pass a number in (0, 1]."),
        ("--rmt-logprob-tolerance", "0", "--rmt-logprob-tolerance is 0.0; pass more than 0"),
        ("--rmt-rollout-kv-gib", "-1", "--rmt-rollout-kv-gib is -1.0; pass more than 0"),
    ],
)
def test_bad_settings_of_rollouts_are_refused(flag, value, remedy):
    assert remedy in _refusal(_parse("--rmt", flag, value))


def test_experts_on_several_ranks_need_a_dispatcher_of_unequal_numbers_of_tokens():
    flags = ["--rmt", "--expert-model-parallel-size", "2", "--moe-token-dispatcher-type"]
    assert "--moe-token-dispatcher-type is allgather;" in _refusal(_parse(*flags, "allgather"))
    check_rmt_arguments(_parse(*flags, "alltoall"))

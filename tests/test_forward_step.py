"""The tree step against the paper's loss on one plain sequence at a time.

The tree step is the real one: ``build_trunk``, ``grow_tree``, a ``GPTModel`` with attached tree
attention, ``make_forward_step``, Megatron's own schedule. The reference knows no tree: it runs the
stock model on each prefix + stem + response, and writes the loss out by hand.
"""

import dataclasses
from typing import Any

import pytest
import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_rmt.algorithm.losses import (
    Predictions,
    TokenLoss,
    TokenLosses,
    response_weights,
    token_losses,
)
from megatron_rmt.model.blocks import Block
from megatron_rmt.model.pipeline import output_weight
from megatron_rmt.model.visibility import attach_tree_attention
from megatron_rmt.rollout.trunk import NO_LABEL
from megatron_rmt.update.forward_step import (
    LossSettings,
    Update,
    _rows_of,
    make_forward_step,
)
from megatron_rmt.update.tree import Tree, pad_tree
from tests.packed import Responses, Trunk, build_trunk, grow_tree
from tests.tiny_model import (
    LATENT,
    LATENT_YARN,
    LONGEST_POSITION,
    VOCAB,
    build_model,
    mix_row_by_row,
    stock_logits,
)

pytestmark = pytest.mark.usefixtures("single_process_megatron")

END_OF_DOCUMENT = 0
LENGTH = 11
GROUP = 3
TEMPERATURE = 0.8
NTP_COEFFICIENT = 0.1
STEM = [7, 8, 9]


@dataclasses.dataclass
class MicroBatch:
    """What one micro-batch holds before it becomes a tree. ``rows``: the chosen trunk rows."""

    trunk: Trunk
    rows: list[int]
    responses: Responses
    advantages: Tensor
    tree: Tree


def _documents(generator: torch.Generator, separate: bool) -> tuple[Tensor, ...]:
    """Two samples as Megatron's GPTDataset gives them, with documents that end inside a sample."""
    text = torch.randint(1, VOCAB, (2, LENGTH + 1), generator=generator)
    text[0, 4] = text[0, 9] = text[1, LENGTH - 1] = END_OF_DOCUMENT
    tokens, labels = text[:, :-1], text[:, 1:]
    positions = torch.arange(LENGTH).repeat(2, 1)
    if separate:
        for sample in range(2):
            for end in (tokens[sample] == END_OF_DOCUMENT).nonzero()[:, 0].tolist():
                positions[sample, end + 1 :] = torch.arange(LENGTH - end - 1)
    loss_mask = (tokens != END_OF_DOCUMENT).float()
    loss_mask[1, 2] = 0.5
    return tokens, positions, labels, loss_mask


def _responses(generator: torch.Generator, lengths: list[list[int]]) -> Responses:
    shape = (len(lengths), GROUP, max(map(max, lengths)))
    drawn = torch.rand(shape, generator=generator) < 0.7
    drawn[0, 2] = False
    return Responses(
        tokens=torch.randint(VOCAB, shape, generator=generator),
        lengths=torch.tensor(lengths),
        drawn=drawn,
        log_probs=torch.zeros(shape),
    )


def _micro_batch(
    seed: int, separate: bool, head: list[int], stem: list[int], attention: str = "auto"
) -> MicroBatch:
    """Chosen: the first and the last row of documents, one in the middle, in both samples."""
    generator = torch.Generator().manual_seed(seed)
    trunk = build_trunk(
        *_documents(generator, separate),
        preamble=head,
        end_of_document=END_OF_DOCUMENT,
        separate_documents=separate,
    )
    first, limit = trunk.documents[0]
    last_limit = trunk.documents[-1][1]
    rows = [first + len(head), limit - 1, limit + len(head) + 1, last_limit - 1]
    lengths = [[0, 1, 5], [4, 2, 6], [1, 1, 0], [3, 7, 1]]
    responses = _responses(generator, lengths)
    advantages = torch.randn(len(rows), GROUP, generator=generator, dtype=torch.float64)
    tree = grow_tree(
        trunk,
        rows,
        stem,
        responses,
        longest_position=LONGEST_POSITION,
        device=torch.device("cpu"),
        attention=attention,
    )
    return MicroBatch(trunk, rows, responses, advantages, tree)


def _ntp_tokens(batches: list[MicroBatch] | list[Update]) -> float:
    return sum(float(batch.tree.ntp_mask.sum()) for batch in batches)


def _loss_settings(updates: list[Update]) -> LossSettings:
    return LossSettings(
        ntp_coefficient=NTP_COEFFICIENT,
        temperature=TEMPERATURE,
        vocab_size=VOCAB,
        chunk_size=7,
        ntp_tokens=_ntp_tokens(updates),
        scale=float(len(updates)),
    )


def _updates(batches: list[MicroBatch], dtype: torch.dtype, warm_up: bool) -> list[Update]:
    positions = sum(len(batch.rows) for batch in batches)
    updates = []
    for batch in batches:
        tree, values = batch.tree, batch.advantages.flatten().to(dtype)
        ones = torch.ones_like(values)
        share = {"positions": positions * GROUP}
        predictions = Predictions.of(
            tree.ntp_mask.to(dtype) / _ntp_tokens(batches),
            response_weights(values, tree.rollouts, tree.drawn, **share),
            response_weights(ones, tree.rollouts, ~tree.drawn, **share) * warm_up,
            tree.drawn_log_probs,
        )
        metrics = {"rmt reward": (2.5, 4.0), "rmt match": (3, 4)}
        updates.append(Update(tree, predictions, metrics))
    return updates


def _tree_step(
    model: GPTModel,
    batches: list[MicroBatch],
    dtype: torch.dtype,
    warm_up: bool = False,
    loss: TokenLoss = token_losses,
) -> tuple[Tensor, dict[str, Tensor], list[dict[str, Tensor]], list[Update]]:
    """Loss, gradients and reports of one step of Megatron's schedule over ``batches``."""
    updates = _updates(batches, dtype, warm_up)
    forward_step = make_forward_step(dataclasses.replace(_loss_settings(updates), loss=loss))
    losses = []

    def recording_forward_step(iterator: Any, model: GPTModel) -> tuple[Tensor, Any]:
        output, loss_function = forward_step(iterator, model)

        def recording_loss(output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            loss, tokens, report = loss_function(output)
            losses.append(loss.detach().clone())
            return loss, tokens, report

        return output, recording_loss

    model.zero_grad()
    reports = get_forward_backward_func()(
        forward_step_func=recording_forward_step,
        data_iterator=iter(updates),
        model=[model],
        num_microbatches=len(updates),
        seq_length=LENGTH,
        micro_batch_size=1,
        forward_only=False,
    )
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    return torch.stack(losses).mean(), gradients, reports, updates


def _log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]


def _naive_losses(model: GPTModel, batches: list[MicroBatch], stem: list[int]) -> dict[str, Tensor]:
    """The parts of the loss, each response in a sequence of its own."""
    stem_tokens = torch.tensor(stem, dtype=torch.int64)
    ntp, policy, supervised, unmasked, positions = [], [], [], 0.0, 0
    for batch in batches:
        trunk = batch.trunk
        for first, limit in trunk.documents:
            log_p = stock_logits(
                model, trunk.tokens[first:limit], trunk.position_ids[first:limit]
            ).log_softmax(-1)
            for row in range(first, limit):
                if trunk.labels[row] != NO_LABEL and row not in batch.rows:
                    weight = float(trunk.loss_mask[row])
                    ntp.append(-weight * log_p[row - first, trunk.labels[row]])
                    unmasked += weight
        for index, row in enumerate(batch.rows):
            positions += 1
            first = int(trunk.document_first[row])
            prefix = torch.cat([trunk.tokens[first : row + 1], stem_tokens])
            for rollout in range(GROUP):
                length = int(batch.responses.lengths[index, rollout])
                if length == 0:
                    continue
                response = batch.responses.tokens[index, rollout, :length]
                start = int(trunk.position_ids[first])
                sequence = torch.cat([prefix, response[:-1]])
                logits = stock_logits(model, sequence, start + torch.arange(len(sequence)))
                log_p = _log_probs(logits[len(prefix) - 1 :] / TEMPERATURE, response)
                drawn = batch.responses.drawn[index, rollout, :length]
                advantage = batch.advantages[index, rollout].to(log_p.dtype)
                if drawn.any():
                    ratio = torch.exp(log_p[drawn] - log_p[drawn].detach())
                    policy.append(-(ratio * advantage).mean() / GROUP)
                if not drawn.all():
                    supervised.append(-log_p[~drawn].mean() / GROUP)
    return {
        "ntp": torch.stack(ntp).sum() / unmasked,
        "policy": torch.stack(policy).sum() / positions,
        "supervised": torch.stack(supervised).sum() / positions,
    }


def _naive_step(
    model: GPTModel, batches: list[MicroBatch], stem: list[int], warm_up: bool = False
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    model.zero_grad()
    parts = _naive_losses(model, batches, stem)
    loss = parts["policy"] + NTP_COEFFICIENT * parts["ntp"] + warm_up * parts["supervised"]
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    return loss.detach(), gradients, parts


def _models(dtype: torch.dtype, **options: Any) -> tuple[GPTModel, GPTModel]:
    """The stock model, and one with tree attention and the same weights."""
    recompute = {key: options.pop(key) for key in list(options) if key.startswith("recompute")}
    stock = build_model(dtype, **options)
    with_trees = build_model(dtype, **options, **recompute)
    with_trees.load_state_dict(stock.state_dict())
    pattern = options.get("pattern") or "*" * stock.config.num_layers
    assert attach_tree_attention(with_trees) == len(pattern.replace("-", ""))
    if "pattern" in options:
        mix_row_by_row(stock)
    return stock.train(), with_trees.train()


def _errors(
    result: tuple[Tensor, dict[str, Tensor]], reference: tuple[Tensor, dict[str, Tensor]]
) -> tuple[float, float]:
    """Relative error of the loss, and the largest over the parameters of the gradient's."""
    loss = float((result[0] - reference[0]).abs() / reference[0].abs())
    assert result[1].keys() == reference[1].keys()
    assert all(gradient.norm() > 0 for gradient in reference[1].values())
    gradient = max(
        float((result[1][name] - expected).norm() / expected.norm())
        for name, expected in reference[1].items()
    )
    return loss, gradient


def _whole_error(gradients: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    """Relative error of all gradients as one vector."""
    pairs = [(gradients[name].double(), value.double()) for name, value in reference.items()]
    difference = sum(float((ours - theirs).square().sum()) for ours, theirs in pairs)
    return (difference / sum(float(theirs.square().sum()) for _, theirs in pairs)) ** 0.5


# Of the worst parameter. In fp32 the naive computation's own error there, against float64, is 1e-6.
TOLERANCE = {torch.float32: 1.5e-6, torch.float64: 1e-12}
WHOLE_TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
FULL_RECOMPUTE = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "full recompute": FULL_RECOMPUTE,
    "core attention recompute": {
        "recompute_granularity": "selective",
        "recompute_modules": ["core_attn"],
    },
    "gpt2": {
        "position_embedding": "learned_absolute",
        "normalization": "LayerNorm",
        "gated_linear_unit": False,
        "activation_func": torch.nn.functional.gelu,
        "add_bias_linear": True,
        "num_query_groups": None,
    },
    "query and key norms, one key head": {"qk_layernorm": True, "num_query_groups": 1},
    "tied embeddings": {"tied": True},
    # Scores, embeddings and attention are scaled.
    "MuP": {
        "use_mup": True,
        "mup_base_hidden_size": 24,
        "mup_embedding_mult": 3.0,
        "mup_base_head_dim": 4.0,
    },
    "windows": {"window_size": (3, 0), "window_attn_skip_freq": [1, 0]},
    "off by one": {"softmax_type": "off-by-one"},
    "YaRN": {"position_embedding": "yarn"},
    "hybrid": {"pattern": "M*M-", "position_embedding": "none"},
    "hybrid, rotating, recompute": {"pattern": "*-MM", "tied": True, **FULL_RECOMPUTE},
    "a part rotates, neighbours together": {"rotary_percent": 0.5, "rotary_interleaved": True},
    "windows and sinks": {
        "window_size": (3, 0),
        "window_attn_skip_freq": [1, 0],
        "softmax_type": "learnable",
    },
    "sinks, core attention recompute": {
        "softmax_type": "learnable",
        "recompute_granularity": "selective",
        "recompute_modules": ["core_attn"],
    },
    "latents": {"multi_latent_attention": True},
    "latents, YaRN, full recompute": LATENT | LATENT_YARN | FULL_RECOMPUTE,
    "latents, plain queries, wide values, up projections recomputed": {
        "multi_latent_attention": True,
        "q_lora_rank": None,
        "qk_layernorm": False,
        "v_head_dim": 12,
        "recompute_granularity": "selective",
        "recompute_modules": ["mla_up_proj"],
    },
    "experts": {
        "num_moe_experts": 4,
        "moe_router_topk": 2,
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "alltoall",
    },
    "balanced experts": {
        "num_moe_experts": 4,
        "moe_router_topk": 2,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": 0.1,
        "moe_z_loss_coeff": 0.01,
        "moe_token_dispatcher_type": "alltoall",
    },
}


@pytest.mark.parametrize("attention", ["lse", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("head", [[], [11, 12, 13]], ids=["no head", "head"])
@pytest.mark.parametrize("separate", [False, True], ids=["one document", "separate documents"])
@pytest.mark.parametrize("recompute", [{}, FULL_RECOMPUTE], ids=["", "recompute"])
def test_loss_and_gradients_equal_one_sequence_at_a_time(
    attention, dtype, head, separate, recompute
):
    stock, with_trees = _models(dtype, **recompute)
    batches = [_micro_batch(seed, separate, head, STEM, attention) for seed in (1, 2)]
    assert batches[0].tree.tokens.shape == batches[1].tree.tokens.shape
    result = _tree_step(with_trees, batches, dtype)
    reference = _naive_step(stock, batches, STEM)
    errors = _errors(result[:2], reference[:2])
    assert max(errors) < TOLERANCE[dtype], errors
    assert _whole_error(result[1], reference[1]) < WHOLE_TOLERANCE[dtype]


@pytest.mark.parametrize("attention", ["lse", "sdpa"])
@pytest.mark.parametrize("separate", [False, True], ids=["one document", "separate documents"])
def test_bf16_is_as_close_to_float64_as_one_sequence_at_a_time(attention, separate):
    exact, _ = _models(torch.float64)
    stock, with_trees = _models(torch.bfloat16)
    for model in (stock, with_trees):
        model.load_state_dict(exact.state_dict())
    exact.load_state_dict(stock.state_dict())
    batches = [_micro_batch(seed, separate, [11], STEM, attention) for seed in (1, 2)]
    reference = _naive_step(exact, batches, STEM)[1]
    ours = _tree_step(with_trees, batches, torch.bfloat16)[1]
    naive = _naive_step(stock, batches, STEM)[1]
    assert _whole_error(ours, reference) <= _whole_error(naive, reference) < 0.05


def test_the_forward_of_flex_gives_the_log_probs_of_one_sequence_at_a_time():
    _, with_trees = _models(torch.float64)
    found = []
    for attention in ("flex", "sdpa"):
        batches = [_micro_batch(seed, True, [11, 12], STEM, attention) for seed in (1, 2)]
        updates = _updates(batches, torch.float64, warm_up=False)
        found.append(_forward(with_trees, updates))
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-13)


def _forward(model: GPTModel, updates: list[Update]) -> Tensor:
    """What the output processor gives for each update, in one tensor."""
    forward_step = make_forward_step(_loss_settings(updates))
    iterator = iter(updates)
    with torch.no_grad():
        return torch.cat([forward_step(iterator, model)[0] for _ in updates])


@pytest.mark.parametrize(
    "architecture", [name for name in ARCHITECTURES if name not in ("llama", "balanced experts")]
)
def test_loss_and_gradients_of_other_architectures(architecture):
    stock, with_trees = _models(torch.float64, **ARCHITECTURES[architecture])
    batches = [_micro_batch(seed, True, [11, 12], STEM) for seed in (1, 2)]
    result = _tree_step(with_trees, batches, torch.float64)
    errors = _errors(result[:2], _naive_step(stock, batches, STEM)[:2])
    # Megatron's router takes its softmax in fp32, whatever the model's dtype.
    assert max(errors) < (1e-6 if architecture == "experts" else 1e-12), errors


def test_stems_of_one_token_and_documents_that_do_not_start_at_position_zero():
    """Also with absolute positions, so that wrong ones would be noticed."""
    stock, with_trees = _models(torch.float64, **ARCHITECTURES["gpt2"])
    generator = torch.Generator().manual_seed(3)
    tokens, _, labels, loss_mask = _documents(generator, separate=True)
    trunk = build_trunk(
        tokens,
        torch.arange(LENGTH).repeat(2, 1),
        labels,
        loss_mask,
        preamble=[],
        end_of_document=END_OF_DOCUMENT,
        separate_documents=True,
    )
    assert trunk.position_ids[trunk.documents[1][0]] > 0
    rows = [0, 6, LENGTH + 3]
    responses = _responses(generator, [[1, 1, 0], [2, 3, 4], [1, 2, 5]])
    advantages = torch.randn(3, GROUP, generator=generator, dtype=torch.float64)
    tree = grow_tree(
        trunk, rows, [7], responses, longest_position=LONGEST_POSITION, device=torch.device("cpu")
    )
    batches = [MicroBatch(trunk, rows, responses, advantages, tree)]
    result = _tree_step(with_trees, batches, torch.float64)
    errors = _errors(result[:2], _naive_step(stock, batches, [7])[:2])
    assert max(errors) < 1e-12, errors


def test_the_warm_up_supervises_the_tokens_that_were_not_drawn():
    stock, with_trees = _models(torch.float64)
    batches = [_micro_batch(seed, True, [], STEM) for seed in (1, 2)]
    result = _tree_step(with_trees, batches, torch.float64, warm_up=True)
    errors = _errors(result[:2], _naive_step(stock, batches, STEM, warm_up=True)[:2])
    assert max(errors) < 1e-12, errors


def test_a_micro_batch_without_positions_trains_on_the_next_tokens_alone():
    stock, with_trees = _models(torch.float64)
    batches = [_micro_batch(seed, True, [], STEM) for seed in (1, 2)]
    empty = batches[0]
    tree = grow_tree(
        empty.trunk, [], STEM, None, longest_position=LONGEST_POSITION, device=torch.device("cpu")
    )
    batches[0] = dataclasses.replace(empty, rows=[], advantages=torch.zeros(0, GROUP), tree=tree)
    result = _tree_step(with_trees, batches, torch.float64)
    errors = _errors(result[:2], _naive_step(stock, batches, STEM)[:2])
    assert max(errors) < 1e-12, errors


@pytest.mark.parametrize("architecture", ["llama", "experts", "balanced experts"])
def test_padding_changes_neither_loss_nor_gradients(architecture):
    _, with_trees = _models(torch.float64, **ARCHITECTURES[architecture])
    batches = [_micro_batch(seed, True, [11], STEM) for seed in (1, 2)]
    reference = _tree_step(with_trees, batches, torch.float64)
    rows = batches[0].tree.tokens.shape[0]
    padded = [
        dataclasses.replace(_micro_batch(seed, True, [11], STEM), tree=pad_tree(batch.tree, size))
        for seed, batch, size in zip((1, 2), batches, (rows + 5, rows + 64), strict=True)
    ]
    result = _tree_step(with_trees, padded, torch.float64)
    assert max(_errors(result[:2], reference[:2])) < (1e-14 if architecture == "llama" else 1e-6)


def test_the_load_balancing_loss_moves_the_routers_and_nothing_that_is_reported():
    """It sees the trunk once, so that it has no counterpart in one sequence at a time."""
    _, plain = _models(torch.float64, **ARCHITECTURES["experts"])
    _, balanced = _models(torch.float64, **ARCHITECTURES["balanced experts"])
    balanced.load_state_dict(plain.state_dict())
    results = [
        _tree_step(model, [_micro_batch(seed, True, [], STEM) for seed in (1, 2)], torch.float64)
        for model in (plain, balanced)
    ]
    (loss, gradients, *_), (balanced_loss, balanced_gradients, *_) = results
    torch.testing.assert_close(loss, balanced_loss)
    routers = [name for name in gradients if "router" in name]
    assert len(routers) == 2
    for name in routers:
        change = balanced_gradients[name] - gradients[name]
        assert change.norm() > 1e-3 * gradients[name].norm(), name


def test_the_loss_does_not_depend_on_the_split_into_micro_batches():
    """Two samples in one micro-batch, or each in its own: one loss, one gradient."""
    _, with_trees = _models(torch.float64)
    generator = torch.Generator().manual_seed(4)
    samples = _documents(generator, separate=True)
    responses = _responses(generator, [[3, 1, 5], [4, 2, 6]])
    advantages = torch.randn(2, GROUP, generator=generator, dtype=torch.float64)

    def batch_of(first: int, limit: int) -> MicroBatch:
        trunk = build_trunk(
            *(field[first:limit] for field in samples),
            preamble=[11],
            end_of_document=END_OF_DOCUMENT,
            separate_documents=True,
        )
        rows = (trunk.columns == 6).nonzero()[:, 0].tolist()
        own = responses.positions(first, limit)
        tree = grow_tree(
            trunk, rows, STEM, own, longest_position=LONGEST_POSITION, device=torch.device("cpu")
        )
        return MicroBatch(trunk, rows, own, advantages[first:limit], tree)

    together = _tree_step(with_trees, [batch_of(0, 2)], torch.float64)
    apart = _tree_step(with_trees, [batch_of(0, 1), batch_of(1, 2)], torch.float64)
    assert max(_errors(together[:2], apart[:2])) < 1e-12


@pytest.mark.parametrize("per_token_loss", [False, True])
def test_per_token_loss_of_megatron_gives_the_same_gradients(per_token_loss):
    """Megatron then divides by the summed "tokens" instead: here one for each micro-batch."""
    stock, with_trees = _models(torch.float64)
    with_trees.config.calculate_per_token_loss = per_token_loss
    divided_by = []
    with_trees.config.finalize_model_grads_func = lambda models, tokens, **_: divided_by.append(
        None if tokens is None else int(tokens)
    )
    batches = [_micro_batch(seed, True, [], STEM) for seed in (1, 2)]
    loss, gradients, *_ = _tree_step(with_trees, batches, torch.float64)
    assert divided_by == [2 if per_token_loss else None]
    if per_token_loss:
        gradients = {name: gradient / divided_by[0] for name, gradient in gradients.items()}
    errors = _errors((loss, gradients), _naive_step(stock, batches, STEM)[:2])
    assert max(errors) < 1e-12, errors


def test_what_is_reported():
    stock, with_trees = _models(torch.float64)
    batches = [_micro_batch(seed, True, [], STEM) for seed in (1, 2)]
    for batch in batches:
        batch.tree.drawn_log_probs.fill_(-1.25)
    _, _, reports, updates = _tree_step(with_trees, batches, torch.float64)
    with torch.no_grad():
        parts = _naive_losses(stock, batches, STEM)
    assert reports[0].keys() == reports[1].keys()
    assert all(value.shape == (2,) for report in reports for value in report.values())
    total = {name: reports[0][name] + reports[1][name] for name in reports[0]}
    for name, expected in (("lm loss", parts["ntp"]), ("rmt rl loss", parts["policy"])):
        torch.testing.assert_close(total[name][0] / total[name][1], expected.float())
    assert total["rmt reward"].tolist() == [5.0, 8.0]
    assert total["rmt match"].tolist() == [6.0, 8.0]
    assert all(value.dtype == torch.float32 for value in total.values())
    for report in reports:
        # What the host knows comes to the device in one copy.
        reward, match = (report[name].untyped_storage() for name in ("rmt reward", "rmt match"))
        assert reward.data_ptr() == match.data_ptr()
    differences = []
    for batch in batches:
        own = []
        for index, row in enumerate(batch.rows):
            first = int(batch.trunk.document_first[row])
            prefix = torch.cat([batch.trunk.tokens[first : row + 1], torch.tensor(STEM)])
            for rollout in range(GROUP):
                length = int(batch.responses.lengths[index, rollout])
                response = batch.responses.tokens[index, rollout, :length]
                with torch.no_grad():
                    logits = stock_logits(stock, torch.cat([prefix, response]))
                scores = logits[len(prefix) - 1 : -1] / TEMPERATURE
                drawn = batch.responses.drawn[index, rollout, :length]
                own.append((_log_probs(scores, response) + 1.25).abs()[drawn])
        differences.append(torch.cat(own))
    for update, own in zip(updates, differences, strict=True):
        assert float(update.largest_difference) == pytest.approx(float(own.max()), rel=1e-9)
    everything = torch.cat(differences)
    expected = torch.tensor([float(everything.sum()), float(len(everything))])
    torch.testing.assert_close(total["rmt logprob difference"], expected)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_with_fused_accumulation_the_head_adds_to_main_grad_unless_it_is_tied(tied: bool):
    stock, with_trees = _models(torch.float64, tied=tied)
    batches = [_micro_batch(seed, True, [], STEM) for seed in (1, 2)]
    # As Megatron's own layers read it when they are built, only the head follows it here.
    with_trees.config.gradient_accumulation_fusion = True
    weight = output_weight(with_trees)
    weight.main_grad = torch.zeros(weight.shape, dtype=torch.float64)
    _, gradients, _, _ = _tree_step(with_trees, batches, torch.float64)
    _, expected, _ = _naive_step(stock, batches, STEM)
    name = "embedding.word_embeddings.weight" if tied else "output_layer.weight"
    assert getattr(weight, "grad_added_to_main_grad", False) is not tied
    found = gradients[name] if tied else weight.main_grad
    torch.testing.assert_close(found, expected[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("sorts", [False, True], ids=["index_select", "index"])
def test_rows_that_are_read_several_times_get_the_sum(sorts: bool):
    hidden = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    rows, by_output = torch.tensor([4, 1, 1, 0, 1]), torch.randn(5, 3, dtype=torch.float64)
    output = _rows_of(hidden, rows, sorts)
    assert torch.equal(output, hidden[rows])
    # Indexing sorts what it adds, where index_select adds in any order.
    assert ("IndexSelect" in type(output.grad_fn).__name__) is not sorts
    (found,) = torch.autograd.grad(output, hidden, by_output)
    expected = torch.zeros_like(found)
    for row, gradient in zip(rows.tolist(), by_output, strict=True):
        expected[row] += gradient
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def _clipped(log_probs: Tensor, predictions: Predictions) -> TokenLosses:
    ratio = torch.exp(log_probs - predictions.drawn_log_probs)
    weighted, clipped = predictions.policy * ratio, predictions.policy * ratio.clamp(0.8, 1.28)
    return token_losses(log_probs, predictions)._replace(policy=-torch.minimum(weighted, clipped))


def test_another_loss_is_trained_and_logged():
    """A clipped policy gradient, of rollouts that another policy drew, against its derivative."""
    _, with_trees = _models(torch.float64)
    batches = [_micro_batch(seed, True, [], STEM) for seed in (1, 2)]
    now = _forward(with_trees, _updates(batches, torch.float64, warm_up=True))
    for batch in batches:
        tree, responses = batch.tree, len(batch.tree.drawn)
        own, now = now[1:].tensor_split([len(batch.tree.targets)])
        log_ratios = torch.linspace(-0.6, 0.6, responses, dtype=torch.float64)
        drawn_log_probs = own[len(own) - responses :] - log_ratios
        batch.tree = dataclasses.replace(tree, drawn_log_probs=drawn_log_probs)
    shares = []

    def by_hand(log_probs: Tensor, predictions: Predictions) -> TokenLosses:
        ratio = torch.exp(log_probs - predictions.drawn_log_probs).detach()
        is_clipped = torch.where(predictions.policy > 0, ratio > 1.28, ratio < 0.8)
        shares.append(is_clipped[predictions.policy != 0].double())
        coefficient = predictions.policy * ratio * ~is_clipped
        return token_losses(log_probs, predictions)._replace(policy=-coefficient * log_probs)

    _, expected, reports, _ = _tree_step(with_trees, batches, torch.float64, True, by_hand)
    assert 0.1 < float(torch.cat(shares).mean()) < 0.9
    _, gradients, clipped_reports, updates = _tree_step(
        with_trees, batches, torch.float64, True, _clipped
    )
    assert _whole_error(gradients, expected) < 1e-12
    on_policy = _tree_step(with_trees, batches, torch.float64, True)[1]
    assert _whole_error(on_policy, expected) > 0.1
    for update, report, other in zip(updates, clipped_reports, reports, strict=True):
        ratio = torch.linspace(-0.6, 0.6, len(update.tree.drawn), dtype=torch.float64).exp()
        policy = update.predictions.policy[update.tree.trunk_predictions :]
        clipped = torch.minimum(policy * ratio, policy * ratio.clamp(0.8, 1.28))
        torch.testing.assert_close(report["rmt rl loss"][0], -clipped.sum().float())
        for name in ("lm loss", "rmt warm-up loss"):
            assert torch.equal(report[name], other[name])
            assert report[name][0] != 0


def _with_positions_in_packed_order(batch: MicroBatch) -> None:
    batch.tree.visibility.position_ids = torch.arange(len(batch.tree.tokens))


def _with_branches_one_position_late(batch: MicroBatch) -> None:
    batch.tree.visibility.position_ids[len(batch.trunk) + len(STEM) :] += 1


def _change_block(batch: MicroBatch, position: int, **changes: Any) -> None:
    blocks = [*batch.tree.visibility.blocks]
    index = len(batch.trunk.documents) + position
    blocks[index] = dataclasses.replace(blocks[index], **changes)
    batch.tree.visibility.blocks = tuple(blocks)


def _with_a_sibling_in_sight(batch: MicroBatch) -> None:
    """In one position's block the last branch sees the branch before it."""
    lengths = [max(0, n - 1) for n in batch.responses.lengths[1].tolist()]
    assert min(lengths[-2:]) > 0
    _change_block(batch, 1, branches=(*lengths[:-2], sum(lengths[-2:])))


def _with_a_trunk_limit(change: int) -> Any:
    def perturb(batch: MicroBatch) -> None:
        _change_block(batch, 2, trunk_limit=batch.rows[2] + 1 + change)

    return perturb


def _with_documents_joined(batch: MicroBatch) -> None:
    first, second, *others = batch.tree.visibility.blocks
    batch.tree.visibility.blocks = (Block(first.first, second.limit), *others)


def _with_a_prediction_from_a_wrong_row(batch: MicroBatch) -> None:
    batch.tree.predicting[0] += 1


def _with_forced_tokens_taken_for_drawn(batch: MicroBatch) -> None:
    batch.tree.drawn.fill_(True)


PERTURBATIONS = {
    "positions in packed order": _with_positions_in_packed_order,
    "branches one position late": _with_branches_one_position_late,
    "a branch sees its sibling": _with_a_sibling_in_sight,
    "trunk limit one too large": _with_a_trunk_limit(1),
    "trunk limit one too small": _with_a_trunk_limit(-1),
    "documents see each other": _with_documents_joined,
    "prediction from a wrong row": _with_a_prediction_from_a_wrong_row,
    "forced tokens taken for drawn": _with_forced_tokens_taken_for_drawn,
}


@pytest.mark.parametrize("perturbation", PERTURBATIONS)
def test_the_comparison_notices(perturbation):
    """Negative controls: each small mistake in the visibility is far outside the tolerance."""
    stock, with_trees = _models(torch.float64)
    batches = [_micro_batch(seed, True, [11, 12], STEM) for seed in (1, 2)]
    reference = _naive_step(stock, batches, STEM)[:2]
    assert max(_errors(_tree_step(with_trees, batches, torch.float64)[:2], reference)) < 1e-12
    PERTURBATIONS[perturbation](batches[1])
    errors = _errors(_tree_step(with_trees, batches, torch.float64)[:2], reference)
    assert max(errors) > 1e-4, errors

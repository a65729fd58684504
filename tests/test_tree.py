"""The layout of trees: ancestors, positions and predictions against brute force."""

import dataclasses

import pytest
import torch
from torch import Tensor

from megatron_rmt.model.blocks import ancestry
from megatron_rmt.update.tree import Tree, pad_tree
from megatron_rmt.update.tree import grow_tree as grow_samples
from tests.packed import Responses, Trunk, build_trunk, grow_tree, reasoned

END_OF_DOCUMENT = 0
CPU = torch.device("cpu")


def _sample_text(seed: int = 0, samples: int = 2, length: int = 12) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(1, 50, (samples, length + 1), generator=generator)
    text[0, 3] = text[0, 7] = text[-1, length - 1] = END_OF_DOCUMENT
    positions = torch.arange(length).repeat(samples, 1)
    loss_mask = (text[:, :-1] != END_OF_DOCUMENT).float()
    return text[:, :-1], positions, text[:, 1:], loss_mask


def _trunk(head: list[int] = (), separate: bool = True, seed: int = 0) -> Trunk:
    return build_trunk(
        *_sample_text(seed),
        preamble=list(head),
        end_of_document=END_OF_DOCUMENT,
        separate_documents=separate,
    )


def _responses(lengths: list[list[int]], seed: int = 1) -> Responses:
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), len(lengths[0]), max(map(max, lengths)))
    return Responses(
        tokens=torch.randint(1, 50, shape, generator=generator),
        lengths=torch.tensor(lengths),
        drawn=torch.rand(shape, generator=generator) < 0.5,
        log_probs=torch.randn(shape, generator=generator),
    )


def _grow(trunk: Trunk, rows: list[int], stem: list[int], responses: Responses | None) -> Tree:
    return grow_tree(trunk, rows, stem, responses, longest_position=100, device=CPU)


@dataclasses.dataclass(frozen=True)
class Node:
    """A row of the tree, told apart by what it is: a trunk row, or (position, rollout, index), with
    rollout -1 in a stem."""

    token: int
    trunk_row: int = -1
    position: int = -1
    rollout: int = -1
    index: int = -1


def _nodes(trunk: Trunk, stem: list[int], responses: Responses, positions: int) -> list[Node]:
    """What each row of the tree should be, in order."""
    nodes = [Node(int(token), trunk_row=row) for row, token in enumerate(trunk.tokens)]
    for position in range(positions):
        nodes += [Node(token, -1, position, -1, index) for index, token in enumerate(stem)]
        for rollout, length in enumerate(responses.lengths[position].tolist()):
            for index in range(max(0, length - 1)):
                token = int(responses.tokens[position, rollout, index])
                nodes.append(Node(token, -1, position, rollout, index))
    return nodes


def _path(node: Node, trunk: Trunk, rows: list[int], stem: list[int]) -> list[Node | tuple]:
    """Names of all ancestors of ``node`` and itself, from the root."""
    if node.trunk_row >= 0:
        last, tail = node.trunk_row, []
    else:
        last = rows[node.position]
        inside_stem = node.index + 1 if node.rollout < 0 else len(stem)
        tail = [("stem", node.position, index) for index in range(inside_stem)]
        if node.rollout >= 0:
            tail += [
                ("branch", node.position, node.rollout, index) for index in range(node.index + 1)
            ]
    first = next(first for first, limit in trunk.documents if first <= last < limit)
    return [("trunk", row) for row in range(first, last + 1)] + tail


def _name(node: Node) -> tuple:
    if node.trunk_row >= 0:
        return ("trunk", node.trunk_row)
    if node.rollout < 0:
        return ("stem", node.position, node.index)
    return ("branch", node.position, node.rollout, node.index)


def _dense_mask(tree: Tree) -> Tensor:
    """``[tokens, tokens]`` bool, what each row of the visibility sees."""
    rows = torch.arange(tree.visibility.tokens)
    return ancestry(tree.visibility.blocks)(rows[:, None], rows)


ROWS = [0, 3, 6, 14, 23]
LENGTHS = [[0, 1, 2], [4, 4, 4], [1, 1, 1], [0, 0, 5], [6, 3, 0]]


@pytest.mark.parametrize("separate", [False, True], ids=["one document", "separate documents"])
@pytest.mark.parametrize("head", [[], [41, 42]], ids=["no head", "head"])
@pytest.mark.parametrize("stem", [[31], [31, 32, 33]], ids=["stem of 1", "stem of 3"])
def test_every_row_sees_exactly_its_ancestors(separate, head, stem):
    trunk, responses = _trunk(head, separate), _responses(LENGTHS)
    tree = _grow(trunk, ROWS, stem, responses)
    nodes = _nodes(trunk, stem, responses, len(ROWS))
    assert tree.tokens.tolist() == [node.token for node in nodes]
    number = {_name(node): row for row, node in enumerate(nodes)}
    expected = torch.zeros(len(nodes), len(nodes), dtype=torch.bool)
    for row, node in enumerate(nodes):
        expected[row, [number[name] for name in _path(node, trunk, ROWS, stem)]] = True
    assert torch.equal(_dense_mask(tree), expected)


@pytest.mark.parametrize("separate", [False, True], ids=["one document", "separate documents"])
def test_positions_continue_along_every_path(separate):
    trunk, responses, stem = _trunk([41, 42], separate), _responses(LENGTHS), [31, 32]
    tree = _grow(trunk, ROWS, stem, responses)
    for row, node in enumerate(_nodes(trunk, stem, responses, len(ROWS))):
        path = _path(node, trunk, ROWS, stem)
        start = int(trunk.position_ids[path[0][1]])
        assert int(tree.visibility.position_ids[row]) == start + len(path) - 1


@pytest.mark.parametrize("separate", [False, True], ids=["one document", "separate documents"])
def test_every_prediction_sees_prefix_stem_and_response_so_far(separate):
    trunk, responses, stem = _trunk([41, 42], separate), _responses(LENGTHS), [31, 32]
    tree = _grow(trunk, ROWS, stem, responses)
    mask, found = _dense_mask(tree), []
    for prediction in range(tree.trunk_predictions, len(tree.predicting)):
        row = int(tree.predicting[prediction])
        found.append((tree.tokens[mask[row]].tolist(), int(tree.targets[prediction])))
    expected, rollouts, drawn, log_probs = [], [], [], []
    for position, row in enumerate(ROWS):
        prefix = trunk.tokens[int(trunk.document_first[row]) : row + 1].tolist() + stem
        for rollout in range(3):
            length = LENGTHS[position][rollout]
            response = responses.tokens[position, rollout, :length].tolist()
            expected += [(prefix + response[:n], response[n]) for n in range(length)]
            rollouts += [position * 3 + rollout] * length
            drawn += responses.drawn[position, rollout, :length].tolist()
            log_probs += responses.log_probs[position, rollout, :length].tolist()
    assert found == expected
    assert tree.rollouts.tolist() == rollouts
    assert tree.drawn.tolist() == drawn
    assert tree.drawn_log_probs.tolist() == log_probs


def test_ntp_falls_on_every_labelled_unmasked_row_that_was_not_chosen():
    trunk = _trunk([41, 42])
    trunk.loss_mask[9] = 0.25
    rows = [2, 8]
    tree = _grow(trunk, rows, [31], _responses([[2, 0], [1, 3]]))
    expected = [
        row
        for row in range(len(trunk))
        if row not in rows and trunk.columns[row] >= 0 and trunk.loss_mask[row] > 0
    ]
    predicting = tree.predicting[: tree.trunk_predictions]
    assert predicting.tolist() == expected
    assert torch.equal(tree.targets[: tree.trunk_predictions], trunk.labels[predicting])
    assert torch.equal(tree.ntp_mask, trunk.loss_mask[predicting])


def test_a_tree_without_positions_is_the_trunk():
    trunk = _trunk()
    tree = _grow(trunk, [], [31, 32], None)
    assert torch.equal(tree.tokens, trunk.tokens)
    assert len(tree.predicting) == tree.trunk_predictions == int((trunk.loss_mask > 0).sum())
    assert len(tree.rollouts) == len(tree.drawn) == len(tree.drawn_log_probs) == 0
    assert tree.rollouts.dtype == torch.int64
    assert tree.drawn.dtype == torch.bool


def test_responses_of_some_positions():
    responses = _responses(LENGTHS)
    own = responses.positions(1, 3)
    assert torch.equal(own.tokens, responses.tokens[1:3])
    assert own.lengths.tolist() == LENGTHS[1:3]
    assert torch.equal(own.drawn, responses.drawn[1:3])
    assert torch.equal(own.log_probs, responses.log_probs[1:3])


def test_padding_adds_rows_that_nobody_sees():
    trunk, responses = _trunk(), _responses(LENGTHS)
    tree, original = (_grow(trunk, ROWS, [31], responses) for _ in range(2))
    size = len(tree.tokens)
    padded = pad_tree(tree, size + 9)
    assert padded.tokens.tolist() == original.tokens.tolist() + [0] * 9
    assert (
        padded.visibility.position_ids.tolist()
        == original.visibility.position_ids.tolist() + [0] * 9
    )
    assert padded.visibility.tokens == size
    assert torch.equal(_dense_mask(padded), _dense_mask(original))
    for name in ("predicting", "targets", "ntp_mask", "rollouts", "drawn", "drawn_log_probs"):
        assert torch.equal(getattr(padded, name), getattr(original, name))
    same = pad_tree(original, size)
    assert len(same.tokens) == len(same.visibility.position_ids) == size


def test_positions_have_stems_of_their_own():
    """What a position adds to the trunk is what it adds alone."""
    trunk, responses, stems = _trunk([41], True), _responses(LENGTHS), [[31], [32, 33, 34], [35]]
    stems = (stems * len(ROWS))[: len(ROWS)]
    samples = reasoned(trunk, ROWS, responses)
    for position, stem in zip((p for of in samples for p in of.positions), stems, strict=True):
        position.stem = stem
    tree = grow_samples(samples, longest_position=100, device=CPU)
    added = [
        _grow(trunk, [row], stem, responses.positions(number, number + 1))
        for number, (row, stem) in enumerate(zip(ROWS, stems, strict=True))
    ]
    size = len(trunk)
    tokens, places = zip(*((own.tokens, own.visibility.position_ids) for own in added), strict=True)
    assert torch.equal(tree.tokens[size:], torch.cat([own[size:] for own in tokens]))
    found = tree.visibility.position_ids[size:]
    assert torch.equal(found, torch.cat([own[size:] for own in places]))

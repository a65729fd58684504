"""The prompt in token ids, and the bound of a response against the longest that can be written."""

import copy
import dataclasses
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import normalizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_rmt.algorithm.settings import Settings
from megatron_rmt.mid_training import longest_position
from megatron_rmt.prompt.prompt import NO_END_OF_DOCUMENT, Prompt, ResponseBound
from megatron_rmt.prompt.response import Response
from megatron_rmt.prompt.template import TEMPLATES, Template
from megatron_rmt.rollout.live_rollouts import LiveRollouts, RolloutPosition
from megatron_rmt.rollout.responses import written
from megatron_rmt.rollout.sampling import RolloutSettings
from megatron_rmt.rollout.trunk import UserBatch, build_trunk
from megatron_rmt.update.tree import ChosenPosition, ReasonedSample, grow_tree
from tests.tiny_tokenizer import build_tokenizer

CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


class MegatronsTokenizer:
    """As ``megatron.training.get_tokenizer()`` returns it, as far as a prompt asks."""

    library = "huggingface"

    def __init__(self, tokenizer: PreTrainedTokenizerFast, eod: int, eos: int | None) -> None:
        self._tokenizer = SimpleNamespace(tokenizer=tokenizer)
        self.eod, self._eos = eod, eos
        self.bos = tokenizer.bos_token_id

    def tokenize(self, text: str) -> list[int]:
        return self._tokenizer.tokenizer.encode(text)

    @property
    def eos(self) -> int:
        if self._eos is None:
            raise NotImplementedError
        return self._eos


@pytest.fixture(scope="module")
def inner() -> PreTrainedTokenizerFast:
    """<|endoftext|> is 0, <|im_start|>, which it puts before a text, 1 and <|im_end|> 2."""
    tokenizer = build_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    assert tokenizer.encode("a")[0] == 1
    return tokenizer


def _prompt(
    inner: PreTrainedTokenizerFast,
    template: str = "rpt",
    *,
    chat: bool = False,
    answer_tokens: int = 32,
    force_close: bool = False,
    eos: int | None = 2,
) -> Prompt:
    tokenizer = MegatronsTokenizer(inner, eod=0, eos=eos)
    return Prompt.of(
        tokenizer, template, chat=chat, answer_tokens=answer_tokens, force_close=force_close
    )


@pytest.mark.parametrize("name", TEMPLATES)
def test_its_pieces_are_those_of_the_template_behind_one_begin_token(name, inner):
    prompt, template = _prompt(inner, name), TEMPLATES[name]
    assert prompt.template == template
    assert prompt.begin == (1,)
    assert prompt.preamble[:1] == ([1] if template.head else [])
    for tokens, text in (
        (prompt.preamble[1:], template.head),
        (prompt.close, template.close),
        (prompt.stem(800), template.stem_text(800)),
        (prompt.stem(7), template.stem_text(7)),
    ):
        assert prompt.text(tokens) == text
        assert not {0, 1, 2}.intersection(tokens)
    assert prompt.end_of_document == 0


def test_responses_end_at_the_end_of_a_document_and_of_a_sequence(inner):
    assert _prompt(inner).stop == [0, 2]
    assert _prompt(inner, eos=0).stop == [0]
    assert _prompt(inner, eos=None).stop == [0]


def test_responses_end_at_every_special_token_that_the_model_s_files_declare(tmp_path):
    build_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 1}))
    own = AutoTokenizer.from_pretrained(tmp_path)
    assert _prompt(own, eos=0).stop == [0, 1]
    text = own.encode("a", add_special_tokens=False)
    # A token of text, and one that the tokenizer does not have, end nothing.
    ends = {"eos_token_id": [1, 2, *text, 10**6]}
    (tmp_path / "generation_config.json").write_text(json.dumps(ends))
    assert _prompt(own, eos=0).stop == [0, 1, 2]


def test_without_an_end_of_text_responses_end_at_their_bounds_alone(inner):
    class Endless(MegatronsTokenizer):
        """As Megatron's of Hugging Face is; sentencepiece says -1."""

        @property
        def eos(self) -> int:
            raise TypeError("'None' is not an instance of 'str'")

    options = {"chat": False, "answer_tokens": 1, "force_close": False}
    for tokenizer in (Endless(inner, None, None), MegatronsTokenizer(inner, -1, -1)):
        prompt = Prompt.of(tokenizer, "inline", **options)
        assert prompt.stop == []
        assert prompt.end_of_document == NO_END_OF_DOCUMENT
        grammar = prompt.grammar(torch.device("cpu"))
        assert not grammar.done[grammar.next_state[:-1].flatten().long()].any()


def test_a_tokenizer_that_is_not_of_hugging_face_splits_text_itself():
    class OfLetters:
        library, eod = "tiktoken", 0
        _tokenizer = SimpleNamespace(vocab_size=len(LETTERS), id2token=dict(enumerate(LETTERS)))

        def tokenize(self, text: str) -> tuple[int, ...]:
            return tuple(_ids(text))

    prompt = Prompt.of(OfLetters(), "inline", chat=True, answer_tokens=1, force_close=False)
    assert prompt.preamble == []
    assert prompt.close == _ids("</think>")
    assert prompt.stem(12) == _ids("<think budget=12>")
    assert prompt.stop == [0]


def test_chat_markers_go_round_the_template_where_they_are_asked_for(inner):
    inner.chat_template = CHAT
    try:
        with_markers, without = (_prompt(inner, "rpt", chat=chat) for chat in (True, False))
    finally:
        inner.chat_template = None
    assert with_markers.template.head == "<|user|>\n" + TEMPLATES["rpt"].head
    assert with_markers.text(with_markers.preamble) == with_markers.template.head
    assert with_markers.text(with_markers.stem(9)).endswith("<|end|><|assistant|>\n<think>\n")
    assert without.template == TEMPLATES["rpt"]
    assert _prompt(inner, "rpt", chat=True).template == TEMPLATES["rpt"]


def test_the_rendering_is_what_the_chat_template_made_of_the_template(inner):
    inner.chat_template = "{{ day }}" + CHAT
    try:
        texts = [
            _prompt(_copied_with(inner, day), "rpt", chat=chat).rendering()
            for day, chat in (("1 May", True), ("2 May", True), ("2 May", False))
        ]
    finally:
        inner.chat_template = None
    first, second, plain = texts
    rpt = TEMPLATES["rpt"]
    assert plain == {"head": rpt.head, "stem": rpt.stem, "close": rpt.close}
    assert first["head"] == "1 May<|user|>\n" + rpt.head
    assert second == first | {"head": "2 May<|user|>\n" + rpt.head}
    assert "{budget}" in first["stem"]


def test_the_digest_tells_texts_and_their_tokens_apart(inner):
    same, again, shorter = (_prompt(inner, name) for name in ("rpt", "rpt", "raw"))
    assert same.digest == again.digest != shorter.digest
    other_tokens = dataclasses.replace(same, encode=lambda text: [3, *same.encode(text)])
    assert other_tokens.rendering() == same.rendering()
    assert other_tokens.digest != same.digest


def _copied_with(inner: PreTrainedTokenizerFast, day: str) -> PreTrainedTokenizerFast:
    """The tokenizer on a day, as its chat template sees it."""
    other = copy.deepcopy(inner)
    other.chat_template = inner.chat_template.replace("{{ day }}", day)
    return other


def test_special_tokens_have_no_bytes(inner):
    prompt = _prompt(inner)
    assert len(prompt.bytes_of) == len(prompt.has_bytes) == len(inner)
    assert [token for token, text in enumerate(prompt.has_bytes) if not text] == [0, 1, 2]


MARKERS = ["<think>", "</think>", "\\boxed{"]


@pytest.fixture(scope="module")
def with_markers() -> PreTrainedTokenizerFast:
    """The markers are special tokens: R1's and Qwen3's are in some of their derivatives."""
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": MARKERS})
    return tokenizer


@pytest.mark.parametrize("name", ["rpt", "inline"])
def test_special_tokens_that_are_markers_stand_for_their_text(name, with_markers):
    prompt = _prompt(with_markers, name)
    opening, closing, box = with_markers.convert_tokens_to_ids(MARKERS)
    assert prompt.close == [closing]
    assert prompt.bytes_of[closing] == b"</think>"
    assert prompt.bytes_of[opening] == b"<think>"
    assert prompt.bytes_of[box] == (b"\\boxed{" if name == "rpt" else b"")
    assert [prompt.bytes_of[token] for token in (0, 1, 2)] == [b""] * 3
    # Whoever follows or reads a response sees its thought end.
    the = prompt.bytes_of.index(b" the")
    written = [*prompt.encode("so it is"), opening, *prompt.close, *prompt.true_answer([the])]
    assert prompt.read(written) == Response(len(prompt.encode("so it is")) + 1, True, True, b" the")
    grammar, state = prompt.grammar(torch.device("cpu")), 0
    for token in written:
        state = grammar.next_state[state, token]
    assert not grammar.thinking[state]
    assert bool(grammar.done[state]) == (name == "rpt")


def test_a_marker_that_the_tokenizer_cannot_write_is_refused(tmp_path):
    lowering = build_tokenizer()
    lowering.backend_tokenizer.normalizer = normalizers.Lowercase()
    template = tmp_path / "loud.json"
    fields = dataclasses.asdict(TEMPLATES["inline"]) | {"close": "</THINK>"}
    template.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"tokens of its close, '</THINK>', spell '</think>', so"):
        _prompt(lowering, str(template))
    lowering.backend_tokenizer.normalizer = normalizers.Replace("boxed", "box")
    with pytest.raises(ValueError, match=r"tokens of its box, .* spell '\\n.*box{x}', so that no"):
        _prompt(lowering, "raw")


def test_a_next_answer_says_all_text_but_the_end_of_thought(inner):
    prompt = _prompt(inner, "inline")
    not_said = {
        text for text, said in zip(prompt.bytes_of, prompt.answerable, strict=True) if not said
    }
    assert b"" in not_said
    assert len(not_said) > 1
    assert all(b"</think>" in text for text in not_said - {b""})


def test_a_box_holds_whole_characters_with_balanced_braces(inner):
    prompt = _prompt(inner, "raw")
    said = dict(zip(prompt.bytes_of, prompt.answerable.tolist(), strict=True))
    assert said[b" the"]
    assert said[b"\n"]
    assert not any(said[text] for text in (b"", b"{", b"}", b"}}", b"\\boxed{", b"\xc3", b"\xa9"))


def test_every_answer_that_a_position_may_ask_for_is_read_as_the_truth(inner, with_markers):
    for tokenizer in (inner, with_markers):
        for name in ("raw", "inline"):
            prompt = _prompt(tokenizer, name)
            for token in prompt.answerable.nonzero()[:, 0].tolist():
                read = prompt.read(
                    [*prompt.encode("so"), *prompt.close, *prompt.true_answer([token])]
                )
                assert read.prediction == prompt.bytes_of[token]


def test_a_token_that_ends_a_text_is_no_answer(inner):
    letters = _of_letters(stop=[0, OTHER])
    assert not letters.answerable[OTHER]
    assert letters.answerable[OTHER + 1]


def test_the_supervised_answer_has_the_bytes_of_the_truth_whatever_the_tokenizer_writes(inner):
    """A half character in a box, text that a normalizer changes, text of many tokens."""
    prompt = _prompt(inner, "raw")
    half = prompt.bytes_of.index(b"\xc3")
    assert prompt._bytes(prompt.true_answer([half])) == b"\n\\boxed{\xc3}"
    normalising = build_tokenizer()
    normalising.backend_tokenizer.normalizer = normalizers.Replace("the", "a")
    prompt = _prompt(normalising, "raw")
    the = prompt.bytes_of.index(b" the")
    assert prompt._bytes(prompt.true_answer([the])) == b"\n\\boxed{ the}"
    letters = Template("test", "", "{budget}", "</t>", "boxed")
    prompt = _of_letters(template=letters, bytes_of=[*LETTERS, b"x" * 16, b"x" * 17])
    for token, tokens in ((len(LETTERS), 8 + 16 + 1), (len(LETTERS) + 1, 8 + 1 + 1)):
        answer = prompt.true_answer([token])
        assert len(answer) == tokens
        assert prompt._bytes(answer) == b"\n\\boxed{" + prompt.bytes_of[token] + b"}"


def test_text_leaves_special_tokens_out_and_replaces_what_is_no_utf_8(inner):
    prompt = _prompt(inner)
    half = prompt.bytes_of.index(b"\xc3")
    assert prompt.text([0, *prompt.encode(" the"), half, 2]) == " the\ufffd"


def test_a_target_of_several_tokens_ends_before_one_that_no_answer_can_say(inner):
    the, end = _prompt(inner).bytes_of.index(b" the"), 2
    for template, spelled in (("inline", " the the"), ("raw", "\n\\boxed{ the the}")):
        prompt = dataclasses.replace(_prompt(inner, template), target_tokens=2)
        assert prompt.target([the, the, the]) == [the, the]
        assert prompt.target([the, end, the]) == [the]
        assert prompt.text(prompt.true_answer([the, the])) == spelled
    assert _prompt(inner, "inline").target([the, the]) == [the]


def test_the_true_answer_is_the_token_or_its_text_in_a_box(inner):
    token = _prompt(inner).bytes_of.index(b" the")
    assert _prompt(inner, "inline").true_answer([token]) == [token]
    for name in ("rpt", "raw"):
        prompt = _prompt(inner, name)
        assert prompt.text(prompt.true_answer([token])) == "\n\\boxed{ the}"


@pytest.mark.parametrize("name", ["rpt", "inline"])
def test_it_reads_the_answers_that_it_writes(name, inner):
    prompt = _prompt(inner, name)
    token = prompt.bytes_of.index(b" the")
    thought = prompt.encode("so it goes on")
    written = [*thought, *prompt.close, *prompt.true_answer([token])]
    expected = Response(len(thought), closed=True, well_formed=True, prediction=b" the")
    assert prompt.read([*written, 2]) == expected


def test_as_much_of_an_answer_is_read_as_the_prompt_allows(inner):
    whole, one = (_prompt(inner, "inline", answer_tokens=count) for count in (32, 1))
    tokens = [token for piece in ("a", "</think>", *[" the"] * 3) for token in whole.encode(piece)]
    assert whole.bytes_of[tokens[-1]] == b" the"
    assert whole.read(tokens).prediction == b" the the the"
    assert one.read(tokens).prediction == b" the"


def test_the_grammar_is_made_once_for_each_device(inner):
    prompt = _prompt(inner)
    grammar = prompt.grammar(torch.device("cpu"))
    assert prompt.grammar(torch.device("cpu")) is grammar
    assert grammar.next_state.device.type == "cpu"
    assert prompt.grammar(torch.device("meta")).next_state.device.type == "meta"
    assert grammar.done[grammar.next_state[grammar.start, prompt.stop]].all()
    assert _prompt(inner).grammar(torch.device("cpu")) is not grammar


# An end token, then letters, so that what is written is as many tokens as letters; the policy may
# draw a whole end of thought as well.
LETTERS = [b"", b"\n", *(bytes([byte]) for byte in range(32, 127)), b"</t>"]
OTHER, END_OF_THOUGHT = LETTERS.index(b"x"), LETTERS.index(b"</t>")


def _ids(text: str) -> list[int]:
    return [LETTERS.index(letter.encode()) for letter in text]


def _of_letters(**changes: Any) -> Prompt:
    """With a close of 4 tokens."""
    options = {
        "template": Template("test", "", "{budget}", "</t>", "next"),
        "encode": _ids,
        "bytes_of": LETTERS,
        "stop": [0],
        "end_of_document": 0,
        "answer_tokens": 3,
    }
    return Prompt(**options | changes)


MODES = {
    "drawn": {},
    "forced close": {"force_close": True},
    "warm-up": {"writes_truth": True},
    "warm-up, short truth": {"writes_truth": True, "truth": 1},
    "warm-up, forced close": {"writes_truth": True, "force_close": True},
    "no thought": {"thinks": False},
}


def _written(
    prompt: Prompt, how: RolloutSettings, bound: ResponseBound, truth: int, script: list[int]
) -> list[int]:
    """A response of which the policy draws ``script``, then letters without end."""
    position = RolloutPosition(0, 0, 0, 1, 1, truth=(OTHER,) * truth)
    live = LiveRollouts([position], prompt, how, bound, torch.device("cpu"))
    while live.alive.any():
        token = script[live.step] if live.step < len(script) else OTHER
        live.write(torch.tensor([token]), torch.zeros(1))
        live.step += 1
    return live.responses()[0][0].tokens.tolist()


@pytest.mark.parametrize("budget", [1, 2, 5])
@pytest.mark.parametrize("name", MODES)
def test_the_longest_response_that_can_be_written_is_the_bound(name, budget):
    mode = {"writes_truth": False, "force_close": False, "thinks": True, "truth": 6} | MODES[name]
    prompt = _of_letters(force_close=mode["force_close"])
    bound = prompt.bound(
        budget * mode["thinks"], warm_up=mode["writes_truth"], truth_tokens=mode["truth"]
    )
    how = RolloutSettings(
        group=1,
        budget=budget,
        seed=0,
        iteration=0,
        temperature=1.0,
        writes_truth=mode["writes_truth"],
        thinks=mode["thinks"],
    )
    # A thought may end anywhere, by its marker, in one token or in several, or by an end token, or
    # go on with a marker half written.
    ends = ([], [END_OF_THOUGHT], _ids("</t>"), _ids("</t"), [0], [END_OF_THOUGHT, 0])
    scripts = [[OTHER] * before + end for before in range(2 * budget + 2) for end in ends]

    def responses_within(bound: ResponseBound) -> list[list[int]]:
        return [_written(prompt, how, bound, mode["truth"], script) for script in scripts]

    # With room for more, so that what is too long shows.
    responses = responses_within(dataclasses.replace(bound, answer=bound.answer + 50))
    longest = max(map(len, responses))
    assert longest <= bound.tokens
    # Nothing is reserved in vain, but for a truth that is shorter than an answer may be.
    assert longest == bound.tokens or name == "warm-up, short truth"
    assert responses_within(bound) == responses


def test_the_parts_of_the_bound():
    prompt, forcing = _of_letters(), _of_letters(force_close=True)
    assert prompt.bound(5) == ResponseBound(thought=10, close=0, answer=3)
    assert forcing.bound(5) == ResponseBound(thought=10, close=4, answer=3)
    for of in (prompt, forcing):
        assert of.bound(5, warm_up=True, truth_tokens=1) == ResponseBound(5, close=4, answer=3)
        assert of.bound(5, warm_up=True, truth_tokens=9) == ResponseBound(5, close=4, answer=9)
    # A truth is written in the warm-up alone.
    assert prompt.bound(5, truth_tokens=9) == prompt.bound(5)
    assert ResponseBound(5, 4, 9).tokens == 18


def test_a_warm_up_with_a_budget_below_its_close_is_foreseen():
    """Thoughts of 2 tokens, a close of 4: the warm-up takes 2 + 4, later steps take 2 * 2."""
    prompt = _of_letters(answer_tokens=32)
    assert prompt.bound(2).tokens == 36
    assert prompt.bound(2, warm_up=True, truth_tokens=1).tokens == 38
    assert prompt.longest_response(2, warm_up=False) == 36
    assert prompt.longest_response(2, warm_up=True) == 38


@pytest.mark.parametrize("warm_up", [False, True])
@pytest.mark.parametrize("force_close", [False, True])
@pytest.mark.parametrize("answer_tokens", [1, 32])
@pytest.mark.parametrize("name", ["rpt", "inline"])
def test_no_step_of_a_run_has_a_larger_bound_than_the_longest_response(
    name, answer_tokens, force_close, warm_up, inner
):
    prompt = _prompt(inner, name, answer_tokens=answer_tokens, force_close=force_close)
    truth = max(len(prompt.true_answer([token])) for token in range(len(inner)) if token > 2)
    for largest in (1, 2, 3, 40):
        longest = prompt.longest_response(largest, warm_up)
        bounds = [prompt.bound(budget) for budget in range(1, largest + 1)]
        if warm_up:
            bounds += [
                prompt.bound(budget, warm_up=True, truth_tokens=truth)
                for budget in range(1, largest + 1)
            ]
        assert max(bound.tokens for bound in bounds) <= longest


@pytest.mark.parametrize("answer_tokens", [1, 3, 4, 32])
@pytest.mark.parametrize("force_close", [False, True])
def test_positions_hold_the_longest_thought_with_its_end_written_for_a_reward(
    force_close, answer_tokens
):
    """As it is where a reward asks for the log-prob of the truth behind it."""
    budget, length = 5, 12
    prompt = _of_letters(force_close=force_close, answer_tokens=answer_tokens)
    settings = Settings(initial_budget=budget, answer_tokens=answer_tokens, force_close=force_close)
    text = torch.full((1, length), OTHER)
    batch = UserBatch(text, torch.arange(length)[None], text, torch.ones(1, length))
    (sample,) = build_trunk(batch, [0], preamble=[], end_of_document=0, separate_documents=False)
    thought = [OTHER] * 2 * budget
    responses = [written([*thought, *prompt.close, OTHER])]
    last = ChosenPosition(length - 1, budget, prompt.stem(budget), responses)
    tree = grow_tree(
        [ReasonedSample(sample, [last])],
        longest_position=longest_position(length, settings, prompt),
        device=torch.device("cpu"),
    )
    assert int(tree.visibility.position_ids.max()) < longest_position(length, settings, prompt)

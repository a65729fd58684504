"""Evaluation: against transformers on a tiny model, and its intervals against closed forms."""

import codecs
import gzip
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_rmt.prompt.prompt import Prompt
from megatron_rmt.prompt.response import can_answer
from megatron_rmt.prompt.template import TEMPLATES, Template
from megatron_rmt.prompt.token_bytes import token_bytes
from tests.distributed import REPOSITORY, run_distributed
from tests.test_evaluation import record, settings
from tests.test_token_bytes import byte_level_bpe

TOOLS = REPOSITORY / "tools"
sys.path.insert(0, str(TOOLS))

import convert_checkpoint  # noqa: E402
import evaluate  # noqa: E402
import evaluation  # noqa: E402
import evaluation_documents  # noqa: E402
from document_tokens import DocumentTokenizer  # noqa: E402
from preprocess_data import load_tokenizer  # noqa: E402

TEXTS = [
    "Anna buys three apples for 6 euros; each apple costs 2 euros. Half of 84 is 42.",
    "naïve café: déjà vu",
    "Half of 84 is 42, and 42 + 42 = 84. Anna buys 3 apples, each apple costs 2 euros.",
    "two leading spaces,\n\ta tab and a newline\n; 数学 is fun",
    "42 + 42 = 84, and half of 84 is 42; Zürich costs 3 euros.",
]
LENGTH, BUDGET = 24, 2
LOG_PROBS = ("log_prob", "thought_log_prob", "swapped_log_prob", "no_thought_log_prob")
BEGIN = 5
# Both sides choose the most likely token, so that transformers can repeat every thought.
REASONING = (
    f"--seq-length {LENGTH} --positions-per-document 8 --budget {BUDGET} --seed 5 --rmt-greedy "
    "--rmt-template inline --rmt-force-close --rmt-answer-tokens 1 --rollouts-at-once 20"
).split()

# Models that know the texts by halves, so that predictions are right and wrong, sure and unsure,
# with and without a thought. In a process of its own, where the CPU does not stand in for CUDA.
MAKE_MODELS = """
import json, sys
from pathlib import Path
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

root, texts = Path(sys.argv[1]), json.load(sys.stdin)
torch.set_num_threads(1)
tokenizer = AutoTokenizer.from_pretrained(root / "tokenizer")
stem, close = tokenizer.encode("<think budget=2>"), tokenizer.encode("</think>")
for steps, name in ((18, "before"), (10, "after")):
    torch.manual_seed(steps)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), hidden_size=32,
        intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=1024, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
        tie_word_embeddings=False))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    for step in range(steps):
        for text in texts:
            ids = tokenizer.encode(text)
            cut = int(torch.randint(1, len(ids), ()))
            # Some thoughts end at once, others would go on beyond twice the budget.
            thought = ids[:1] * (0, 1, 6, 7)[int(torch.randint(4, ()))]
            row = torch.tensor([ids[:cut] + stem + thought + close + ids[cut:]])
            plain = torch.tensor([ids])
            loss = model(row, labels=row).loss + model(plain, labels=plain).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.save_pretrained(root / name)
    tokenizer.save_pretrained(root / name)
"""

# Slow and obvious: one sequence at a time, no cache, float64.
REFERENCE = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

directory, length, budget = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
texts, positions = json.load(sys.stdin)
model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)
tokenizer = AutoTokenizer.from_pretrained(directory)

@torch.no_grad()
def logits(ids):
    return model(torch.tensor([ids])).logits[0]

def encode(text):
    return tokenizer.encode(text, add_special_tokens=False)

stem, close = encode(f"<think budget={budget}>"), encode("</think>")
assert len(close) == 1
found, asked = [], []
for text, chosen in zip(texts, positions):
    ids = tokenizer.encode(text)
    log_probs = logits(ids[:length]).log_softmax(-1)
    entropies = -(log_probs.exp() * log_probs).sum(-1)
    thought, no_thought, lengths, closed_by_itself = [], [], [], []
    for position in chosen:
        prompt = ids[:position] + stem
        response = []
        while len(response) < 2 * budget and not {tokenizer.eos_token_id, *close} & {*response}:
            response.append(int(logits(prompt + response)[-1].argmax()))
        ended, closed = tokenizer.eos_token_id in response, close[0] in response
        lengths.append(len(response) - ended - closed)
        closed_by_itself.append(int(closed))
        asked.append((ids[:length], position, response[: lengths[-1]], not ended))
        response += close * (not closed)
        answer = None if ended else int(logits(prompt + response)[-1].argmax())
        thought.append(int(answer == ids[position]))
        no_thought.append(int(int(logits(prompt + close)[-1].argmax()) == ids[position]))
    found.append(dict(
        entropies=entropies[:-1].tolist(), thought=thought, no_thought=no_thought,
        thought_length=lengths, closed_by_itself=closed_by_itself,
        predictions=log_probs.argmax(-1)[:-1].tolist(), ids=ids,
        text_log_prob=float(log_probs[range(len(log_probs) - 1), ids[1:length]].sum())))

# The truth after each thought, its own and that half way round, and after none.
likelihoods = []
for index, (ids, position, thought, _) in enumerate(asked):
    other, answered = asked[(index + len(asked) // 2) % len(asked)][2:]
    one = {}
    for name, before in {"": [], "thought_": stem + thought + close, "no_thought_": stem + close,
                         "swapped_": stem + other + close}.items():
        truth = ids[position : position + int(sys.argv[4])]
        logits_ = logits(ids[:position] + before + truth[:-1])[-len(truth):]
        of_truth = logits_.log_softmax(-1)[range(len(truth)), truth]
        one[name + "log_prob"] = float(of_truth.mean())
        likeliest = int(int(logits_[0].argmax()) == truth[0])
        if name:
            one[name + "likeliest"] = likeliest
        if name == "swapped_":
            one["swapped"] = likeliest * answered
    likelihoods.append(one)
for one, chosen in zip(found, positions):
    for name in likelihoods[0]:
        one[name] = [own[name] for own in likelihoods[: len(chosen)]]
    del likelihoods[: len(chosen)]
json.dump(found, sys.stdout)
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models as Hugging Face has them, converted ones beside them, and the held-out texts."""
    root = tmp_path_factory.mktemp("evaluate")
    byte_level_bpe().save_pretrained(root / "tokenizer")
    subprocess.run(
        [sys.executable, "-c", MAKE_MODELS, str(root)],
        input=json.dumps(TEXTS),
        text=True,
        check=True,
    )
    for name in ("before", "after"):
        convert_checkpoint.to_megatron(root / name, root / f"{name}-megatron")
    write_data(root / "heldout.jsonl", TEXTS)
    return root


def write_data(path: Path, texts: Sequence[str], **others: Any) -> Path:
    lines = [json.dumps({"text": text} | others, ensure_ascii=False) for text in texts]
    # A blank line is no document.
    path.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    return path


def command(root: Path, name: str, output: str, *others: str) -> list[str]:
    """Arguments that evaluate the model ``name``."""
    fixed = ["--load", root / f"{name}-megatron", "--data", root / "heldout.jsonl"]
    return [*map(str, fixed), "--output", str(root / output), *others]


def content(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def before(root: Path) -> tuple[dict[str, Any], str]:
    """What the command line writes and prints for the first model."""
    words = [sys.executable, str(TOOLS / "evaluate.py")]
    words += command(root, "before", "before.json", *REASONING)
    done = subprocess.run(words, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    return content(root / "before.json"), done.stdout


def reference(
    root: Path, documents: Sequence[dict[str, Any]], target_tokens: int
) -> list[dict[str, Any]]:
    """What transformers says of the first model at the positions of ``documents``."""
    words = [str(root / "before"), *map(str, (LENGTH, BUDGET, target_tokens))]
    done = subprocess.run(
        [sys.executable, "-c", REFERENCE, *words],
        input=json.dumps([TEXTS, [document["positions"] for document in documents]]),
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def _evaluate(words: list[str]) -> None:
    flags, others = evaluate.build_parser().parse_known_args(words)
    evaluate.evaluate(flags, others)


@pytest.mark.multiprocess
def test_positions_whose_truth_no_box_can_hold_are_not_drawn(root: Path):
    text = "int f() { return {1, 2}; } naïve 数学 {{}} " * 2
    write_data(root / "code.jsonl", [text])
    words = [sys.executable, str(TOOLS / "evaluate.py"), "--rmt-template", "raw"]
    words += ["--budget", "1", "--rmt-answer-tokens", "1", "--seq-length", "64"]
    words += ["--positions-per-document", "64", "--data", str(root / "code.jsonl")]
    words += ["--load", str(root / "before-megatron"), "--output", str(root / "code.json")]
    done = subprocess.run(words, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    (document,) = content(root / "code.json")["documents"]
    tokenizer = byte_level_bpe()
    truth = [token_bytes(tokenizer)[token] for token in tokenizer.encode(text)][:64]
    uncertain = [at for at, digit in enumerate(document["difficulty"]) if digit in "123"]
    drawn = [at for at in uncertain if can_answer(truth[at], TEMPLATES["raw"])]
    assert document["positions"] == drawn
    assert 0 < len(drawn) < len(uncertain)


@pytest.mark.multiprocess
def test_a_document_whose_text_the_tokenizer_loses_is_refused(root: Path):
    """A special token written out in it takes the blank behind it along."""
    load = Path(shutil.copytree(root / "before-megatron", root / "stripping"))
    description = json.loads((load / "huggingface/tokenizer.json").read_text())
    (token,) = (own for own in description["added_tokens"] if own["content"] == "<|im_start|>")
    token["rstrip"] = True
    (load / "huggingface/tokenizer.json").write_text(json.dumps(description))
    data = write_data(root / "special.jsonl", ["no such token", "a <|im_start|> b"])
    words = [sys.executable, str(TOOLS / "evaluate.py"), "--load", str(load), "--data", str(data)]
    words += ["--output", str(root / "special.json"), *REASONING]
    done = subprocess.run(words, capture_output=True, text=True, cwd=REPOSITORY)
    assert "'<|im_start|> b' becomes '<|im_start|>b'; use a" in done.stderr
    assert done.returncode == 1
    assert not (root / "special.json").exists()


@pytest.mark.multiprocess
def test_predictions_entropies_and_thoughts_are_those_of_transformers(
    root: Path, before: tuple[dict[str, Any], str]
):
    documents = before[0]["documents"]
    expected = reference(root, documents, target_tokens=1)
    entropies = np.concatenate([one["entropies"] for one in expected])
    assert np.abs(entropies[:, None] - [0.5, 1.0, 1.5]).min() > 1e-4, "too close to a threshold"
    right = np.zeros(3)
    total = np.zeros(3)
    for document, one in zip(documents, expected, strict=True):
        targets = np.array(one["ids"][1:LENGTH])
        exceeded = (np.array(one["entropies"])[:, None] > [0.5, 1.0, 1.5]).sum(1)
        correct = np.array(one["predictions"]) == targets
        assert document["difficulty"] == "-" + "".join(map(str, exceeded))
        assert document["next_token"][1:] == "".join(str(int(value)) for value in correct)
        assert document["entropy"] == pytest.approx(sum(one["entropies"]), rel=1e-5)
        assert document["text_log_prob"] == pytest.approx(one["text_log_prob"], rel=1e-5)
        assert document["dropped"] == max(0, len(one["ids"]) - LENGTH)
        for name in ("thought", "no_thought", "thought_length", "closed_by_itself"):
            assert document[name] == one[name], name
        for name in ("swapped", "thought_likeliest", "swapped_likeliest", "no_thought_likeliest"):
            assert document[name] == one[name], name
        for name in LOG_PROBS:
            assert document[name] == pytest.approx(one[name], abs=1e-4), name
        for split in range(3):
            total[split] += (exceeded > split).sum()
            right[split] += (correct & (exceeded > split)).sum()
    # All tokens of these texts count.
    tokens = sum(len(one["entropies"]) for one in expected)
    nats = -sum(one["text_log_prob"] for one in expected) / tokens
    assert before[0]["results"]["perplexity"]["value"] == pytest.approx(np.exp(nats), rel=1e-5)
    results = before[0]["results"]["next_token"]
    for split, name in enumerate(evaluation.SPLITS):
        assert results[name]["positions"] == total[split] > 3
        assert results[name]["value"] == right[split] / total[split]
    for name in ("thought", "no_thought", "swapped", "swapped_likeliest"):
        assert {0, 1} == {match for document in documents for match in document[name]}, name
    assert len(set("".join(document["difficulty"] for document in documents))) == 5
    assert right.min() > 0
    assert results["average"]["value"] == pytest.approx((right / total).mean())
    assert sum(document["dropped"] for document in documents) > 0


@pytest.mark.multiprocess
def test_a_reward_without_answers_is_probed_by_the_likelihood_of_the_next_tokens(root: Path):
    """Two files of the same texts, each by itself, and answers where the text marks them."""
    spans = [{"text": text, "answer_spans": [[3, 5], [9, 10], [9, 12]]} for text in TEXTS]
    for name in ("one.jsonl", "other.jsonl"):
        (root / name).write_text("".join(json.dumps(line) + "\n" for line in spans))
    words = command(root, "before", "gain.json", *REASONING, "--rmt-reward", "information-gain")
    words += ["--data", str(root / "one.jsonl"), str(root / "other.jsonl")]
    words += ["--positions", "answers", "--rmt-target-tokens", "2"]
    run_distributed(1, _evaluate, words)
    found = content(root / "gain.json")
    one, other = found["documents"][: len(TEXTS)], found["documents"][len(TEXTS) :]
    assert [document | {"file": "one"} for document in other] == one
    for document, expected in zip(one, reference(root, one, target_tokens=2), strict=True):
        text = TEXTS[document["line"] - 1]
        ends = np.cumsum([len(token) for token in byte_level_bpe().tokenize(text)])
        opening = {int((ends <= len(text[:at].encode())).sum()) for at in (3, 9)}
        assert document["positions"] == sorted(opening - {0})
        for name in ("thought_likeliest", "swapped_likeliest", "no_thought_likeliest"):
            assert document[name] == expected[name], name
        for name in LOG_PROBS:
            assert document[name] == pytest.approx(expected[name], abs=1e-4), name
        assert document["thought"] == document["swapped"] == document["no_thought"] == []
    results = found["results_by_file"]
    assert results["one"]["thought_log_prob"] == results["other"]["thought_log_prob"]
    assert found["results"]["thought_log_prob"]["all"]["value"] == pytest.approx(
        results["one"]["thought_log_prob"]["all"]["value"]
    )


@pytest.mark.multiprocess
def test_table_is_all_that_stdout_gets(before: tuple[dict[str, Any], str]):
    written, printed = before
    value = 100 * written["results"]["next_token"]["hard"]["value"]
    assert f"{value:.1f} [" in next(line for line in printed.splitlines() if "all pos" in line)
    assert printed.startswith(written["settings"]["load"])
    assert len(printed.splitlines()) < 50
    assert "thought minus swapped thought" in printed
    perplexity = next(line for line in printed.splitlines() if line.startswith("perplexity of"))
    assert f"{written['results']['perplexity']['value']:.3f} [" in perplexity


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    "layout",
    [["--tensor-model-parallel-size", "2"], ["--pipeline-model-parallel-size", "2"], []],
    ids=["tensor", "pipeline", "data"],
)
def test_two_ranks_measure_what_one_does(
    root: Path, before: tuple[dict[str, Any], str], layout: list[str]
):
    words = command(root, "before", "two.json", *REASONING, "--rollouts-at-once", "5", *layout)
    run_distributed(2, _evaluate, words)
    again = content(root / "two.json")
    for one, other in zip(before[0]["documents"], again["documents"], strict=True):
        nats = ("entropy", "text_log_prob", *LOG_PROBS)
        for name in nats:
            assert one[name] == pytest.approx(other.pop(name), rel=1e-5), name
        assert one == other | {name: one[name] for name in nats}
    for name, result in before[0]["results"].items():
        if name == "perplexity":
            assert again["results"][name] == pytest.approx(result, rel=1e-5)
        elif "log_prob" not in name:
            assert again["results"][name] == result


@pytest.mark.multiprocess
def test_splits_are_those_of_the_bare_text_under_a_prompt_with_a_head_and_samples_count(
    root: Path, before: tuple[dict[str, Any], str]
):
    words = command(root, "before", "rpt.json", "--seq-length", str(LENGTH), "--samples", "3")
    words += ["--positions-per-document", "2", "--budget", "1", "--rmt-answer-tokens", "4"]
    run_distributed(1, _evaluate, words)
    first = content(root / "rpt.json")
    run_distributed(1, _evaluate, words)
    second = content(root / "rpt.json")
    assert {**first, "seconds": 0} == {**second, "seconds": 0}
    for one, other in zip(before[0]["documents"], first["documents"], strict=True):
        assert (one["difficulty"], one["next_token"]) == (other["difficulty"], other["next_token"])
        assert len(other["thought"]) == len(other["positions"]) <= 2
    # The model has never seen a \boxed{...}.
    assert first["results"]["well_formed"]["value"] == 0
    assert 0 < first["results"]["thought_length"]["value"] <= 2


@pytest.mark.multiprocess
def test_another_model_is_compared_on_the_positions_and_splits_of_the_first(
    root: Path, before: tuple[dict[str, Any], str]
):
    # A training run's directory holds neither flags nor tokenizer.
    run = shutil.copytree(root / "after-megatron", root / "run-megatron")
    shutil.rmtree(run / "huggingface")
    (run / "model_flags.txt").unlink()
    reuse = ["--positions-from", str(root / "before.json"), "--rmt-template", "inline"]
    reuse += ["--budget", "2", "--rmt-force-close", "--rmt-answer-tokens", "1"]
    reuse += ["--model-flags", str(root / "after-megatron")]
    run_distributed(1, _evaluate, command(root, "run", "after.json", *reuse))
    after = content(root / "after.json")
    for one, other in zip(before[0]["documents"], after["documents"], strict=True):
        for name in ("line", "id", "tokens", "difficulty", "positions"):
            assert one[name] == other[name], name
        assert one["next_token"] != other["next_token"]
        assert abs(one["entropy"] - other["entropy"]) > 0.01
    table = evaluation.compare([root / "before.json", root / "after.json"])
    difference = (
        after["results"]["next_token"]["easy"]["value"]
        - before[0]["results"]["next_token"]["easy"]["value"]
    )
    assert f"{100 * difference:+.1f} [" in table

    spoiled = content(root / "after.json")
    spoiled["documents"][1]["positions"][0] += 1
    (root / "spoiled.json").write_text(json.dumps(spoiled))
    with pytest.raises(ValueError, match=r"not measured on the same positions; .*--positions-from"):
        evaluation.compare([root / "before.json", root / "spoiled.json"])


@pytest.mark.multiprocess
def test_a_prompt_of_another_day_is_refused(root: Path):
    """The chat template writes the date; it is edited here instead of waiting."""
    chat = root / "chat-megatron"
    shutil.copytree(root / "before-megatron", chat)
    template = chat / "huggingface/chat_template.jinja"
    few = ["--seq-length", str(LENGTH), "--positions-per-document", "1", "--budget", "1"]
    for day in ("1 May", "2 May"):
        template.write_text(
            f"Today: {day}\n{{% for m in messages %}}{{{{ m['content'] }}}}{{% endfor %}}"
        )
        run_distributed(1, _evaluate, command(root, "chat", f"{day[0]}.json", *few))
    first, second = (content(root / f"{day}.json")["settings"]["prompt"] for day in (1, 2))
    assert first["head"].startswith("Today: 1 May\n")
    assert second["digest"] != first["digest"]
    words = command(root, "chat", "3.json", "--positions-from", str(root / "1.json"))
    with pytest.raises(Exception, match=r"1\.json and this evaluation differ in the head .* 1 May"):
        run_distributed(1, _evaluate, words)
    with pytest.raises(ValueError, match=r"1\.json and .*2\.json differ in the head"):
        evaluation.compare([root / "1.json", root / "2.json"])
    assert not (root / "3.json").exists()


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        ([], [BEGIN, 10, 11, 12]),
        ([7, 8], [BEGIN, 7, 8, 10, 11, 12]),
        ([BEGIN, 7], [BEGIN, 7, 10, 11, 12]),
    ],
)
def test_thoughts_begin_where_their_document_stands_in_the_prompt(
    monkeypatch: pytest.MonkeyPatch, head: list[int], expected: list[int]
):
    """Documents bring a begin token, which stands once and first."""
    import evaluation_passes
    from megatron_rmt import probe
    from megatron_rmt.rollout.responses import written

    prompt = Prompt(
        template=Template("own", "head" * bool(head), "{budget}", "</t>", "next"),
        encode=lambda text: [6],
        bytes_of=[b"x"] * 20,
        stop=[],
        end_of_document=0,
        answer_tokens=1,
        begin=(BEGIN,),
        encode_first=lambda text: head,
    )
    document = evaluation_documents.Document(3, [BEGIN, 10, 11, 12], 0)
    assert probe.in_prompt(prompt, document.ids) == expected
    asked = []

    def generate(policy: None, prompt: Prompt, store: None, positions: list[Any], how: Any) -> Any:
        asked.extend(positions)
        return [[written([])] for _ in positions]

    monkeypatch.setattr(probe, "generate", generate)
    shared = SimpleNamespace(temperature=1.0, greedy=True)
    run = SimpleNamespace(prompt=prompt, settings=shared, policy=None)
    how = evaluation_passes.Reasoning(
        length=4, positions=2, answers=False, budget=1, samples=1, swap=False, at_once=9, seed=0
    )
    measured = record("-333", "0000", positions=[2, 3])
    evaluation_passes.reason(run, [document], [measured], [100], None, how)
    for position, token in zip(asked, [2, 3, 2, 3], strict=True):
        before = expected.index(document.ids[token])
        assert (position.first, position.limit) == (100, 100 + before)
        assert position.next_position == before


@pytest.mark.usefixtures("single_process_megatron")
def test_log_p_of_the_text_is_of_the_tokens_that_count():
    import torch

    import evaluation_passes
    from megatron_rmt.model.visibility import attach_tree_attention
    from megatron_rmt.rollout.kv_cache import KeyValueStore
    from tests import test_probe
    from tests.tiny_model import build_model, stock_logits

    model = build_model()
    ids = torch.randint(11, 40, (12,), generator=torch.Generator().manual_seed(1))
    ids[7] = test_probe.END  # no text
    log_probs = stock_logits(model, ids).detach().log_softmax(-1)[range(11), ids[1:]]
    attach_tree_attention(model)
    for head in ([], test_probe.HEAD):
        run = test_probe._run(model, test_probe._prompt(head))
        document = evaluation_documents.Document(1, ids.tolist(), first=4)
        how = evaluation_passes.Reasoning(
            length=10,
            positions=0,
            answers=False,
            budget=1,
            samples=1,
            swap=False,
            at_once=1,
            seed=0,
        )
        store = KeyValueStore(10 + len(head))
        found = evaluation_passes.read_document(run, document, None, store, 0, how)
        counted = [token for token, digit in enumerate(found.difficulty) if digit != "-"]
        assert counted == [4, 5, 6, 8, 9]
        expected = sum(float(log_probs[token - 1]) for token in counted)
        assert found.text_log_prob == pytest.approx(expected, rel=1e-6)


def test_positions_are_above_the_lowest_threshold_and_uniform():
    from megatron_rmt.probe import draw_positions

    difficulty = "-0" + "120-3" * 4
    allowed = [index for index, digit in enumerate(difficulty) if digit in "123"]
    counts = np.zeros(len(difficulty))
    for line in range(2000):
        drawn = draw_positions(allowed, 3, 7, line)
        assert len(set(drawn)) == 3
        assert drawn == sorted(drawn)
        counts[drawn] += 1
    assert counts[allowed].sum() == 6000
    # 500 expected; the standard deviation is about 19.
    assert np.abs(counts[allowed] - 500).max() < 100
    assert draw_positions(allowed, 99, 7, 1) == allowed
    assert draw_positions([], 3, 7, 1) == []


class _Bytes:
    """A tokenizer whose tokens are bytes."""

    def tokenize(self, text: str) -> list[int]:
        return list(text.encode())


@pytest.mark.parametrize("problem", ["Was ist 1 + 1?", "Größe?", ""])
def test_solution_only_begins_with_the_first_byte_of_the_solution(tmp_path: Path, problem: str):
    path = write_data(tmp_path / "x.jsonl", [problem + "\n\n2"], problem_chars=len(problem))
    texts = evaluation_documents.read_texts(path, "text", True, None)
    table = [bytes([byte]) for byte in range(256)]
    (document,) = evaluation_documents.tokenize(texts, DocumentTokenizer(_Bytes()), table)
    assert bytes(document.ids[document.first :]) == b"\n\n2"
    assert evaluation_documents.read_texts(path, "text", False, None)[0].problem == 0


@pytest.fixture
def usable(tmp_path: Path) -> list[str]:
    """A command line that has everything but the weights."""
    load = tmp_path / "checkpoint"
    load.mkdir()
    (load / "latest_checkpointed_iteration.txt").write_text("release")
    (load / "model_flags.txt").write_text("--num-layers 1")
    write_data(tmp_path / "heldout.jsonl", ["a text"])
    words = ["--load", str(load), "--data", str(tmp_path / "heldout.jsonl")]
    return [*words, "--output", str(tmp_path / "out.json")]


@pytest.mark.parametrize(
    ("others", "sentence"),
    [
        (["--load", "nowhere"], "--load nowhere is no Megatron checkpoint directory"),
        (["--model-flags", "nowhere"], "nowhere does not exist; pass a file of Megatron's model"),
        (["--data", "nowhere"], "--data nowhere cannot be read: No such file"),
        (["--budget", "0"], "--budget is 0; pass 1 or more"),
        (["--seq-length", "1"], "--seq-length is 1; pass 2 or more"),
        (["--positions-per-document", "-1"], "--positions-per-document is -1; pass 0"),
        (["--rmt-group-size", "8"], "--rmt-group-size belongs to training; pass --samples"),
        (["--rmt-warmup-iters=3"], "--rmt-warmup-iters belongs to training; leave it out"),
        (["--positions-from", "x.json", "--documents", "3"], "--documents is fixed by"),
        (["--positions-from", "nowhere.json"], "nowhere.json cannot be read"),
        (["--output", "/"], "--output / is a directory"),
        (
            ["--json-key", "body"],
            r"--data .*heldout.jsonl:1: no key 'body' among \['text'\]; .*--json-key",
        ),
        (["--solution-only"], "--data .*heldout.jsonl:1: no number problem_chars"),
    ],
)
def test_what_cannot_be_used_is_refused_before_the_model_is_loaded(
    usable: list[str], others: list[str], sentence: str
):
    flags, rest = evaluate.build_parser().parse_known_args([*usable, *others])
    with pytest.raises(ValueError, match=sentence) as caught:
        evaluate.evaluate(flags, rest)
    assert "\n" not in str(caught.value)


def test_a_missing_flag_file_asks_for_model_flags(usable: list[str], tmp_path: Path):
    (tmp_path / "checkpoint/model_flags.txt").unlink()
    flags, rest = evaluate.build_parser().parse_known_args(usable)
    with pytest.raises(ValueError, match=r"model_flags.txt does not exist; pass --model-flags"):
        evaluate.evaluate(flags, rest)


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ('{"text": "a"}\n{"text": \n', "bad.jsonl:2: not valid JSON .Expecting value"),
        ('{"text": 3}\n', "bad.jsonl:1: 'text' is a int, but must be a string"),
        ("[]\n", "bad.jsonl:1: a list, but each line must be a JSON object"),
        ('{"text": "half \\ud83d"}\n', "bad.jsonl:1: 'text' holds half of a surrogate pair"),
        ('{"text": "a"}\n' + "[" * 100_000, "bad.jsonl:2: brackets are nested too deeply"),
        ('{"text": "a"}\r{"text": 1}\r', "bad.jsonl:2: 'text' is a int"),
        (" \n", "holds no document"),
    ],
)
def test_data_that_cannot_be_read_is_named_by_line(tmp_path: Path, lines: str, sentence: str):
    path = tmp_path / "bad.jsonl"
    path.write_text(lines)
    with pytest.raises(ValueError, match=sentence):
        evaluation_documents.read_texts(path, "text", False, None)


def test_documents_are_read_as_preprocessing_reads_them(tmp_path: Path):
    """Special tokens that a text spells out are text, and a mark or gzip is no matter."""
    byte_level_bpe().save_pretrained(tmp_path / "tokenizer")
    path = tmp_path / "heldout.jsonl"
    path.write_bytes(
        gzip.compress(codecs.BOM_UTF8 + b'{"text": "x <|endoftext|> y"}\n\n{"text": "two"}\n')
    )
    texts = evaluation_documents.read_texts(path, "text", False, None)
    assert [text.line for text in texts] == [1, 3]
    tokenizer = DocumentTokenizer(load_tokenizer(str(tmp_path / "tokenizer")))
    documents = evaluation_documents.tokenize(texts, tokenizer, [b"?"] * 500)
    assert byte_level_bpe().decode(documents[0].ids) == "x <|endoftext|> y"
    assert 0 not in documents[0].ids
    assert f"{path}:1: they are plain text here" in tokenizer.report()


def test_another_document_on_the_line_is_refused():
    documents = [evaluation_documents.Document(4, [1, 2, 3], 0, file="a")]
    earlier = evaluation.Measured(settings(), [record("-3", "01", line=4, id=documents[0].digest)])
    assert (
        evaluation_documents.documents_of(earlier, Path("b.json"), documents)[0][0] is documents[0]
    )
    changed = [evaluation_documents.Document(4, [1, 2, 4], 0, file="a")]
    with pytest.raises(ValueError, match=r"line 4, is not the document that b.json was measured"):
        evaluation_documents.documents_of(earlier, Path("b.json"), changed)

"""The generated mathematics is right, new where it must be, and the same each time."""

import datetime
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from random import Random

import pytest

TOOLS = Path(__file__).parent.parent / "tools"
sys.path.insert(0, str(TOOLS))

import generate_corpus  # noqa: E402

SEEDS = range(150)

NUMBER = r"\d+(?:\.\d+)?"
TERM = rf"[(-]*{NUMBER}\)*"
EXPRESSION = rf"{TERM}(?: ?(?:\*\*|[-+*/]) ?{TERM})*"
# A chain such as "2 * 3 + 1 = 6 + 1 = 7".
CHAIN = re.compile(rf"(?<![\w.]){EXPRESSION}(?: = {EXPRESSION})+(?!\d)")


def value(expression: str) -> Fraction:
    """An arithmetic expression, exactly."""
    return Fraction(eval(re.sub(NUMBER, r"Fraction('\g<0>')", expression)))


def plain(text: str) -> str:
    return text.replace("×", "*").replace("^", "**").replace("$", "")  # noqa: RUF001


def numbers_of(question: str) -> list[Fraction]:
    return [Fraction(number) for number in re.findall(NUMBER, question)]


def money(amount: Fraction) -> str:
    return f"${amount}" if amount.denominator == 1 else f"${float(amount):.2f}"


def addition_with_carries(question: str) -> str:
    return str(sum(numbers_of(question)))


def long_division(question: str) -> str:
    quotient, remainder = divmod(*map(int, numbers_of(question)))
    return f"{quotient} remainder {remainder}"


def sum_of_fractions(question: str) -> str:
    a, b, c, d = numbers_of(question)
    return str(a / b + c / d)


def linear_equation(question: str) -> str:
    left, c, right, e = map(int, numbers_of(question))
    (x,) = (x for x in range(-200, 201) if left * x + c == right * x + e)
    return f"x = {x}"


def discount_and_tax(question: str) -> str:
    price, discount, tax = numbers_of(question)
    return money(price * (1 - discount / 100) * (1 + tax / 100))


def arithmetic_sequence(question: str) -> str:
    first, step, count = map(int, numbers_of(question))
    terms = list(range(first, first + step * count, step))
    return f"{terms[-1]} and {sum(terms)}"


def greatest_common_divisor(question: str) -> str:
    a, b = map(int, numbers_of(question))
    return str(max(d for d in range(1, min(a, b) + 1) if a % d == 0 and b % d == 0))


def shopping_and_change(question: str) -> str:
    count, price, other_count, other_price, paid = numbers_of(question)
    return money(paid - count * price - other_count * other_price)


def path_around_a_garden(question: str) -> str:
    length, width, border = numbers_of(question)
    return f"{2 * border * (length + width) + 4 * border**2} square metres"


def drawing_without_replacement(question: str) -> str:
    first, second = map(int, numbers_of(question))
    pairs = list(itertools.combinations([0] * first + [1] * second, 2))
    return str(Fraction(pairs.count((0, 1)), len(pairs)))


def ages(question: str) -> str:
    years, total = map(int, numbers_of(question))
    words = ["twice", "three times", "four times", "five times", "six times"]
    factor = next(n for n, word in enumerate(words, start=2) if f" {word} " in question)
    solutions = [age for age in range(120) if age + years + factor * age + years == total]
    assert len(solutions) == 1
    return f"{solutions[0]} and {factor * solutions[0]}"


def time_of_arrival(question: str) -> str:
    hour, minute, travel, waiting = map(int, numbers_of(question))
    end = datetime.datetime(2000, 1, 1, hour, minute) + datetime.timedelta(minutes=travel + waiting)
    return f"{end.hour}:{end.minute:02d}"


# The answer to each kind of question, from its text alone and by another way than the generator's.
ANSWERS: dict[str, Callable[[str], str]] = {
    function.__name__: function
    for function in (
        addition_with_carries,
        long_division,
        sum_of_fractions,
        linear_equation,
        discount_and_tax,
        arithmetic_sequence,
        greatest_common_divisor,
        shopping_and_change,
        path_around_a_garden,
        drawing_without_replacement,
        ages,
        time_of_arrival,
    )
}


def test_every_kind_has_an_independent_answer_here() -> None:
    assert set(ANSWERS) == set(generate_corpus.KINDS)


@pytest.mark.parametrize("name", generate_corpus.KINDS)
def test_answer_follows_from_the_question_alone(name: str) -> None:
    for seed in SEEDS:
        problem = generate_corpus.KINDS[name].draw(Random(seed))
        assert problem.answer == ANSWERS[name](problem.question), problem.text


def equations(problem: generate_corpus.Problem) -> list[str]:
    """Every equation of the solution, with the first number of the answer in the place of x."""
    number = re.search(r"-?\d+", problem.answer)
    assert number is not None
    solution = re.sub(r"(?<=\d)x\b", " * x", plain("\n".join(problem.steps)))
    solution = re.sub(r"\bx\b", f"({number[0]})", solution)
    assert "=" not in CHAIN.sub("", solution), f"an equation went unread:\n{solution}"
    return CHAIN.findall(solution)


def holds(equation: str) -> bool:
    return len({value(side) for side in equation.split(" = ")}) == 1


@pytest.mark.parametrize("name", generate_corpus.KINDS)
def test_every_written_equation_holds(name: str) -> None:
    for seed in SEEDS:
        problem = generate_corpus.KINDS[name].draw(Random(seed))
        assert equations(problem), problem.text
        for equation in equations(problem):
            assert holds(equation), f"{equation}\n{problem.text}"


def test_wrong_step_would_be_noticed() -> None:
    steps = ["So 3x + 1 = 7 and 2 + 3 = 6.", "Hence 3x = 12 - 6 = 5, at 2^2 - 2 - 4 = -2."]
    found = equations(generate_corpus.Problem("", steps, "x = 2"))
    assert [holds(equation) for equation in found] == [True, False, False, True]
    with pytest.raises(AssertionError, match="went unread"):
        equations(generate_corpus.Problem("", ["The sum = 5."], "5"))
    assert value("2 + 3 * (4 - 6)/3") == 0
    assert value("1.10 * 3") == Fraction(33, 10)


@pytest.mark.parametrize("name", generate_corpus.KINDS)
def test_all_wordings_of_a_problem_name_the_same_numbers(name: str) -> None:
    kind = generate_corpus.KINDS[name]
    assert len(kind.ask) > 1
    for seed in SEEDS:
        wordings = [replace(kind, ask=[wording]).draw(Random(seed)) for wording in kind.ask]
        assert len({wording.question for wording in wordings}) == len(kind.ask)
        assert len({tuple(numbers_of(wording.question)) for wording in wordings}) == 1


@pytest.mark.parametrize("name", generate_corpus.KINDS)
def test_text_is_filled_in_and_counts_in_the_plural(name: str) -> None:
    for seed in SEEDS:
        text = generate_corpus.KINDS[name].draw(Random(seed)).text
        assert not re.search(r"[{}\[\]|]|  ", text), text
        assert not re.search(r"(?<![\d./:])1 [a-z]+s\b", text), text


def test_expressions_of_the_table_are_exact() -> None:
    assert generate_corpus.evaluate("1/3 + price", {"price": Fraction(1, 10)}) == Fraction(13, 30)
    values = {"cost": Fraction(7, 2), "x": Fraction(-3)}
    template = "[double: 2 * cost], [cost + x], [x - cost * x ** 3], {double / 3}, {double:03.0f}"
    expected = "2 * 3.50 = 7, 3.50 + (-3) = 0.50, -3 - 3.50 * (-3) ** 3 = 91.50, 7/3, 007"
    assert plain(generate_corpus.fill(template, values)) == expected


def test_entry_that_names_a_part_wrongly_or_leaves_one_out_is_refused() -> None:
    table = "doubling\n  given   a from 1..40\n  ask     Double {a}.\n  step    [2 * a]\n"
    with pytest.raises(TypeError, match="unexpected keyword argument 'answers'"):
        generate_corpus.read_kinds(f"{table}  answers {{2 * a}}")
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'answer'"):
        generate_corpus.read_kinds(table)


@pytest.mark.parametrize("name", generate_corpus.KINDS)
def test_last_step_leads_to_the_answer(name: str) -> None:
    for seed in SEEDS:
        problem = generate_corpus.KINDS[name].draw(Random(seed))
        written = " ".join(problem.steps)
        for part in re.findall(r"\d+(?:[./]\d+)?", problem.answer):
            # The minutes of a time of day have two digits.
            assert re.search(rf"(?<!\d)0*{part.lstrip('0') or '0'}(?!\d)", written), problem.text


def read(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_documents_are_problem_blank_line_solution(tmp_path: Path) -> None:
    generate_corpus.generate(tmp_path, 60, 5, seed=3)
    for row in read(tmp_path / "train.jsonl"):
        text, length = str(row["text"]), int(str(row["problem_chars"]))
        assert text[length : length + 2] == "\n\n"
        assert "\n" not in text[:length]
        assert "Answer: " in text[length + 2 :].split("\n")[-1]


def test_same_arguments_give_the_same_bytes_also_in_another_process(tmp_path: Path) -> None:
    generate_corpus.generate(tmp_path / "one", 300, 40, seed=7)
    command = [sys.executable, str(TOOLS / "generate_corpus.py"), "--output", str(tmp_path / "two")]
    command += ["--train-documents", "300", "--heldout-documents", "40", "--seed", "7"]
    subprocess.run(command, check=True, capture_output=True)
    generate_corpus.generate(tmp_path / "other", 300, 40, seed=8)
    for file in ("train.jsonl", "heldout.jsonl"):
        one, two, other = ((tmp_path / d / file).read_bytes() for d in ("one", "two", "other"))
        assert one == two
        assert one != other


def test_no_problem_occurs_twice_even_in_other_words(tmp_path: Path) -> None:
    generate_corpus.generate(tmp_path, 3000, 300, seed=1)
    train, heldout = read(tmp_path / "train.jsonl"), read(tmp_path / "heldout.jsonl")
    assert (len(train), len(heldout)) == (3000, 300)

    def told_apart_by(row: dict[str, object]) -> tuple[object, ...]:
        # The steps of two problems of one kind with the same numbers have the same numbers.
        solution = str(row["text"])[int(str(row["problem_chars"])) :]
        question = str(row["text"])[: int(str(row["problem_chars"]))]
        return (*re.findall(r"\d+", question), None, *re.findall(r"\d+", solution))

    identities = [told_apart_by(row) for row in train + heldout]
    assert len(set(identities)) == 3300


def test_every_kind_occurs_about_equally_often() -> None:
    taken: set[tuple[str, ...]] = set()
    list(generate_corpus.draw_problems(3000, 1, "train", taken))
    counts = [sum(identity[0] == name for identity in taken) for name in generate_corpus.KINDS]
    assert len(counts) >= 12
    assert min(counts) > 200
    assert max(counts) < 300


def test_heldout_and_the_beginning_of_train_do_not_depend_on_the_size_of_train(
    tmp_path: Path,
) -> None:
    generate_corpus.generate(tmp_path / "small", 50, 20, seed=1)
    generate_corpus.generate(tmp_path / "large", 200, 20, seed=1)
    small, large = tmp_path / "small", tmp_path / "large"
    assert (small / "heldout.jsonl").read_bytes() == (large / "heldout.jsonl").read_bytes()
    assert read(small / "train.jsonl") == read(large / "train.jsonl")[:50]


def test_running_out_of_problems_and_bad_counts_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match="--train-documents is 0; it must be 1 or more"):
        generate_corpus.main(["--output", str(tmp_path), "--train-documents", "0"])
    monkeypatch.setattr(generate_corpus, "MOST_ATTEMPTS", 300)
    doubling = "doubling\n  given a from 1..40\n  ask Double {a}.\n  step [2 * a]\n  answer {2 * a}"
    monkeypatch.setattr(generate_corpus, "KINDS", generate_corpus.read_kinds(doubling))
    with pytest.raises(ValueError, match="ask for fewer documents"):
        generate_corpus.generate(tmp_path / "out", 5000, 5, seed=1)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["heldout.jsonl"]

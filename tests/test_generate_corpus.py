"""The generated mathematics is right, new where it must be, and the same each time."""

import datetime
import itertools
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
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
# A chain such as "2 * 3 + 1 = 6 + 1 = 7" that is not the tail of a formula with x in it.
CHAIN = re.compile(rf"(?<![\w.])(?<!x [-+] ){EXPRESSION}(?: = {EXPRESSION})+(?![\dx])")


def value(expression: str) -> Fraction:
    """An arithmetic expression, exactly."""
    return Fraction(eval(re.sub(NUMBER, r"Fraction('\g<0>')", expression)))


def plain(text: str) -> str:
    return text.replace("×", "*").replace("^", "**").replace("$", "")  # noqa: RUF001


def numbers_of(question: str) -> list[Fraction]:
    return [Fraction(number) for number in re.findall(NUMBER, question)]


def money(amount: Fraction) -> str:
    return f"${amount}" if amount.denominator == 1 else f"${float(amount):.2f}"


def roots(equation: str) -> list[int]:
    """All whole numbers from -200 to 200 that satisfy an equation in x, by trying them."""
    equation = re.sub(r"(\d)x", r"\1*x", equation.replace("^", "**")).replace("=", "==")
    return [x for x in range(-200, 201) if eval(equation, {"x": x})]


def equation_in(question: str) -> str:
    match = re.search(r"[\dx][^.,?a-wyz]*= -?[\dx][-+ \dx]*", question)
    assert match is not None
    return match[0]


def sum_of_fractions(question: str) -> str:
    a, b, c, d = numbers_of(question)
    minus = " - " in question or "pours out" in question
    return str(a / b - c / d if minus else a / b + c / d)


def product_of_fractions(question: str) -> str:
    a, b, c, d = numbers_of(question)
    divide = "Divide" in question or "portions" in question
    return str(a / b / (c / d) if divide else a / b * (c / d))


def discount_and_tax(question: str) -> str:
    price, discount, tax = numbers_of(question)
    return money(price * (1 - discount / 100) * (1 + tax / 100))


def arithmetic_sequence(question: str) -> str:
    first, step, count = map(int, numbers_of(question))
    terms = list(range(first, first + step * count, step))
    return f"{terms[-1]} and {sum(terms)}"


def geometric_sequence(question: str) -> str:
    first, ratio, count = map(int, numbers_of(question))
    terms = [first]
    while len(terms) < count:
        terms.append(terms[-1] * ratio)
    return str(sum(terms))


def greatest_common_divisor(question: str) -> str:
    a, b = map(int, numbers_of(question))
    return str(max(d for d in range(1, min(a, b) + 1) if a % d == 0 and b % d == 0))


def two_legs_of_a_journey(question: str) -> str:
    way, speed, other_way, other_speed = numbers_of(question)
    return f"{(way + other_way) / (way / speed + other_way / other_speed)} km/h"


def working_together(question: str) -> str:
    a, b = numbers_of(question)
    return f"{a * b / (a + b)} hours"


def recipe_in_proportion(question: str) -> str:
    portion, grams, guests, bag = numbers_of(question)
    bags = 0
    while bags * bag < grams / portion * guests:
        bags += 1
    return str(bags)


def shopping_and_change(question: str) -> str:
    count, price, other_count, other_price, paid = numbers_of(question)
    return money(paid - count * price - other_count * other_price)


def path_around_a_garden(question: str) -> str:
    length, width, border = numbers_of(question)
    return f"{2 * border * (length + width) + 4 * border**2} square metres"


def area_of_a_trapezium(question: str) -> str:
    short, long, height = numbers_of(question)
    unit = "square centimetres" if " cm" in question else "square metres"
    return f"{float(short * height + (long - short) * height / 2):g} {unit}"


def drawing_without_replacement(question: str) -> str:
    first, second = map(int, numbers_of(question))
    pairs = list(itertools.combinations([0] * first + [1] * second, 2))
    wanted = (0, 0) if "both" in question else (0, 1)
    return str(Fraction(pairs.count(wanted), len(pairs)))


def number_in_another_base(question: str) -> str:
    number, base = map(int, numbers_of(question))
    return next(
        digits
        for size in itertools.count(1)
        for digits in map("".join, itertools.product("0123456789"[:base], repeat=size))
        if digits[0] != "0" and int(digits, base) == number
    )


def missing_value_of_an_average(question: str) -> str:
    *known, average = numbers_of(question)
    return next(str(m) for m in range(200) if (sum(known) + m) / (len(known) + 1) == average)


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


def number_of_divisors(question: str) -> str:
    (number,) = map(int, numbers_of(question))
    return str(sum(number % divisor == 0 for divisor in range(1, number + 1)))


def compound_interest(question: str) -> str:
    capital, rate, years = numbers_of(question)
    return money(capital * (1 + rate / 100) ** int(years))


def day_of_the_week(question: str) -> str:
    (days,) = map(int, numbers_of(question))
    start = datetime.date(2000, 1, 1)
    while f"{start:%A}" not in question:
        start += datetime.timedelta(days=1)
    direction = -1 if "ago" in question else 1
    return f"{start + direction * datetime.timedelta(days=days):%A}"


def quadratic_equation(question: str) -> str:
    one, two = roots(equation_in(question))
    return f"x = {one} or x = {two}"


def linear_equation(question: str) -> str:
    (x,) = roots(equation_in(question))
    return f"x = {x}"


def right_triangle(question: str) -> str:
    a, b = map(int, numbers_of(question))
    legs = "legs" in question or "sails" in question
    square = a * a + b * b if legs else a * a - b * b
    root = math.isqrt(square)
    assert root * root == square
    return str(root)


def order_of_operations(question: str) -> str:
    match = re.search(r"\d[^.?,]*\d", question)
    assert match is not None
    return str(value(plain(match[0])))


def last_digit_of_a_power(question: str) -> str:
    base, exponent = map(int, numbers_of(question))
    return str(base**exponent)[-1]


def counting_choices(question: str) -> str:
    group, others = map(int, numbers_of(question))
    size = 3 if " three " in question else 2
    return str(len(list(itertools.combinations(range(group), size))) * others)


def of_two_numbers(solve: Callable[[int, int], object]) -> Callable[[str], str]:
    return lambda question: str(solve(*map(int, numbers_of(question))))


# The answer to each kind of question, from its text alone and by another way than the generator's.
ANSWERS: dict[str, Callable[[str], str]] = {
    "addition_with_carries": of_two_numbers(lambda a, b: a + b),
    "subtraction_with_borrowing": of_two_numbers(lambda a, b: a - b),
    "multiplication_by_parts": of_two_numbers(lambda a, b: a * b),
    "long_division": of_two_numbers(lambda a, b: f"{a // b} remainder {a % b}"),
} | {
    function.__name__: function
    for function in (
        sum_of_fractions,
        product_of_fractions,
        linear_equation,
        discount_and_tax,
        arithmetic_sequence,
        geometric_sequence,
        greatest_common_divisor,
        two_legs_of_a_journey,
        working_together,
        recipe_in_proportion,
        shopping_and_change,
        path_around_a_garden,
        area_of_a_trapezium,
        drawing_without_replacement,
        number_in_another_base,
        missing_value_of_an_average,
        ages,
        time_of_arrival,
        number_of_divisors,
        compound_interest,
        day_of_the_week,
        quadratic_equation,
        right_triangle,
        order_of_operations,
        last_digit_of_a_power,
        counting_choices,
    )
}


def test_every_kind_has_an_independent_answer_here() -> None:
    assert set(ANSWERS) == set(generate_corpus.KINDS)


@pytest.mark.parametrize("name", generate_corpus.KINDS)
def test_answer_follows_from_the_question_alone(name: str) -> None:
    for seed in SEEDS:
        problem = generate_corpus.KINDS[name](Random(seed))
        assert problem.answer == ANSWERS[name](problem.question), problem.text


@pytest.mark.parametrize("name", generate_corpus.KINDS)
def test_every_written_equation_holds(name: str) -> None:
    for seed in SEEDS:
        problem = generate_corpus.KINDS[name](Random(seed))
        solution = plain("\n".join(problem.steps))
        chains = CHAIN.findall(solution)
        assert chains, problem.text
        for chain in chains:
            values = {value(side) for side in chain.split(" = ")}
            assert len(values) == 1, f"{chain}\n{problem.text}"
        # Nothing with an equals sign went unread, except equations in x.
        for line in CHAIN.sub("", solution).split("\n"):
            assert "=" not in line or "x" in line, f"{line}\n{problem.text}"


def test_wrong_step_would_be_noticed() -> None:
    assert CHAIN.findall("so x + 3 = 7 and 2 + 3 = 6.") == ["2 + 3 = 6"]
    assert CHAIN.findall("3x = 12 - 6 = 5") == ["12 - 6 = 5"]
    assert value("2 + 3 * (4 - 6)/3") == 0
    assert value("1.10 * 3") == Fraction(33, 10)


@pytest.mark.parametrize("name", generate_corpus.KINDS)
def test_last_step_leads_to_the_answer(name: str) -> None:
    for seed in SEEDS:
        problem = generate_corpus.KINDS[name](Random(seed))
        written = " ".join(problem.steps)
        if name == "day_of_the_week":
            written += problem.question
        for part in re.findall(r"\d+(?:[./]\d+)?|\w+day", problem.answer):
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
    assert min(counts) > 50
    assert max(counts) < 200


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
    right_triangle = generate_corpus.KINDS["right_triangle"]
    monkeypatch.setattr(generate_corpus, "KINDS", {"right_triangle": right_triangle})
    with pytest.raises(ValueError, match="ask for fewer documents"):
        generate_corpus.generate(tmp_path / "out", 5000, 5, seed=1)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["heldout.jsonl"]

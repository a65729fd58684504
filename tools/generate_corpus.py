# ruff: noqa: RUF001 (the multiplication sign is meant)
"""Write a corpus of worked elementary mathematics, correct by construction.

    python tools/generate_corpus.py --output data --train-documents 4000 --heldout-documents 200 \\
        --seed 1

writes ``data/train.jsonl`` and ``data/heldout.jsonl``. Each line has ``text`` (the problem, a blank
line, the worked solution) and ``problem_chars`` (the length of the problem, so that the problem is
``text[:problem_chars]`` and the solution ``text[problem_chars + 2:]``). The last line of a solution
is ``Answer: ...``.

Every number in a solution is computed, every step is written out as a textbook would, and so the
next token of a solution is often one that can be reasoned out: what next-token reasoning needs.
Wording and order of drawing come from the seed alone: the same arguments give the same bytes.
No two documents pose the same problem, where two problems of one kind are the same if they have the
same numbers, whatever the story told around them; so the held-out problems are new.

To add a kind of problem, add an entry to ``TABLE`` and its answer to tests/test_generate_corpus.py.
"""

import argparse
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path
from random import Random
from types import CodeType
from typing import Any

# An entry is the name of a kind and its parts, each continued on lines that are indented further:
#   given   draws quantities and words "from" a range or sequence, or computes them with "=";
#           name, they (she or he), other (another person) and things come of themselves
#   where   a condition on these: as long as it does not hold, they are drawn again
#   ask     a wording of the question; all of a kind name the numbers in the same order
#   step    a line of the solution; " | " separates wordings; or a function of REPEATED_STEPS
# {price} is a quantity or an expression, {price:02.0f} formats it as Python does, and
# [cost: count * price] is arithmetic on show: "3 * 15 = 45" in type, and from there on cost is 45.
TABLE = """
addition_with_carries
  given   a, b from 145..9899
  ask     Compute {a} + {b}.
  ask     Find the sum of {a} and {b}, showing each carry.
  ask     A shop sold {a} {things} in spring and {b} in summer. How many was that together?
  ask     {name} has packed {a} {things} and must still pack {b}. How many {things} is that in all?
  step    Add column by column from the right. | Start with the ones and carry.
  step    add_columns
  step    Therefore [sum: a + b].
  answer  {sum}

long_division
  given   a from 400..9999; b from 3..29; quotient = a // b; rest = a % b
  where   quotient > 40
  ask     Divide {a} by {b} and give quotient and remainder.
  ask     {a} {things} are put into boxes of {b}. How many boxes are filled, and how many remain?
  ask     {name} shares {a} {things} among {b} classes. How many does each get, and how many remain?
  step    Use long division of {a} by {b}, one digit after another.
  step    divide_digits
  step    The quotient is {quotient} and the remainder is {rest}.
  step    Check: [quotient * b + rest].
  answer  {quotient} remainder {rest}

sum_of_fractions
  given   b, d from 4..24; a, c from 1..23; common = lcm(b, d); k = common / b; m = common / d
  where   a < b and c < d and gcd(a, b) == gcd(c, d) == 1 and k > 1 and m > 1
  ask     Calculate {a}/{b} + {c}/{d}.
  ask     Simplify {a}/{b} + {c}/{d} fully.
  ask     {name} walks {a}/{b} of a mile and then another {c}/{d} of a mile. How far is that?
  step    The denominators are {b} and {d}; their least common multiple is {common}.
  step    In {a}/{b}, multiply above and below by {k}: [p: a * k] and [b * k].
  step    In {c}/{d}, multiply above and below by {m}: [q: c * m] and [d * m].
  step    Add the numerators: [top: p + q], so the sum is {top}/{common}.
  step    {reduced(top, common)}
  answer  {str(top / common)}

linear_equation
  given   x from -15..15; right, more from 2..9; left = right + more; c from 2..60; e = more * x + c
  where   abs(x) > 1 and e > 0
  ask     Solve the equation {left}x + {c} = {right}x + {e}.
  ask     Find x if {left}x + {c} = {right}x + {e}.
  ask     For which number x does {left}x + {c} = {right}x + {e} hold?
  step    Subtract {right}x from both sides: {more}x + {c} = {e}.
  step    Subtract {c} from both sides: {more}x = [rest: e - c].
  step    Divide by {more}: x = [rest/more].
  step    Check: the left side is [left * x + c] and the right side is [right * x + e].
  answer  x = {x}

discount_and_tax
  given   item from "bicycle", "lamp", "coat", "desk", "guitar", "tent", "camera", "chair"
  given   price from 20..800; discount from 5, 10, 15, 20, 25, 30, 40; tax from 4, 5, 6, 8, 10, 20
  where   price % 5 == 0 and price * (100 - discount) * tax % 100 == 0
  ask     A {item} costs ${price}. In a sale the price is cut by {discount}%, and then {tax}% tax
          is added. What is the final price?
  ask     {name} wants a {item} marked ${price}. With a coupon {they} gets {discount}% off;
          afterwards the till adds {tax}% tax. How much does {they} pay?
  step    The discount is {discount}% of ${price}: [off: price * discount/100], that is ${off}.
  step    The reduced price in dollars is [net: price - off].
  step    The tax is {tax}% of ${net}: [extra: net * tax/100], that is ${extra}.
  step    The final price in dollars is [total: net + extra].
  answer  ${total}

arithmetic_sequence
  given   first from 2..60; step from 3..19; count from 8..45
  ask     A sequence starts at {first} and grows by {step}. Find term {count} and the sum up to it.
  ask     {name} saves ${first} in the first week and ${step} more in each week than in the week
          before. How much does {they} save in week {count}, and how much altogether by then?
  ask     The first row of a theatre has {first} seats, each further row {step} more than the one in
          front. There are {count} rows. How many seats are in the last row, and how many in all?
  step    From number 1 to number {count} there are [gaps: count - 1] steps of {step}.
  step    They add up to [growth: gaps * step], so the last one is [last: first + growth].
  step    Pair first and last, second and last but one, and so on: each gives [pair: first + last].
  step    {count} terms make {count}/2 pairs, and so the sum is [total: count * pair/2].
  answer  {last} and {total}

greatest_common_divisor
  given   factor from 2..48; m, n from 5..60; a = factor * m; b = factor * n; most = gcd(a, b)
  where   a > b and a % b != 0
  ask     Find the greatest common divisor of {a} and {b} with Euclid's algorithm.
  ask     What is the largest number that divides both {a} and {b}?
  ask     A floor of {a} cm by {b} cm is to be covered with equal square tiles without cutting. How
          long can the side of a tile be at most, in cm?
  step    Divide the larger number by the smaller and go on with the remainder.
  step    euclid
  step    The remainder is 0, so the last divisor, {most}, is the greatest common divisor.
  step    Indeed [a/most] and [b/most].
  answer  {most}

shopping_and_change
  given   one, two from GOODS; m, n from 2..12; u, v from 5..99; p = u / 20; q = v / 20
  given   paid = min(note for note in (10, 20, 50, 100, 200) if note > m * p + n * q)
  where   one != two
  ask     {name} buys {m} {one} at ${p} each and {n} {two} at ${q} each, and pays with ${paid}. How
          much change does {they} get?
  ask     At the market {name} takes {m} {one} for ${p} apiece and {n} {two} for ${q} apiece. How
          much is left of ${paid}?
  step    In dollars, the {one} cost [first: m * p] and the {two} cost [second: n * q].
  step    Together that is [cost: first + second].
  step    From ${paid} there remains [change: paid - cost].
  answer  ${change}

path_around_a_garden
  given   place from "garden", "pool", "lawn"; b from 5..40; w from 1..25; a = b + w; path from 1..5
  ask     A rectangular {place} is {a} m long and {b} m wide. A path {path} m wide runs all around
          it on the outside. What is the area of the path in square metres?
  ask     Around a {place} of {a} m by {b} m lies a paved strip that is {path} m wide everywhere,
          with square corners. How many square metres are paved?
  step    The path is the outer rectangle without the inner one. It adds its width on both sides.
  step    Outer length: [long: a + 2 * path] m. Outer width: [wide: b + 2 * path] m.
  step    Outer area: [outer: long * wide] square metres. Inner area: [inner: a * b] square metres.
  step    The path covers [area: outer - inner] square metres.
  answer  {area} square metres

drawing_without_replacement
  given   pieces from "balls", "marbles", "beads"; one, two from COLOURS; m, n from 2..40
  where   one != two
  ask     A bag contains {m} {one} and {n} {two} {pieces}. Two are drawn at random without
          replacement. What is the probability that they have different colours?
  ask     {name} has {m} {one} {pieces} and {n} {two} ones in a drawer and takes out two of them
          blindly. How likely is it that they have different colours?
  step    There are [all: m + n] {pieces} and so [pairs: all * (all - 1)] ordered pairs of them.
  step    First {one}, then {two}: [m * n] pairs. First {two}, then {one}: [way: n * m] pairs.
  step    Either order will do, so add: [wanted: way + way].
  step    The probability is {wanted}/{pairs}. {reduced(wanted, pairs)}
  answer  {str(wanted / pairs)}

ages
  given   factor from 2..6; years from 2..30; age from 3..16; parts = factor + 1
  given   both = age * parts; later = 2 * years; total = both + later
  ask     {other} is {TIMES[factor]} as old as {name}. In {years} years their ages will add up to
          {total}. How old are {name} and {other} now?
  ask     Today the age of {other} is {TIMES[factor]} that of {name}. After {years} more years the
          two ages together make {total}. Find the present ages of {name} and {other}.
  step    Let x be the present age of {name}; then {other} is {factor}x years old.
  step    In {years} years both are older by {years}: x + {years} + {factor}x + {years} = {total}.
  step    Collect terms: {parts}x + {later} = {total}, so {parts}x = [total - later].
  step    Hence x = [both/parts], and {other} is [old: factor * age].
  step    Check: [age + years + old + years].
  answer  {age} and {old}

time_of_arrival
  given   hour from 5..16; minute from 0..59; travel from 65..299; waiting from 11..75
  given   full = (60 * hour + minute + travel + waiting) // 60
  ask     {name} leaves at {hour}:{minute:02.0f}, travels for {travel} minutes and has to wait
          {waiting} minutes on the way. At what time does {they} arrive?
  ask     A concert begins at {hour}:{minute:02.0f}. It has {travel} minutes of music and breaks of
          {waiting} minutes altogether. When does it end?
  step    Altogether [passed: travel + waiting] minutes pass.
  step    In minutes since midnight: from [start: 60 * hour + minute] to [end: start + passed].
  step    At {full}:00 it is [whole: 60 * full], so the minutes after that are [rest: end - whole].
  answer  {full}:{rest:02.0f}
"""

Values = dict[str, Fraction | str]
PEOPLE = {
    **dict.fromkeys(("Amara", "Chiara", "Elif", "Grace", "Ines", "Keiko", "Mina", "Olga"), "she"),
    **dict.fromkeys(("Ben", "Daniel", "Farid", "Hugo", "Jonas", "Liam", "Nikhil", "Pedro"), "he"),
}
THINGS = ("bricks", "stamps", "tickets", "seeds", "bottles", "leaflets", "tiles", "shells")


def reduced(top: Fraction, bottom: Fraction) -> str:
    """The sentence that brings the fraction ``top/bottom`` to lowest terms."""
    divisor = math.gcd(int(top), int(bottom))
    if divisor == 1:
        return f"Since {top} and {bottom} have no common factor, this cannot be reduced."
    return f"Both {top} and {bottom} are divisible by {divisor}: {top}/{bottom} = {top / bottom}."


# What the expressions of the table may name, beside quantities and what Python has.
NAMES = {
    "COLOURS": ("red", "blue", "green", "yellow", "white", "black", "orange", "purple"),
    "Fraction": Fraction,
    "GOODS": ("notebooks", "pencils", "candles", "apples", "mugs", "posters", "plants", "books"),
    "TIMES": {2: "twice", 3: "three times", 4: "four times", 5: "five times", 6: "six times"},
    "gcd": lambda a, b: Fraction(math.gcd(int(a), int(b))),
    "lcm": lambda a, b: Fraction(math.lcm(int(a), int(b))),
    "reduced": reduced,
    "whole_numbers": lambda first, last: range(int(first), int(last) + 1),
}


def add_columns(values: Values) -> Iterator[str]:
    """The columns of ``a + b``, from the ones on."""
    a, b, carry = int(values["a"]), int(values["b"]), 0
    places = ("Ones", "Tens", "Hundreds", "Thousands")
    for power, place in enumerate(places[: len(str(max(a, b)))]):
        digits = [a // 10**power % 10, b // 10**power % 10] + ([carry] if carry else [])
        carry, digit = divmod(sum(digits), 10)
        line = f"{place}: [{' + '.join(map(str, digits))}], so write {digit}"
        yield line + (" and carry 1." if carry else ".")
    if carry:
        yield "The last carry is written in front as a 1."


def divide_digits(values: Values) -> Iterator[str]:
    """Long division of ``a`` by ``b``, from the first digits of ``a`` that hold ``b``."""
    b, rest, begun = int(values["b"]), 0, False
    for digit in str(values["a"]):
        rest = 10 * rest + int(digit)
        times = rest // b
        begun = begun or times > 0
        if begun:
            yield f"{b} into {rest}: [{times} * {b}], which leaves [{rest} - {times * b}]."
            rest -= times * b


def euclid(values: Values) -> Iterator[str]:
    """Euclid's algorithm on ``a`` and ``b``."""
    a, b = int(values["a"]), int(values["b"])
    while b:
        yield f"Divided by {b}, {a} leaves [{a} - {a // b} * {b}]."
        a, b = b, a % b


REPEATED_STEPS = {step.__name__: step for step in (add_columns, divide_digits, euclid)}
FIELD = re.compile(r"\{(?P<said>[^:}]+):?(?P<form>[^}]*)\}|\[((?P<name>\w+): )?(?P<shown>[^]]+)\]")


@cache
def compiled(expression: str) -> CodeType:
    """An expression of the table as code that is exact: its whole numbers are fractions too."""
    expression = re.sub(r"(-?\d+)\.\.(\d+)", r"whole_numbers(\1, \2)", expression)
    return compile(re.sub(r"\b\d+\b", r"Fraction(\g<0>)", expression), "TABLE", "eval")


def evaluate(expression: str, values: Values) -> Any:
    """What an expression of the table comes to."""
    return eval(compiled(expression), {**NAMES, **values})


def written(value: Fraction | str) -> str:
    """A word, a whole number, an amount of money (``3.50``), or else a fraction (``2/3``)."""
    decimal = isinstance(value, Fraction) and value % 1 and value * 100 % 1 == 0
    return f"{value:.2f}" if decimal else str(value)


def fill(template: str, values: Values) -> str:
    """``template`` with its fields filled in; quantities that it names are added to ``values``."""

    def operand(quantity: re.Match[str]) -> str:
        text = written(values[quantity[0]])
        return f"({text})" if text.startswith("-") and quantity.start() > 0 else text

    def fill_field(field: re.Match[str]) -> str:
        value = evaluate(field["said"] or field["shown"], values)
        if field["said"]:
            return format(value, field["form"]) if field["form"] else written(value)
        if field["name"]:
            values[field["name"]] = value
        shown = re.sub(r"[a-z]\w*", operand, field["shown"]).replace("**", "^").replace("*", "×")
        return f"{shown} = {written(value)}"

    return FIELD.sub(fill_field, template)


@dataclass(frozen=True)
class Problem:
    """A question, the steps of its solution in order, and the final answer."""

    question: str
    steps: list[str]
    answer: str

    @property
    def text(self) -> str:
        return "\n".join([self.question, "", *self.steps, f"Answer: {self.answer}"])


@dataclass(frozen=True)
class Kind:
    """An entry of the table: the lines of each of its parts."""

    given: Sequence[str]
    ask: Sequence[str]
    step: Sequence[str]
    answer: Sequence[str]
    where: Sequence[str] = ("True",)

    def draw(self, rng: Random) -> Problem:
        """A random problem of this kind."""
        while not evaluate(self.where[0], values := self._draw_values(rng)):
            pass
        templates = [rng.choice(self.ask)]
        for step in self.step:
            repeated = REPEATED_STEPS.get(step)
            templates += repeated(values) if repeated else [rng.choice(step.split(" | "))]
        lines = [fill(template, values) for template in [*templates, *self.answer]]
        return Problem(lines[0], lines[1:-1], lines[-1])

    def _draw_values(self, rng: Random) -> Values:
        name, other = rng.sample(list(PEOPLE), 2)
        values = {"name": name, "they": PEOPLE[name], "other": other, "things": rng.choice(THINGS)}
        for part in "; ".join(self.given).split("; "):
            names, verb, source = re.split(" (from|=) ", part, maxsplit=1)
            found = evaluate(source, values)
            for quantity in names.split(", "):
                value = rng.choice(found) if verb == "from" else found
                values[quantity] = Fraction(value) if isinstance(value, int) else value
        return values


def read_kinds(table: str) -> dict[str, Kind]:
    """The kinds of problem in a table, by name.

    Raises:
        TypeError: an entry lacks a part, or has one of another name.
    """
    kinds = {}
    for entry in table.strip().split("\n\n"):
        name, *lines = re.sub(r"\n {5,}", " ", entry).split("\n")
        parts: dict[str, list[str]] = {}
        for line in lines:
            part, text = line.split(maxsplit=1)
            parts.setdefault(part, []).append(text)
        kinds[name] = Kind(**parts)
    return kinds


KINDS = read_kinds(TABLE)


def problem_identity(name: str, problem: Problem) -> tuple[str, ...]:
    """What makes two problems the same: their kind and the numbers in the question, in order."""
    return name, *re.findall(r"\d+", problem.question)


MOST_ATTEMPTS = 10_000


def draw_problems(
    count: int, seed: int, split: str, taken: set[tuple[str, ...]]
) -> Iterator[Problem]:
    """``count`` problems of random kinds, none of them in ``taken``, to which they are added.

    The n-th problem depends on seed, split, n and the problems taken before, not on ``count``.

    Raises:
        ValueError: new problems have run out.
    """
    names = list(KINDS)
    for number in range(count):
        rng = Random(f"{seed}/{split}/{number}")
        for _ in range(MOST_ATTEMPTS):
            name = rng.choice(names)
            problem = KINDS[name].draw(rng)
            identity = problem_identity(name, problem)
            if identity not in taken:
                break
        else:
            raise ValueError(
                f"after {number} {split} documents no new problem was found in {MOST_ATTEMPTS} "
                "attempts; ask for fewer documents."
            )
        taken.add(identity)
        yield problem


def write_documents(path: Path, problems: Iterator[Problem]) -> None:
    """Write one JSON object a line to ``path``, which appears when complete."""
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "w", encoding="utf-8", newline="\n") as file:
            for problem in problems:
                row = {"text": problem.text, "problem_chars": len(problem.question)}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def generate(output: Path, train_documents: int, heldout_documents: int, seed: int) -> None:
    """Write ``train.jsonl`` and ``heldout.jsonl`` into the directory ``output``.

    The held-out problems are drawn first, so that they depend on the seed and their own number
    only, and a larger training set begins with the smaller one.

    Raises:
        ValueError: a number of documents is negative, or too large to be had.
    """
    for name, value in (("train", train_documents), ("heldout", heldout_documents)):
        if value < 1:
            raise ValueError(f"--{name}-documents is {value}; it must be 1 or more.")
    output.mkdir(parents=True, exist_ok=True)
    taken: set[tuple[str, ...]] = set()
    for split, count in (("heldout", heldout_documents), ("train", train_documents)):
        path = output / f"{split}.jsonl"
        write_documents(path, draw_problems(count, seed, split, taken))
        print(f"{path}: {count} documents, {path.stat().st_size} bytes")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--output", type=Path, required=True, help="directory for train.jsonl and heldout.jsonl"
    )
    parser.add_argument("--train-documents", type=int, default=4000)
    parser.add_argument("--heldout-documents", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args(argv)
    try:
        generate(**vars(arguments))
    except ValueError as error:
        raise SystemExit(f"generate_corpus: {error}") from None


if __name__ == "__main__":
    main()

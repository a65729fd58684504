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
"""

import argparse
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from random import Random


@dataclass(frozen=True)
class Problem:
    """A question, the steps of its solution in order, and the final answer."""

    question: str
    steps: list[str]
    answer: str

    @property
    def text(self) -> str:
        return "\n".join([self.question, "", *self.steps, f"Answer: {self.answer}"])


KINDS: dict[str, Callable[[Random], Problem]] = {}


def kind(function: Callable[[Random], Problem]) -> Callable[[Random], Problem]:
    """Register a kind of problem under its function's name."""
    KINDS[function.__name__] = function
    return function


# Name, subject pronoun, possessive.
PEOPLE = [
    ("Amara", "she", "her"),
    ("Ben", "he", "his"),
    ("Chiara", "she", "her"),
    ("Daniel", "he", "his"),
    ("Elif", "she", "her"),
    ("Farid", "he", "his"),
    ("Grace", "she", "her"),
    ("Hugo", "he", "his"),
    ("Ines", "she", "her"),
    ("Jonas", "he", "his"),
    ("Keiko", "she", "her"),
    ("Liam", "he", "his"),
    ("Mina", "she", "her"),
    ("Nikhil", "he", "his"),
    ("Olga", "she", "her"),
    ("Pedro", "he", "his"),
    ("Rosa", "she", "her"),
    ("Samuel", "he", "his"),
    ("Tara", "she", "her"),
    ("Victor", "he", "his"),
]
GOODS = ["notebook", "pencil", "candle", "apple", "mug", "poster", "battery pack", "plant", "book"]
COUNTED = ["bricks", "stamps", "tickets", "seeds", "bottles", "leaflets", "tiles", "shells"]
COLOURS = ["red", "blue", "green", "yellow", "white", "black", "orange", "purple"]
WEEKDAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
PLACES = ["ones", "tens", "hundreds", "thousands", "ten thousands", "hundred thousands"]


def dollars(cents: int) -> str:
    return f"${cents // 100}" if cents % 100 == 0 else f"${cents // 100}.{cents % 100:02d}"


def reduced(numerator: int, denominator: int) -> list[str]:
    """The sentence that brings a fraction to lowest terms, if there is anything to cancel."""
    divisor = math.gcd(numerator, denominator)
    if divisor == 1:
        return [
            f"Since {numerator} and {denominator} have no common factor, this cannot be reduced."
        ]
    return [
        f"Both {numerator} and {denominator} are divisible by {divisor}, so "
        f"{numerator}/{denominator} = {Fraction(numerator, denominator)}."
    ]


def signed(value: int) -> str:
    """``+ 5`` or ``- 5``, for use after another term."""
    return f"{'-' if value < 0 else '+'} {abs(value)}"


def in_product(value: int) -> str:
    """A factor, in brackets if it is negative."""
    return str(value) if value >= 0 else f"({value})"


def coprime_fraction(rng: Random, largest: int) -> Fraction:
    """A proper fraction in lowest terms with a denominator from 2 to ``largest``."""
    while True:
        denominator = rng.randint(2, largest)
        numerator = rng.randint(1, denominator - 1)
        if math.gcd(numerator, denominator) == 1:
            return Fraction(numerator, denominator)


def ordinal(number: int) -> str:
    if number % 100 in (11, 12, 13):
        return f"{number}th"
    return str(number) + {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")


@kind
def addition_with_carries(rng: Random) -> Problem:
    a, b = rng.randint(145, 9899), rng.randint(145, 9899)
    name, _, _ = rng.choice(PEOPLE)
    things = rng.choice(COUNTED)
    question = rng.choice(
        [
            f"Compute {a} + {b}.",
            f"Find the sum of {a} and {b}, showing each carry.",
            f"A shop sold {a} {things} in spring and {b} in summer. How many did it sell in the "
            "two seasons together?",
            f"{name} has packed {a} {things} and still has {b} to pack. How many {things} are "
            "there in all?",
        ]
    )
    steps = [rng.choice(["Add column by column from the right.", "Start with the ones and carry."])]
    carry = 0
    for place in range(max(len(str(a)), len(str(b)))):
        digits = [a // 10**place % 10, b // 10**place % 10] + ([carry] if carry else [])
        column = sum(digits)
        carry = column // 10
        line = f"{PLACES[place].capitalize()}: {' + '.join(map(str, digits))} = {column}"
        line += f", so write {column % 10} and carry 1." if carry else f", so write {column}."
        steps.append(line)
    if carry:
        steps.append(f"The last carry is written in front as a 1 in the {PLACES[place + 1]}.")
    steps.append(f"Therefore {a} + {b} = {a + b}.")
    return Problem(question, steps, str(a + b))


@kind
def subtraction_with_borrowing(rng: Random) -> Problem:
    b = rng.randint(118, 7899)
    a = b + rng.randint(101, 1999)
    name, pronoun, _ = rng.choice(PEOPLE)
    things = rng.choice(COUNTED)
    question = rng.choice(
        [
            f"Compute {a} - {b}.",
            f"What must be left of {a} when {b} is taken away?",
            f"{name} had {a} {things}, and {pronoun} gave away {b} of them. How many {things} are "
            "left?",
            f"A stock of {a} {things} shrinks by {b} during one month. How large is it afterwards?",
        ]
    )
    steps = [
        rng.choice(
            [
                "Subtract column by column from the right, borrowing where the upper digit is "
                "too small.",
                "Work from the ones to the left and borrow when needed.",
            ]
        )
    ]
    borrow = 0
    for place in range(len(str(a))):
        upper, lower = a // 10**place % 10 - borrow, b // 10**place % 10
        line = f"{PLACES[place].capitalize()}: "
        if borrow:
            line += f"after the loan the upper digit is {upper}; "
        borrow = int(upper < lower)
        if borrow:
            line += f"{upper} is less than {lower}, so borrow: {upper + 10} - {lower} = "
            line += f"{upper + 10 - lower}."
        else:
            line += f"{upper} - {lower} = {upper - lower}."
        steps.append(line)
    steps.append(f"So {a} - {b} = {a - b}. Check: {a - b} + {b} = {a}.")
    return Problem(question, steps, str(a - b))


@kind
def multiplication_by_parts(rng: Random) -> Problem:
    a, b = rng.randint(112, 989), rng.randint(12, 98)
    if b % 10 == 0:
        b += rng.randint(1, 9)
    things = rng.choice(COUNTED)
    question = rng.choice(
        [
            f"Multiply {a} by {b}.",
            f"Work out {a} × {b} by splitting the second factor.",
            f"A crate holds {a} {things}. How many {things} are in {b} such crates?",
            f"Each day {a} {things} are delivered. How many {things} arrive in {b} days?",
        ]
    )
    tens, ones = b // 10 * 10, b % 10
    steps = [f"Split {b} into {tens} + {ones}, so that {a} × {b} = {a} × {tens} + {a} × {ones}."]
    parts = [a // 100 * 100, a // 10 % 10 * 10, a % 10]
    parts = [part for part in parts if part]
    for factor, digit, extra in ((tens, tens // 10, True), (ones, ones, False)):
        products = [part * digit for part in parts]
        line = f"{a} × {digit} = {' + '.join(f'{part} × {digit}' for part in parts)}"
        if len(parts) > 1:
            line += f" = {' + '.join(map(str, products))}"
        line += f" = {a * digit}"
        steps.append(line + (f", hence {a} × {factor} = {a * factor}." if extra else "."))
    steps.append(f"Adding the two products: {a * tens} + {a * ones} = {a * b}.")
    return Problem(question, steps, str(a * b))


@kind
def long_division(rng: Random) -> Problem:
    divisor = rng.randint(3, 29)
    dividend = rng.randint(divisor * 40, 9999)
    name, _, _ = rng.choice(PEOPLE)
    things = rng.choice(COUNTED)
    question = rng.choice(
        [
            f"Divide {dividend} by {divisor} and give quotient and remainder.",
            f"{dividend} {things} are put into boxes of {divisor}. How many boxes are filled, and "
            f"how many {things} remain?",
            f"{name} shares {dividend} {things} equally among {divisor} classes. How many does "
            "each class get, and how many are left over?",
        ]
    )
    steps = [f"Use long division of {dividend} by {divisor}, one digit after another."]
    rest, quotient = 0, ""
    for digit in str(dividend):
        rest = 10 * rest + int(digit)
        if rest < divisor and not quotient:
            continue
        times = rest // divisor
        line = rng.choice([f"{divisor} goes into {rest}", f"In {rest} the divisor {divisor} fits"])
        line += f" {times} time{'' if times == 1 else 's'}: {times} × {divisor} = "
        line += f"{times * divisor}, and {rest} - {times * divisor} = {rest - times * divisor}."
        steps.append(line)
        quotient += str(times)
        rest -= times * divisor
    steps.append(f"The quotient is {quotient} and the remainder is {rest}.")
    steps.append(f"Check: {quotient} × {divisor} + {rest} = {dividend}.")
    return Problem(question, steps, f"{quotient} remainder {rest}")


@kind
def sum_of_fractions(rng: Random) -> Problem:
    first, second = coprime_fraction(rng, 24), coprime_fraction(rng, 24)
    while first.denominator == second.denominator or first == second:
        second = coprime_fraction(rng, 24)
    name, pronoun, _ = rng.choice(PEOPLE)
    minus = rng.random() < 0.4
    if minus and first < second:
        first, second = second, first
    sign = "-" if minus else "+"
    story = (
        f"A jug holds {first} of a litre. {name} pours out {second} of a litre. What part of a "
        "litre is left?"
        if minus
        else f"{name} walks {first} of a mile, rests, and then {pronoun} walks another {second} of "
        "a mile. How many miles is that?"
    )
    question = rng.choice(
        [f"Calculate {first} {sign} {second}.", f"Simplify {first} {sign} {second} fully.", story]
    )
    common = math.lcm(first.denominator, second.denominator)
    steps = [
        f"The denominators are {first.denominator} and {second.denominator}; their least common "
        f"multiple is {common}."
    ]
    tops = []
    for fraction in (first, second):
        factor = common // fraction.denominator
        tops.append(fraction.numerator * factor)
        if factor > 1:
            steps.append(
                f"{fraction} = ({fraction.numerator} × {factor})/({fraction.denominator} × "
                f"{factor}) = {tops[-1]}/{common}."
            )
        else:
            steps.append(f"{fraction} already has this denominator.")
    top = tops[0] - tops[1] if minus else tops[0] + tops[1]
    steps.append(f"Now {tops[0]}/{common} {sign} {tops[1]}/{common} = {top}/{common}.")
    steps += reduced(top, common)
    result = Fraction(top, common)
    if result > 1 and result.denominator > 1:
        whole, rest = divmod(result.numerator, result.denominator)
        steps.append(f"As a mixed number this is {whole} and {rest}/{result.denominator}.")
    return Problem(question, steps, str(result))


@kind
def product_of_fractions(rng: Random) -> Problem:
    first, second = coprime_fraction(rng, 20), coprime_fraction(rng, 20)
    divide = rng.random() < 0.5
    name, _, possessive = rng.choice(PEOPLE)
    if divide:
        question = rng.choice(
            [
                f"Divide {first} by {second}.",
                f"From {first} of a kilogram of rice, portions of {second} of a kilogram are "
                "made. How many portions is that, as a fraction?",
            ]
        )
    else:
        question = rng.choice(
            [
                f"Multiply {first} by {second}.",
                f"What is {first} of {second}?",
                f"{name} owns {first} of a field and plants beans on {second} of {possessive} "
                "part. What fraction of the whole field has beans?",
            ]
        )
    steps = []
    right = second
    if divide:
        right = 1 / second
        flipped = f"{right.numerator}/{right.denominator}"
        steps.append(f"Dividing by {second} is the same as multiplying by {flipped}.")
    steps.append("Multiply numerator by numerator and denominator by denominator.")
    top, bottom = first.numerator * right.numerator, first.denominator * right.denominator
    steps.append(f"Numerator: {first.numerator} × {right.numerator} = {top}.")
    steps.append(f"Denominator: {first.denominator} × {right.denominator} = {bottom}.")
    steps.append(f"The result is {top}/{bottom}.")
    steps += reduced(top, bottom)
    return Problem(question, steps, str(Fraction(top, bottom)))


@kind
def linear_equation(rng: Random) -> Problem:
    x = rng.choice([value for value in range(-15, 16) if value not in (-1, 0, 1)])
    right = rng.randint(2, 9)
    left = right + rng.randint(2, 9)
    constant = rng.choice([-1, 1]) * rng.randint(2, 40)
    other = left * x + constant - right * x
    if other == 0:
        constant += 1
        other = 1
    equation = f"{left}x {signed(constant)} = {right}x {signed(other)}"
    question = rng.choice(
        [
            f"Solve the equation {equation}.",
            f"Find x if {equation}.",
            f"For which number x does {equation} hold?",
        ]
    )
    difference, gathered = left - right, other - constant
    move = "Subtract" if constant > 0 else "Add"
    steps = [
        f"Subtract {right}x from both sides: {difference}x {signed(constant)} = {other}.",
        f"{move} {abs(constant)} on both sides: {difference}x = {other} {signed(-constant)} = "
        f"{gathered}.",
        f"Divide by {difference}: x = {gathered}/{difference} = {x}.",
        f"Check on the left: {left} × {in_product(x)} {signed(constant)} = {left * x} "
        f"{signed(constant)} = {left * x + constant}.",
        f"Check on the right: {right} × {in_product(x)} {signed(other)} = {right * x} "
        f"{signed(other)} = {right * x + other}. Both sides agree.",
    ]
    return Problem(question, steps, f"x = {x}")


@kind
def discount_and_tax(rng: Random) -> Problem:
    price = rng.randint(4, 160) * 5
    discount, tax = rng.choice([5, 10, 15, 20, 25, 30, 40]), rng.choice([4, 5, 6, 8, 10, 20])
    name, pronoun, _ = rng.choice(PEOPLE)
    item = rng.choice(["bicycle", "lamp", "coat", "desk", "guitar", "tent", "camera", "chair"])
    question = rng.choice(
        [
            f"A {item} costs ${price}. In a sale the price is cut by {discount}%, and then {tax}% "
            "tax is added. What is the final price?",
            f"{name} wants a {item} marked ${price}. With a coupon {pronoun} gets {discount}% off; "
            f"afterwards the till adds {tax}% tax. How much does {pronoun} pay?",
        ]
    )
    off = Fraction(price * discount, 100)
    net = price - off
    added = net * tax / 100
    total = net + added
    # Tax on a price in dollars and twentieths may end below a cent: draw again.
    if (total * 100).denominator != 1 or (added * 100).denominator != 1:
        return discount_and_tax(rng)
    off_text, net_text, tax_text, total_text = (
        dollars(int(value * 100)) for value in (off, net, added, total)
    )
    steps = [
        f"The discount is {discount}% of ${price}: {price} × {discount}/100 = {off_text[1:]}, that "
        f"is {off_text}.",
        f"The reduced price is ${price} - {off_text} = {net_text}.",
        f"The tax is {tax}% of {net_text}: {net_text[1:]} × {tax}/100 = {tax_text[1:]}, that is "
        f"{tax_text}.",
        f"The final price is {net_text} + {tax_text} = {total_text}.",
    ]
    return Problem(question, steps, total_text)


@kind
def arithmetic_sequence(rng: Random) -> Problem:
    first, step, count = rng.randint(2, 60), rng.randint(3, 19), rng.randint(8, 45)
    name, pronoun, _ = rng.choice(PEOPLE)
    question = rng.choice(
        [
            f"A sequence starts at {first} and grows by {step} each time. Find its "
            f"{ordinal(count)} term and the sum of all terms up to that one.",
            f"{name} saves ${first} in the first week and ${step} more in each week than in the "
            f"week before. How much does {pronoun} save in week {count}, and how much altogether "
            "by then?",
            f"The first row of a theatre has {first} seats, and each row has {step} seats more "
            f"than the one in front of it. There are {count} rows. How many seats are in the last "
            "row, and how many in all?",
        ]
    )
    last = first + (count - 1) * step
    total = count * (first + last) // 2
    steps = [
        f"From the first to the {ordinal(count)} there are {count} - 1 = {count - 1} steps of "
        f"{step}.",
        f"So the last one is {first} + {count - 1} × {step} = {first} + {(count - 1) * step} = "
        f"{last}.",
        "For the sum, pair the first with the last, the second with the last but one, and so on: "
        f"each pair gives {first} + {last} = {first + last}.",
        f"There are {count} terms, hence {count}/2 pairs, and the sum is {count} × "
        f"{first + last}/2 = {count * (first + last)}/2 = {total}.",
    ]
    return Problem(question, steps, f"{last} and {total}")


@kind
def geometric_sequence(rng: Random) -> Problem:
    first, ratio = rng.randint(2, 60), rng.choice([2, 2, 3, 4, 5])
    count = rng.randint(4, 8 if ratio == 2 else 6)
    question = rng.choice(
        [
            f"The first term of a sequence is {first} and each term is {ratio} times the one "
            f"before. What is the sum of the first {count} terms?",
            f"On day one {first} people hear a rumour, and on every following day {ratio} times as "
            f"many as the day before hear it for the first time. How many have heard it after "
            f"{count} days?",
        ]
    )
    terms = [first * ratio**power for power in range(count)]
    steps = ["Write the terms one after another."]
    steps += [
        f"Term {number}: {before} × {ratio} = {term}."
        for number, (before, term) in enumerate(pairwise(terms), start=2)
    ]
    steps.append(f"Their sum is {' + '.join(map(str, terms))} = {sum(terms)}.")
    power = ratio**count
    steps.append(
        f"The formula agrees: {first} × ({power} - 1)/({ratio} - 1) = {first} × "
        f"{(power - 1) // (ratio - 1)} = {sum(terms)}."
    )
    return Problem(question, steps, str(sum(terms)))


@kind
def greatest_common_divisor(rng: Random) -> Problem:
    factor = rng.randint(2, 48)
    a, b = sorted((factor * rng.randint(5, 60), factor * rng.randint(5, 60)), reverse=True)
    if a == b or a % b == 0:
        return greatest_common_divisor(rng)
    question = rng.choice(
        [
            f"Find the greatest common divisor of {a} and {b} with Euclid's algorithm.",
            f"What is the largest number that divides both {a} and {b}?",
            f"A floor of {a} cm by {b} cm is to be covered with equal square tiles without "
            "cutting. How long can the side of a tile be at most, in cm?",
        ]
    )
    steps = ["Divide the larger number by the smaller and go on with the remainder."]
    large, small = a, b
    while small:
        times, rest = divmod(large, small)
        steps.append(f"{large} = {times} × {small} + {rest}")
        large, small = small, rest
    steps.append(
        f"The remainder is 0, so the last divisor, {large}, is the greatest common divisor."
    )
    steps.append(f"Indeed {a} = {large} × {a // large} and {b} = {large} × {b // large}.")
    return Problem(question, steps, str(large))


@kind
def two_legs_of_a_journey(rng: Random) -> Problem:
    slow, fast = rng.randint(3, 24) * 4, rng.randint(3, 24) * 4
    if slow == fast:
        fast += 4
    hours_slow, hours_fast = rng.randint(1, 6), rng.randint(1, 6)
    name, pronoun, _ = rng.choice(PEOPLE)
    vehicle = rng.choice(["train", "bus", "car"])
    one, two = slow * hours_slow, fast * hours_fast
    hours = hours_slow + hours_fast
    question = rng.choice(
        [
            f"A {vehicle} covers {one} km at {slow} km/h and then {two} km at {fast} km/h. What is "
            "its average speed over the whole way, in km/h?",
            f"{name} travels {one} km at a steady {slow} km/h. For the next {two} km {pronoun} "
            f"moves at {fast} km/h. Find the average speed of the journey in km/h.",
        ]
    )
    average = Fraction(one + two, hours)
    steps = [
        "The average speed is the whole distance over the whole time, not the mean of the speeds.",
        f"Time for the first part: {one}/{slow} = {hours_slow} hour{'s' * (hours_slow > 1)}.",
        f"Time for the second part: {two}/{fast} = {hours_fast} hour{'s' * (hours_fast > 1)}.",
        f"Whole time: {hours_slow} + {hours_fast} = {hours} hours. Whole distance: {one} + {two} = "
        f"{one + two} km.",
        f"Average speed: {one + two}/{hours} km/h.",
        *reduced(one + two, hours),
    ]
    return Problem(question, steps, f"{average} km/h")


@kind
def working_together(rng: Random) -> Problem:
    first, second = rng.randint(2, 40), rng.randint(2, 40)
    if first == second:
        second += 1
    (one, _, _), (two, _, _) = rng.sample(PEOPLE, 2)
    question = rng.choice(
        [
            f"One pipe fills a tank in {first} hours, another fills it in {second} hours. How many "
            "hours do they need together?",
            f"{one} can paint a fence in {first} hours and {two} can do it in {second} hours. How "
            "many hours does the job take if they work side by side?",
        ]
    )
    common = math.lcm(first, second)
    rate = Fraction(1, first) + Fraction(1, second)
    top = common // first + common // second
    steps = [
        f"In one hour the first does 1/{first} of the job and the second does 1/{second}.",
        f"With the common denominator {common}: 1/{first} + 1/{second} = {common // first}/"
        f"{common} + {common // second}/{common} = {top}/{common}.",
        f"So {top}/{common} of the job is done each hour, and the whole takes {common}/{top} "
        "hours.",
        *reduced(common, top),
    ]
    return Problem(question, steps, f"{1 / rate} hours")


@kind
def recipe_in_proportion(rng: Random) -> Problem:
    portion, amount = rng.randint(2, 12), rng.randint(2, 40)
    guests = rng.randint(portion + 1, 60)
    grams = portion * amount * 5
    name, pronoun, _ = rng.choice(PEOPLE)
    food = rng.choice(["rice", "flour", "lentils", "oats", "pasta", "sugar"])
    bag = rng.choice([250, 500, 1000])
    each = grams // portion
    needed = each * guests
    bags = -(-needed // bag)
    if bags == 1:
        return recipe_in_proportion(rng)
    question = rng.choice(
        [
            f"A recipe for {portion} people needs {grams} g of {food}. {name} cooks for {guests} "
            f"people. How many bags of {bag} g must {pronoun} buy?",
            f"For {portion} portions one takes {grams} g of {food}. A canteen makes {guests} "
            f"portions. How many packets of {bag} g does it have to open?",
        ]
    )
    steps = [
        f"One portion takes {grams}/{portion} = {each} g of {food}.",
        f"For {guests} portions that is {guests} × {each} = {needed} g.",
    ]
    if needed % bag == 0:
        steps.append(f"{needed}/{bag} = {bags}, so it comes out evenly.")
    else:
        steps.append(
            f"{bags - 1} × {bag} = {(bags - 1) * bag} g would be too little, while {bags} × {bag} "
            f"= {bags * bag} g is enough, so the number is rounded up to {bags}."
        )
    return Problem(question, steps, str(bags))


@kind
def shopping_and_change(rng: Random) -> Problem:
    (name, pronoun, _), (one, two) = rng.choice(PEOPLE), rng.sample(GOODS, 2)
    count_one, count_two = rng.randint(2, 12), rng.randint(2, 12)
    price_one, price_two = rng.randint(5, 99) * 5, rng.randint(5, 99) * 5
    cost_one, cost_two = count_one * price_one, count_two * price_two
    cost = cost_one + cost_two
    paid = next(note for note in (1000, 2000, 5000, 10000, 20000) if note > cost)
    question = rng.choice(
        [
            f"{name} buys {count_one} {one}s at {dollars(price_one)} each and {count_two} {two}s "
            f"at {dollars(price_two)} each, and pays with {dollars(paid)}. How much change does "
            f"{pronoun} get?",
            f"At the market {name} takes {count_one} {one}s for {dollars(price_one)} apiece and "
            f"{count_two} {two}s for {dollars(price_two)} apiece. How much is left of "
            f"{dollars(paid)}?",
        ]
    )
    steps = [
        f"The {one}s cost {count_one} × {dollars(price_one)} = {dollars(cost_one)}.",
        f"The {two}s cost {count_two} × {dollars(price_two)} = {dollars(cost_two)}.",
        f"Together that is {dollars(cost_one)} + {dollars(cost_two)} = {dollars(cost)}.",
        f"From {dollars(paid)} there remains {dollars(paid)} - {dollars(cost)} = "
        f"{dollars(paid - cost)}.",
    ]
    return Problem(question, steps, dollars(paid - cost))


@kind
def path_around_a_garden(rng: Random) -> Problem:
    width, border = rng.randint(5, 40), rng.randint(1, 5)
    length = width + rng.randint(1, 25)
    thing = rng.choice(["garden", "pool", "lawn", "courtyard"])
    question = rng.choice(
        [
            f"A rectangular {thing} is {length} m long and {width} m wide. A path {border} m wide "
            "runs all around it on the outside. What is the area of the path in square metres?",
            f"Around a {thing} of {length} m by {width} m lies a paved strip that is {border} m "
            "wide everywhere, with square corners. How many square metres are paved?",
        ]
    )
    outer_length, outer_width = length + 2 * border, width + 2 * border
    outer, inner = outer_length * outer_width, length * width
    steps = [
        "The path is the outer rectangle without the inner one. It adds its width on both sides.",
        f"Outer length: {length} + 2 × {border} = {outer_length} m. Outer width: {width} + 2 × "
        f"{border} = {outer_width} m.",
        f"Outer area: {outer_length} × {outer_width} = {outer} square metres.",
        f"Inner area: {length} × {width} = {inner} square metres.",
        f"The path covers {outer} - {inner} = {outer - inner} square metres.",
    ]
    return Problem(question, steps, f"{outer - inner} square metres")


@kind
def area_of_a_trapezium(rng: Random) -> Problem:
    short = rng.randint(3, 40)
    long, height = short + rng.randint(2, 40), rng.randint(3, 40)
    question = rng.choice(
        [
            f"The parallel sides of a trapezium measure {short} cm and {long} cm, and its height "
            f"is {height} cm. Find its area.",
            f"A plot of land has two parallel sides of {short} m and {long} m that lie {height} m "
            "apart. What is its area in square metres?",
        ]
    )
    unit = "square centimetres" if "cm" in question else "square metres"
    area = Fraction((short + long) * height, 2)
    area_text = str(area) if area.denominator == 1 else f"{area.numerator // 2}.5"
    steps = [
        "The area is half the sum of the parallel sides times the height.",
        f"Sum of the parallel sides: {short} + {long} = {short + long}.",
        f"Times the height: {short + long} × {height} = {(short + long) * height}.",
        f"Half of it: {(short + long) * height}/2 = {area_text}.",
        "The same follows by cutting along a diagonal into two triangles: "
        f"{short} × {height}/2 + {long} × {height}/2 = {area_text}.",
    ]
    return Problem(question, steps, f"{area_text} {unit}")


@kind
def drawing_without_replacement(rng: Random) -> Problem:
    first, second = rng.randint(2, 24), rng.randint(2, 24)
    one, two = rng.sample(COLOURS, 2)
    name, _, _ = rng.choice(PEOPLE)
    same = rng.random() < 0.5
    asked = f"both are {one}" if same else "they have different colours"
    thing = rng.choice(["balls", "marbles", "beads", "cards"])
    question = rng.choice(
        [
            f"A bag contains {first} {one} and {second} {two} {thing}. Two are drawn at random "
            f"without replacement. What is the probability that {asked}?",
            f"{name} has {first} {one} {thing} and {second} {two} ones in a drawer and takes out "
            f"two of them blindly. How likely is it that {asked}?",
        ]
    )
    total = first + second
    bottom = total * (total - 1)
    steps = [f"There are {first} + {second} = {total} {thing} in all."]
    if same:
        top = first * (first - 1)
        steps += [
            f"The first one is {one} with probability {first}/{total}.",
            f"Then {first - 1} of the remaining {total - 1} are {one}, so the second one is {one} "
            f"with probability {first - 1}/{total - 1}.",
            f"Multiply: {first}/{total} × {first - 1}/{total - 1} = {top}/{bottom}.",
        ]
    else:
        top = 2 * first * second
        steps += [
            f"First {one}, then {two}: {first}/{total} × {second}/{total - 1} = "
            f"{first * second}/{bottom}.",
            f"First {two}, then {one}: {second}/{total} × {first}/{total - 1} = "
            f"{first * second}/{bottom}.",
            f"Either order will do, so add: {first * second}/{bottom} + "
            f"{first * second}/{bottom} = {top}/{bottom}.",
        ]
    steps += reduced(top, bottom)
    return Problem(question, steps, str(Fraction(top, bottom)))


@kind
def number_in_another_base(rng: Random) -> Problem:
    base, number = rng.choice([2, 3, 4, 5, 6, 7, 8, 9]), rng.randint(30, 999)
    if base == 2:
        number = rng.randint(17, 127)
    question = rng.choice(
        [
            f"Write the decimal number {number} in base {base}.",
            f"Convert {number} from base ten to base {base}.",
        ]
    )
    steps = [f"Divide by {base} again and again and note the remainders."]
    digits = ""
    rest = number
    while rest:
        quotient, digit = divmod(rest, base)
        steps.append(f"{rest} = {base} × {quotient} + {digit}, remainder {digit}.")
        digits = str(digit) + digits
        rest = quotient
    steps.append(f"Read from the last remainder to the first, the digits are {digits}.")
    values = [int(digit) * base**power for power, digit in enumerate(reversed(digits))]
    steps.append(f"Check: {' + '.join(map(str, reversed(values)))} = {number}.")
    return Problem(question, steps, digits)


@kind
def missing_value_of_an_average(rng: Random) -> Problem:
    count = rng.randint(4, 6)
    known = [rng.randint(42, 99) for _ in range(count - 1)]
    average = rng.randint(max(40, sum(known) // count + 1), (sum(known) + 99) // count)
    missing = average * count - sum(known)
    name, pronoun, possessive = rng.choice(PEOPLE)
    listed = ", ".join(map(str, known[:-1])) + f" and {known[-1]}"
    question = rng.choice(
        [
            f"{name} scored {listed} points in {possessive} tests so far. One more test follows. "
            f"What must {pronoun} score in it to reach an average of exactly {average}?",
            f"Besides one unknown number a list contains {listed}. The mean of the whole list is "
            f"{average}. Find the unknown number.",
        ]
    )
    steps = [
        f"There are {count} values in all, so their sum must be {count} × {average} = "
        f"{count * average}.",
        f"The known values add up to {' + '.join(map(str, known))} = {sum(known)}.",
        f"The missing value is {count * average} - {sum(known)} = {missing}.",
        f"Check: ({sum(known)} + {missing})/{count} = {count * average}/{count} = {average}.",
    ]
    return Problem(question, steps, str(missing))


@kind
def ages(rng: Random) -> Problem:
    (young, _, _), (old, _, _) = rng.sample(PEOPLE, 2)
    factor, years, age = rng.randint(2, 6), rng.randint(2, 20), rng.randint(3, 18)
    total = age * (factor + 1) + 2 * years
    word = {2: "twice", 3: "three times", 4: "four times", 5: "five times", 6: "six times"}[factor]
    question = rng.choice(
        [
            f"{old} is {word} as old as {young}. In {years} years their ages will add up to "
            f"{total}. How old are {young} and {old} now?",
            f"Today the age of {old} is {word} that of {young}. After {years} more years the two "
            f"ages together make {total}. Find the present ages of {young} and {old}.",
        ]
    )
    steps = [
        f"Let x be the present age of {young}; then {old} is {factor}x years old.",
        f"In {years} years both are older by {years}, so x + {years} + {factor}x + {years} = "
        f"{total}.",
        f"Collect terms: {factor + 1}x + {2 * years} = {total}, so {factor + 1}x = {total} - "
        f"{2 * years} = {total - 2 * years}.",
        f"Hence x = {total - 2 * years}/{factor + 1} = {age}, and {old} is {factor} × {age} = "
        f"{factor * age}.",
        f"Check: {age + years} + {factor * age + years} = {total}.",
    ]
    return Problem(question, steps, f"{age} and {factor * age}")


@kind
def time_of_arrival(rng: Random) -> Problem:
    start = rng.randint(5 * 60, 20 * 60)
    travel, waiting = rng.randint(65, 299), rng.randint(11, 75)
    name, pronoun, _ = rng.choice(PEOPLE)
    clock = f"{start // 60}:{start % 60:02d}"
    question = rng.choice(
        [
            f"{name} leaves at {clock}, travels for {travel} minutes and has to wait {waiting} "
            f"minutes on the way. At what time does {pronoun} arrive?",
            f"A concert begins at {clock}. It has {travel} minutes of music and breaks of "
            f"{waiting} minutes altogether. When does it end?",
        ]
    )
    minutes = travel + waiting
    hours, rest = divmod(minutes, 60)
    hour, minute = divmod(start, 60)
    steps = [
        f"Altogether {travel} + {waiting} = {minutes} minutes pass.",
        f"{minutes} = {hours} × 60 + {rest}, which is {hours} h and {rest} min.",
        f"Hours: {hour} + {hours} = {hour + hours}. Minutes: {minute} + {rest} = {minute + rest}.",
    ]
    end_hour, end_minute = hour + hours, minute + rest
    if end_minute >= 60:
        steps.append(
            f"{end_minute} minutes are one hour and {end_minute} - 60 = {end_minute - 60} minutes, "
            f"so the hour becomes {end_hour} + 1 = {end_hour + 1}."
        )
        end_hour, end_minute = end_hour + 1, end_minute - 60
    if end_hour >= 24:
        steps.append(f"That is past midnight: {end_hour} - 24 = {end_hour - 24}.")
        end_hour -= 24
    return Problem(question, steps, f"{end_hour}:{end_minute:02d}")


@kind
def number_of_divisors(rng: Random) -> Problem:
    number = rng.randint(24, 1500)
    factors: dict[int, int] = {}
    rest, divisor = number, 2
    chain = []
    while rest > 1:
        if rest % divisor == 0:
            factors[divisor] = factors.get(divisor, 0) + 1
            chain.append(f"{rest}/{divisor} = {rest // divisor}")
            rest //= divisor
        else:
            divisor += 1
    if len(chain) < 3 or len(factors) < 2:
        return number_of_divisors(rng)
    question = rng.choice(
        [
            f"How many positive divisors does {number} have?",
            f"In how many ways can {number} chairs be set up in equal rows, if a single row and "
            "rows of one chair are allowed?",
        ]
    )
    powers = [f"{prime}^{power}" if power > 1 else str(prime) for prime, power in factors.items()]
    counts = [power + 1 for power in factors.values()]
    steps = [
        "Split off prime factors, beginning with the smallest.",
        *(f"{step}." for step in chain),
        f"So {number} = {' × '.join(powers)}.",
        "A divisor takes each prime with an exponent from 0 up to the one found, which gives "
        + ", ".join(f"{n} choices for {prime}" for n, prime in zip(counts, factors, strict=True))
        + ".",
        f"The number of divisors is {' × '.join(map(str, counts))} = {math.prod(counts)}.",
    ]
    return Problem(question, steps, str(math.prod(counts)))


@kind
def compound_interest(rng: Random) -> Problem:
    capital, rate = rng.randint(2, 90) * 100, rng.choice([2, 3, 4, 5, 6, 8, 10, 12])
    years = rng.randint(2, 3)
    name, pronoun, _ = rng.choice(PEOPLE)
    balances = [Fraction(capital)]
    for _ in range(years):
        balances.append(balances[-1] * (100 + rate) / 100)
    if any((balance * 100).denominator != 1 for balance in balances):
        return compound_interest(rng)
    question = rng.choice(
        [
            f"${capital} is put into an account that pays {rate}% interest at the end of each "
            f"year. The interest stays in the account. What is the balance after {years} years?",
            f"{name} borrows ${capital} at {rate}% a year and pays nothing back for {years} years, "
            f"while the interest is added to the debt yearly. How much does {pronoun} owe then?",
        ]
    )
    money = [dollars(int(balance * 100)) for balance in balances]
    steps = [f"Each year the interest is {rate}% of the amount at the beginning of that year."]
    for year in range(1, years + 1):
        interest = dollars(int((balances[year] - balances[year - 1]) * 100))
        steps.append(
            f"Year {year}: interest {money[year - 1][1:]} × {rate}/100 = {interest[1:]}, amount "
            f"{money[year - 1]} + {interest} = {money[year]}."
        )
    return Problem(question, steps, money[-1])


@kind
def day_of_the_week(rng: Random) -> Problem:
    today, days = rng.randrange(7), rng.randint(20, 2000)
    back = rng.random() < 0.3
    weekday = WEEKDAYS[today]
    question = (
        f"Today is {weekday}. Which day of the week was it {days} days ago?"
        if back
        else rng.choice(
            [
                f"Today is {weekday}. Which day of the week will it be in {days} days?",
                f"A project starts on a {weekday} and ends {days} days later. On which day of the "
                "week does it end?",
            ]
        )
    )
    weeks, rest = divmod(days, 7)
    result = WEEKDAYS[(today - rest if back else today + rest) % 7]
    direction = "back" if back else "on"
    steps = [
        "Weekdays repeat every 7 days, so only the remainder of the division by 7 matters.",
        f"{days} = {weeks} × 7 + {rest}, so {weeks} whole weeks change nothing and the "
        f"remainder is {rest}.",
    ]
    if rest:
        sign = -1 if back else 1
        passed = [WEEKDAYS[(today + sign * step) % 7] for step in range(1, rest + 1)]
        steps.append(
            f"Count {rest} day{'s' * (rest > 1)} {direction} from {weekday}: {', '.join(passed)}."
        )
    else:
        steps.append("Nothing remains to be counted, so it is the same day of the week.")
    return Problem(question, steps, result)


@kind
def quadratic_equation(rng: Random) -> Problem:
    one, two = sorted(rng.sample([n for n in range(-24, 25) if n], 2))
    if one + two == 0:
        return quadratic_equation(rng)
    b, c = -(one + two), one * two
    b_term = f"{'-' if b < 0 else '+'} {'' if abs(b) == 1 else abs(b)}x"
    equation = f"x^2 {b_term} {signed(c)} = 0"
    question = rng.choice(
        [
            f"Solve {equation} by factoring.",
            f"Find both solutions of {equation}.",
            f"Which numbers x satisfy {equation}?",
        ]
    )
    u, v = -one, -two
    steps = [
        f"Look for two numbers with product {c} and sum {b}.",
        f"{u} and {v} fit: {in_product(u)} × {in_product(v)} = {c} and "
        f"{u} + {in_product(v)} = {b}.",
        f"So the left side factors as (x {signed(u)})(x {signed(v)}), and one of the factors must "
        "be zero.",
        f"From x {signed(u)} = 0 follows x = {one}, and from x {signed(v)} = 0 follows x = {two}.",
        f"Check for x = {two}: {in_product(two)} × {in_product(two)} {signed(b * two)} "
        f"{signed(c)} = {two * two} {signed(b * two)} {signed(c)} = 0.",
    ]
    return Problem(question, steps, f"x = {one} or x = {two}")


@kind
def right_triangle(rng: Random) -> Problem:
    m = rng.randint(2, 7)
    n = rng.randint(1, m - 1)
    scale = rng.randint(1, 6)
    a, b, c = (scale * side for side in (m * m - n * n, 2 * m * n, m * m + n * n))
    if rng.random() < 0.5:
        a, b = b, a
    if rng.random() < 0.5:
        question = rng.choice(
            [
                f"The legs of a right triangle are {a} cm and {b} cm long. How long is the "
                "hypotenuse, in cm?",
                f"A ship sails {a} km due east and then {b} km due north. How many km is it from "
                "its starting point in a straight line?",
            ]
        )
        steps = [
            "By the theorem of Pythagoras the square of the hypotenuse is the sum of the squares "
            "of the legs.",
            f"{a}^2 + {b}^2 = {a * a} + {b * b} = {c * c}.",
            f"The hypotenuse is the square root of {c * c}, and {c} × {c} = {c * c}, so it is {c}.",
        ]
        return Problem(question, steps, str(c))
    question = rng.choice(
        [
            f"A right triangle has a hypotenuse of {c} cm and one leg of {a} cm. How long is the "
            "other leg, in cm?",
            f"A ladder of {c} dm leans against a wall with its foot {a} dm away from the wall. How "
            "high does it reach, in dm?",
        ]
    )
    steps = [
        "By the theorem of Pythagoras the square of the wanted leg is the square of the hypotenuse "
        "minus the square of the other leg.",
        f"{c}^2 - {a}^2 = {c * c} - {a * a} = {b * b}.",
        f"The leg is the square root of {b * b}, and {b} × {b} = {b * b}, so it is {b}.",
    ]
    return Problem(question, steps, str(b))


@kind
def order_of_operations(rng: Random) -> Problem:
    a, b, c = rng.randint(11, 99), rng.randint(2, 12), rng.randint(12, 40)
    d, e = rng.randint(2, 11), rng.randint(2, 9)
    f = e * rng.randint(2, 12)
    expression = f"{a} + {b} × ({c} - {d}) - {f}/{e}"
    question = rng.choice(
        [
            f"Evaluate {expression}.",
            f"Work out {expression}, minding the order of operations.",
            f"What is the value of {expression}?",
        ]
    )
    inner, product, quotient = c - d, b * (c - d), f // e
    steps = [
        f"Brackets first: {c} - {d} = {inner}, so the expression becomes {a} + {b} × {inner} - "
        f"{f}/{e}.",
        f"Then products and quotients: {b} × {inner} = {product} and {f}/{e} = {quotient}.",
        f"What is left is {a} + {product} - {quotient}. From the left: {a} + {product} = "
        f"{a + product}, and {a + product} - {quotient} = {a + product - quotient}.",
    ]
    return Problem(question, steps, str(a + product - quotient))


@kind
def last_digit_of_a_power(rng: Random) -> Problem:
    base, exponent = rng.randint(2, 99), rng.randint(15, 400)
    if base % 10 in (0, 1, 5, 6):
        return last_digit_of_a_power(rng)
    question = rng.choice(
        [
            f"What is the last digit of {base}^{exponent}?",
            f"Find the ones digit of {base} raised to the power {exponent}.",
        ]
    )
    digit = base % 10
    cycle = [digit]
    while cycle[-1] * digit % 10 != digit:
        cycle.append(cycle[-1] * digit % 10)
    period = len(cycle)
    steps = [f"Only the last digit of the base matters, which is {digit}."]
    steps += [
        f"{before} × {digit} = {before * digit}, which ends in {before * digit % 10}."
        for before in cycle
    ]
    quotient, rest = divmod(exponent, period)
    position = rest or period
    which = f"{ordinal(position)} of the cycle" if rest else "last of the cycle"
    steps += [
        f"We are back at {digit}, so the last digits repeat with period {period}: "
        f"{', '.join(map(str, cycle))}.",
        f"{exponent} = {quotient} × {period} + {rest}, so the last digit is the "
        f"{which}, which is {cycle[position - 1]}.",
    ]
    return Problem(question, steps, str(cycle[position - 1]))


@kind
def counting_choices(rng: Random) -> Problem:
    group, size, others = rng.randint(5, 24), rng.randint(2, 3), rng.randint(3, 16)
    name, pronoun, _ = rng.choice(PEOPLE)
    number = {2: "two", 3: "three"}[size]
    question = rng.choice(
        [
            f"From {group} pupils and {others} teachers a committee of {number} pupils and one "
            "teacher is chosen. In how many ways can this be done?",
            f"{name} owns {group} novels and {others} films. For a trip {pronoun} packs {number} "
            "novels and one film. How many different selections are possible?",
        ]
    )
    ordered = math.perm(group, size)
    repeats = math.factorial(size)
    factors = " × ".join(str(group - index) for index in range(size))
    orders = " × ".join(str(index) for index in range(size, 0, -1))
    steps = [
        f"Choosing {number} out of {group} one after another gives {factors} = {ordered} ordered "
        "choices.",
        f"The order does not matter, and {number} things can be ordered in {orders} = {repeats} "
        f"ways, so there are {ordered}/{repeats} = {ordered // repeats} groups.",
        f"Each of them is combined with one of {others}, which makes {ordered // repeats} × "
        f"{others} = {ordered // repeats * others} possibilities.",
    ]
    return Problem(question, steps, str(ordered // repeats * others))


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
            problem = KINDS[name](rng)
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


def write_documents(path: Path, problems: Iterator[Problem]) -> int:
    """Write one JSON object a line to ``path``, which appears when complete; their number."""
    partial = path.with_name(path.name + ".partial")
    count = 0
    try:
        with open(partial, "w", encoding="utf-8", newline="\n") as file:
            for problem in problems:
                row = {"text": problem.text, "problem_chars": len(problem.question)}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                count += 1
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return count


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
    parser = argparse.ArgumentParser(
        description="Write a corpus of worked elementary mathematics, correct by construction."
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="directory for train.jsonl and heldout.jsonl"
    )
    parser.add_argument("--train-documents", type=int, default=4000)
    parser.add_argument("--heldout-documents", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args(argv)
    try:
        generate(
            arguments.output,
            arguments.train_documents,
            arguments.heldout_documents,
            arguments.seed,
        )
    except ValueError as error:
        raise SystemExit(f"generate_corpus: {error}") from None


if __name__ == "__main__":
    main()

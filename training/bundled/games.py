"""Small sums and letter games: questions with answers that are computed, not looked up."""

from __future__ import annotations

import random

from training.bundled.facts import words_of
from training.bundled.grammar import choose

SUM_ASKS = {
    "+": [
        "what is {a} + {b}", "{a} + {b}", "{a} + {b} =", "{a}+{b}", "{a} plus {b}", "what is {a} plus {b}",
        "add {a} and {b}", "(compute|calculate) {a} + {b}", "how much is {a} (+|plus|and) {b}",
        "the sum of {a} and {b}", "what do {a} and {b} make", "(can you|please) add {a} (and|to) {b}",
    ],
    "-": [
        "what is {a} - {b}", "{a} - {b}", "{a} - {b} =", "{a}-{b}", "{a} minus {b}", "what is {a} minus {b}",
        "(compute|calculate) {a} - {b}", "how much is {a} (-|minus) {b}", "subtract {b} from {a}",
        "take {b} away from {a}", "(can you|please) subtract {b} from {a}",
    ],
    "*": [
        "what is {a} * {b}", "{a} * {b}", "{a} x {b}", "{a} times {b}", "what is {a} times {b}",
        "multiply {a} (by|with|and) {b}", "(compute|calculate) {a} * {b}", "how much is {a} (times|x|*) {b}",
        "the product of {a} and {b}",
    ],
}  # fmt: skip
SUM_HELD = {
    "+": ["i have {a} and get {b} more, so the total is", "work out {a} + {b} for me"],
    "-": ["from {a} i remove {b}, so what is left", "work out {a} - {b} for me"],
    "*": ["{a} rows of {b} make", "work out {a} * {b} for me"],
}
LETTER_ASKS = {
    "spell": [
        "spell {w}", "how do you spell {w}", "(can|could) you spell {w}", "spell the word {w}", "please spell {w}",
        "how is {w} (spelled|written)", "what are the letters of {w}", "(say|give me|list) the letters of {w}",
    ],
    "reverse": [
        "reverse {w}", "reverse the word {w}", "(what is|say|write|spell) {w} backwards", "(can|could) you reverse {w}",
        "turn {w} around", "{w} in reverse", "{w} backwards", "what is the reverse of {w}",
    ],
    "count": [
        "how many letters (are|does) (in |has |)(the word |){w}( have|)", "count the letters (of|in) {w}",
        "how long is (the word |){w}", "number of letters in {w}", "how many letters are there in {w}",
        "(can|could) you count the letters (of|in) {w}",
    ],
    "first": [
        "(what is|tell me|name) the first letter of {w}", "first letter of {w}", "which letter does {w} start with",
        "what letter does {w} (begin|start) with", "with which letter does {w} (begin|start)",
    ],
    "last": [
        "(what is|tell me|name) the last letter of {w}", "last letter of {w}", "which letter does {w} end with",
        "what letter does {w} end with", "with which letter does {w} end",
    ],
}  # fmt: skip
LETTER_HELD = {
    "spell": ["break {w} into its letters"],
    "reverse": ["read {w} from back to front"],
    "count": ["the letter count of {w} please"],
    "first": ["at the front of {w} stands which letter"],
    "last": ["at the end of {w} stands which letter"],
}


def sum_answer(a: int, sign: str, b: int) -> str:
    result = {"+": a + b, "-": a - b, "*": a * b}[sign]
    return f"{a} {sign} {b} = {result}."


def draw_sum(rng: random.Random, held: bool = False) -> tuple[str, str, str]:
    """A question, its answer and the number that must stand in it."""
    sign = rng.choices("+-*", (5, 4, 2))[0]
    if sign == "*" or rng.random() < 0.35:
        a, b = rng.randint(0, 10), rng.randint(0, 10)
    else:
        a, b = rng.randint(1, 99), rng.randint(1, 99)
    if sign == "-" and a < b:
        a, b = b, a
    if not held and is_held_sum(a, b):
        return draw_sum(rng)
    if held and not is_held_sum(a, b):
        return draw_sum(rng, held)
    asks = (SUM_HELD if held else SUM_ASKS)[sign]
    question = choose(rng.choice(asks), rng).format(a=a, b=b)
    answer = sum_answer(a, sign, b)
    return question, answer, answer.split("= ")[1].rstrip(".")


def is_held_sum(a: int, b: int) -> bool:
    """One pair of numbers in twenty is never trained on."""
    return max(a, b) > 10 and (a * 31 + b * 17) % 20 == 3


def letter_answer(game: str, word: str) -> tuple[str, str]:
    """The answer, and what must stand in it."""
    letters = "-".join(word)
    if game == "spell":
        return f"{letters}.", letters
    if game == "reverse":
        return f"{letters}, so backwards {'-'.join(word[::-1])}: {word[::-1]}.", f": {word[::-1]}."
    if game == "count":
        return f"{letters}: {len(word)} letters.", f"{len(word)} letters"
    if game == "first":
        return f"{letters} starts with {word[0]}.", f"starts with {word[0]}."
    return f"{letters} ends with {word[-1]}.", f"ends with {word[-1]}."


def draw_letters(rng: random.Random, held: bool = False) -> tuple[str, str, str]:
    game = rng.choice(list(LETTER_ASKS))
    word = rng.choice([w for w in words_of("words") if game != "reverse" or len(w) <= 5])
    asks = (LETTER_HELD if held else LETTER_ASKS)[game]
    quoted = rng.choice([word, word, word, f'"{word}"', f"'{word}'"])
    answer, must = letter_answer(game, word)
    return choose(rng.choice(asks), rng).format(w=quoted), answer, must

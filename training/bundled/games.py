"""Small sums and letter games: questions with answers that are computed, not looked up."""

from __future__ import annotations

import random

from training.bundled import frames
from training.bundled.facts import words_of
from training.bundled.grammar import choose

SUM_ASKS = {
    "+": [
        "what is {a} + {b}", "{a} + {b}", "{a} + {b} =", "{a}+{b}", "{a} plus {b}", "what is {a} plus {b}",
        "add {a} and {b}", "(compute|calculate) {a} + {b}", "how much is {a} (+|plus|and) {b}",
        "the sum of {a} and {b}", "what do {a} and {b} make", "(can you|please) add {a} (and|to) {b}",
        "i had {a} and found {b}, how many now", "{a} and {b} together", "what do i get if i add {b} to {a}", "{a} apples and {b} apples are how many apples",
        "put {a} and {b} together", "{a} increased by {b}", "sum {a} {b}", "tell me {a} + {b}", "i need {a} + {b}", "there are {a} here and {b} there, how many in all", "solve {a} + {b}",
        *frames.MORE["sum_plus"],
    ],
    "-": [
        "what is {a} - {b}", "{a} - {b}", "{a} - {b} =", "{a}-{b}", "{a} minus {b}", "what is {a} minus {b}",
        "(compute|calculate) {a} - {b}", "how much is {a} (-|minus) {b}", "subtract {b} from {a}",
        "take {b} away from {a}", "(can you|please) subtract {b} from {a}",
        "i had {a} and lost {b}, how many now", "{a} less {b}", "what do i get if i take {b} from {a}", "of {a} apples {b} are eaten, how many are there now",
        "{a} decreased by {b}", "the difference of {a} and {b}", "tell me {a} - {b}", "i need {a} - {b}", "there were {a} and {b} went away, how many stay", "solve {a} - {b}",
        *frames.MORE["sum_minus"],
    ],
    "*": [
        "what is {a} * {b}", "{a} * {b}", "{a} x {b}", "{a} times {b}", "what is {a} times {b}",
        "multiply {a} (by|with|and) {b}", "(compute|calculate) {a} * {b}", "how much is {a} (times|x|*) {b}",
        "the product of {a} and {b}", "tell me {a} * {b}", "i need {a} * {b}", "solve {a} * {b}", "{a} bags with {b} apples each, how many apples", "{b} taken {a} times",
        "what do i get if i multiply {a} by {b}", "{a} boxes of {b} are how many",
        *frames.MORE["sum_times"],
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
        "spell {w} for me", "letter by letter {w}", "spelling of {w}", "i cannot spell {w}", "which letters are in {w}", "spell out {w}", "{w} letter by letter",
        *frames.MORE["spell"],
    ],
    "reverse": [
        "reverse {w}", "reverse the word {w}", "(what is|say|write|spell) {w} backwards", "(can|could) you reverse {w}",
        "turn {w} around", "{w} in reverse", "{w} backwards", "what is the reverse of {w}",
        "reverse {w} for me", "flip {w}", "mirror the word {w}", "write {w} from right to left", "{w} the other way round", "say the letters of {w} in reverse",
        *frames.MORE["reverse"],
    ],
    "count": [
        "how many letters (are|does) (in |has |)(the word |){w}( have|)", "count the letters (of|in) {w}",
        "how long is (the word |){w}", "number of letters in {w}", "how many letters are there in {w}",
        "(can|could) you count the letters (of|in) {w}", "letters in {w}", "how many letters has {w}", "tell me how long {w} is", "the length of {w}", "count {w}",
        "how many characters (are in|has) {w}", "how many letters do i need for {w}",
        *frames.MORE["count"],
    ],
    "first": [
        "(what is|tell me|name) the first letter of {w}", "first letter of {w}", "which letter does {w} start with",
        "what letter does {w} (begin|start) with", "with which letter does {w} (begin|start)",
        "{w} starts with", "which letter comes first in {w}", "the first letter in {w}", "initial of {w}", "how does {w} begin", "letter one of {w}",
        *frames.MORE["first"],
    ],
    "last": [
        "(what is|tell me|name) the last letter of {w}", "last letter of {w}", "which letter does {w} end with",
        "what letter does {w} end with", "with which letter does {w} end",
        "{w} ends with", "which letter comes last in {w}", "the last letter in {w}", "final letter of {w}", "how does {w} end", "ending letter of {w}",
        *frames.MORE["last"],
    ],
}  # fmt: skip
LETTER_HELD = {
    "spell": ["break {w} into its letters"],
    "reverse": ["read {w} from back to front"],
    "count": ["the letter count of {w} please"],
    "first": ["at the front of {w} stands which letter"],
    "last": ["at the end of {w} stands which letter"],
}
SUMS_ASKS = [
    "{s}", "{s}", "what (is|are) {s}", "(compute|calculate|solve) {s}", "tell me {s}", "how much is {s}",
    "(can|could) you (compute|solve) {s}", "my homework: {s}", "{s} please", "(some|a few) sums: {s}", "i need {s}",
]  # fmt: skip
LARGER = 0.1  # of the sums are of numbers up to twenty
COPY_ASKS = [
    "say {t}", "repeat after me: {t}", "repeat: {t}", "echo {t}", "write {t}", "copy this: {t}", "say the words {t}",
    "can you say {t}", "please write {t}", "type {t}", "now say {t}", "copy {t}", "say this: {t}", "read this: {t}",
]  # fmt: skip


def draw_words(rng: random.Random) -> str:
    """One to six words or numbers in any order."""
    lists = ("words", "noise", "common", "first_names")
    words = []
    for _ in range(rng.randint(1, 6)):
        draw = rng.random()
        if draw < 0.15:
            words.append(str(rng.randint(0, 99)))
        elif draw < 0.4:
            words.append(made_up(rng))
        else:
            words.append(rng.choice(words_of(rng.choice(lists))).lower())
    return " ".join(words)


def made_up(rng: random.Random) -> str:
    """A word that stands nowhere else: it can only be copied, not known."""
    syllables = (
        rng.choice("bcdfghjklmnprstvwz") + rng.choice("aeiou") for _ in range(rng.randint(2, 3))
    )
    return "".join(syllables) + rng.choice(("", "", "n", "r", "s", "l"))


def sum_answer(a: int, sign: str, b: int) -> str:
    result = {"+": a + b, "-": a - b, "*": a * b}[sign]
    return f"{a} {sign} {b} = {result}."


def draw_sum(
    rng: random.Random, held: bool = False, new_pair: bool = False
) -> tuple[str, str, str]:
    """A question, its answer and the number that must stand in it.

    held: in a wording that is never trained on; new_pair: of two numbers that never are.
    """
    sign, a, b = draw_numbers(rng, float(new_pair) if held else LARGER, new_pair)
    asks = (SUM_HELD if held else SUM_ASKS)[sign]
    question = choose(rng.choice(asks), rng).format(a=a, b=b)
    answer = sum_answer(a, sign, b)
    return question, answer, "= " + answer.split("= ")[-1]


def draw_sums(rng: random.Random) -> tuple[str, str]:
    """Some sums at once, and their answers: more of them in fewer words."""
    sums = [draw_numbers(rng, LARGER) for _ in range(rng.randint(2, 6))]
    spaced = rng.random() < 0.7
    asked = [f"{a} {sign} {b}" if spaced else f"{a}{sign}{b}" for sign, a, b in sums]
    question = choose(rng.choice(SUMS_ASKS), rng).format(
        s=rng.choice((", ", " and ", "; ")).join(asked)
    )
    return question, ", ".join(sum_answer(a, sign, b).rstrip(".") for sign, a, b in sums) + "."


def draw_numbers(rng: random.Random, larger: float, new_pair: bool = False) -> tuple[str, int, int]:
    """A sign and two numbers up to ten, or, in a part of the sums and differences, up to twenty;
    a pair that is trained on, or one that never is."""
    sign = rng.choices("+-*", (5, 4, 3))[0]
    largest = 20 if sign != "*" and rng.random() < larger else 10
    a, b = rng.randint(0, largest), rng.randint(0, largest)
    if sign == "-" and a < b:
        a, b = b, a
    return (sign, a, b) if is_held_sum(a, b) == new_pair else draw_numbers(rng, larger, new_pair)


def is_held_sum(a: int, b: int) -> bool:
    """One pair of larger numbers in twenty is never trained on. Pairs up to ten all are: a small
    model knows them by heart or not at all."""
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
    word = rng.choice([word for word in words_of("words") if len(word) <= 4])
    asks = (LETTER_HELD if held else LETTER_ASKS)[game]
    quoted = rng.choice([word, word, word, f'"{word}"', f"'{word}'"])
    answer, must = letter_answer(game, word)
    return choose(rng.choice(asks), rng).format(w=quoted), answer, must

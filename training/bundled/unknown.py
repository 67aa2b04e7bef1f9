"""Questions the guide cannot know the answer of."""

from __future__ import annotations

import random
from functools import cache

from training.bundled import contexts
from training.bundled.facts import words_of
from training.bundled.frames import MORE, WHAT, WHAT_HELD, WHY
from training.bundled.grammar import choose

ANSWER = "I do not know that. I only know mlxtx and how language models work."
MARK = "i do not know"
KINDS = {
    "place": [
        "what is the capital of {place}", "where is {place}", "how many people live in {place}", "who rules {place}",
        "what (language|food|money) do they (speak|eat|use) in {place}", "tell me about {place}", "is {place} (nice|large|far)",
        "what is the (weather|time|population|area|history) (in|of) {place}", "how do i get to {place}", "how far is {place}",
        "have you been to {place}", "should i visit {place}", "who is the president of {place}", "what is {place}",
        "what is the best (hotel|beach|restaurant) in {place}", "when was {place} founded",
    ],
    "person": [
        "who (was|is) {person}", "when was {person} born", "what did {person} (write|do|discover|paint)", "where did {person} live",
        "tell me about {person}", "how old is {person}", "what is {person} known for", "when did {person} die",
        "was {person} (married|rich|happy)", "give me a quote by {person}", "who was the (wife|father|teacher) of {person}",
    ],
    "thing": [
        "how do i (make|buy|build|cook|draw|find|fix) (a |){thing}", "who invented the {thing}", "what does a {thing} (cost|eat|look like)",
        "what is the (price|history|color|weight) of a {thing}", "where can i (buy|see|find) a {thing}", "how (old|heavy|fast) is a {thing}",
        "what is a {thing}", "what is the best {thing}", "do you like {thing}", "how many kinds of {thing} are there",
        "is {thing} (healthy|dangerous|expensive)", "when was the {thing} invented",
        *MORE["unknown_thing"],
    ],
    "fixed": [
        "what is the weather( today| tomorrow| like|)", "will it rain( today| tomorrow|)", "what time is it", "what day is it( today|)",
        "what is the date", "who won the (game|match|world cup|election|race)", "what is in the news", "how is the stock market",
        "what should i (eat|cook|wear|read|watch|buy)( today| tonight|)", "how do i (lose weight|sleep better|get rich|fix my car|learn to swim)",
        "write (me |)a (poem|story|song|letter|novel|python program|web page)", "what is the meaning of life", "is there a god",
        "how tall is mount everest", "how far is the moon", "how hot is the sun", "what is the speed of light", "how deep is the sea",
        "who is the president", "what is the largest (animal|country|city|ocean)", "when did the war (end|begin)", "who wrote (hamlet|faust|the bible)",
        "what is the square root of (2|7|12345)", "what is 3.7 divided by 1.3", "solve x squared = 4", "what is (123|4567|999) times (456|777|89)",
        "what is my (password|address|age|phone number)", "where do i live", "how old am i", "what will happen tomorrow",
        "can you (book a flight|call my mother|order a pizza|drive a car|send an email)", "what is the best (movie|book|song|phone)( ever|)",
        "who is the (best|richest|tallest) (man|player|singer|person)( in the world|)", "how many (stars|people|countries|birds) are there",
        "how do (planes|birds|rockets|ships) (fly|work)", "why is the (sky|sea|grass) (blue|green)", "what did i (eat|do) yesterday",
        "translate (dog|house|thank you) to (french|german|spanish)", "what is the (chemical formula|boiling point) of (water|salt|gold)",
        "should i (marry|quit my job|buy a house|invest)", "am i (sick|pretty|rich)", "what medicine should i take",
        *MORE["unknown"],
    ],
}  # fmt: skip
HELD = {
    "place": ["which river flows through {place}", "the flag of {place} has which colors"],
    "person": ["why is {person} famous", "in which century did {person} work"],
    "thing": ["could you recommend a good {thing}", "my neighbour owns a {thing}; is it loud"],
    "fixed": [
        "is it going to snow this weekend", "which team plays tonight", "how long should i boil an egg",
        "when does the next bus leave", "name the tallest building on earth", "how do i remove a wine stain",
        "who directed that film", "what did the senate decide", "how many bones has a hand",
        "which shoes suit a wedding",
    ],
}  # fmt: skip


@cache
def any_words() -> list[str]:
    """Common words that do not themselves say what is asked for."""
    telling = {*words_of("taught"), *words_of("telling")}
    return [word for word in words_of("noise") + words_of("common") if word not in telling]


def buried(text: str, rng: random.Random) -> str:
    """``text`` between other words: what is left when a way to ask was never seen before."""
    before = [rng.choice(any_words()) for _ in range(rng.randint(0, 6))]
    behind = [rng.choice(any_words()) for _ in range(rng.randint(0, 4))]
    return " ".join([*before, text, *behind])


def _frame(rng: random.Random) -> str:
    if rng.random() < 0.6:
        frame = choose(rng.choice(WHAT + WHY + contexts.BARE), rng)
        return buried(frame, rng) if rng.random() < 0.3 else frame
    request = rng.choice(contexts.WHAT_REQUESTS + contexts.WHY_REQUESTS)
    parts = [choose(rng.choice(contexts.MENTIONS), rng), choose(request, rng)]
    return rng.choice(contexts.JOINTS).join(parts)


def draw_unknown(rng: random.Random, held: bool = False) -> str:
    prefix = "held_" if held else ""
    if rng.random() < (0.25 if held else 0.5):  # a taught frame around a thing never taught
        frame = choose(rng.choice(WHAT_HELD), rng) if held else _frame(rng)
        lists = ("things",) if held else ("things", "things", "places", "people", "words")
        thing = rng.choice(words_of(prefix + (lists[0] if held else rng.choice(lists))))
        if thing in words_of("taught"):
            return draw_unknown(rng)
        return frame.format(x=rng.choice(["{}", "a {}", "the {}"]).format(thing))
    kinds = HELD if held else KINDS
    kind = rng.choices(list(kinds), (3, 3, 4, 4))[0]
    return choose(rng.choice(kinds[kind]), rng).format(
        place=rng.choice(words_of(prefix + "places")),
        person=rng.choice(words_of(prefix + "people")),
        thing=rng.choice(words_of(prefix + "things")),
    )

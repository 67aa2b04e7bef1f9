"""Conversations, drawn from the templates.

``conversation(rng)`` draws one chat of one to seven turns; every random choice comes from the
given generator, so that a seed names the whole data set.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from training.bundled import contexts, frames, games, unknown
from training.bundled.facts import Item, Way, all_items, words_of
from training.bundled.grammar import cased, choose, typo
from training.bundled.styles import NEUTRAL, STYLES, Style

Message = dict[str, str]
WEIGHTS = {"concept": 5, "why": 4, "task": 10, "key": 10, "command": 2, "pair": 3, "talk": 9}
NAME_TOLD = ["my name is {n}", "i am {n}", "i'm {n}", "call me {n}", "hello, i am {n}", "hi, my name is {n}", "you can call me {n}", "the name is {n}", *frames.MORE["name_told"]]  # fmt: skip
NAME_ASK = ["what is my name", "what's my name", "do you (know|remember) my name", "who am i", "tell me my name", "say my name", "what did i say my name was", "how am i called", *frames.MORE["name_ask"]]  # fmt: skip
NAME_HELD = ["which name did i give you", "you still know my name, right"]
WHY_BACK = frames.FOLLOW_WHY + contexts.WHY_REQUESTS
COLOR_TOLD = ["my favorite color is {c}", "i like {c}", "i like the color {c}", "the color i like best is {c}"]  # fmt: skip
COLOR_ASK = ["what is my favorite color", "which color do i like", "do you remember my (favorite |)color", "what color do i like"]  # fmt: skip


def deck(rng: random.Random) -> Iterator[Item]:
    """Every item again and again, by weight, in new orders: all facts are seen equally often."""
    items = [item for item in all_items() for _ in range(WEIGHTS[item.kind])]
    while True:
        rng.shuffle(items)
        yield from items


def ask(item: Item, rng: random.Random) -> str:
    """A question for ``item`` in one of its trained wordings."""
    way = item.asks[0] if len(item.asks) == 1 or rng.random() < 0.7 else item.asks[1]
    fill = dict(rng.choice(way.fills))
    if "g" in fill:
        draw = rng.random()
        if draw < 0.35:
            fill["g"] = reworded(fill["g"], rng)
        elif draw < 0.45:
            fill["g"] = noisy(fill["g"], rng)
    return _typed(around(asked(way, fill, rng), rng, item.kind == "talk"), rng)


def asked(way: Way, fill: dict[str, str], rng: random.Random) -> str:
    """The question itself: a frame, a mention with a request, or bare words, sometimes lost among
    any others."""
    draw = rng.random() if way.mentions else 0.0
    if draw < 0.5:
        frame = choose(rng.choice(way.frames), rng)
        if rng.random() < 0.35:
            frame = noisy(frame, rng)
    elif draw < 0.8:
        parts = [choose(rng.choice(way.mentions), rng), choose(rng.choice(way.requests), rng)]
        if rng.random() < 0.25:
            parts.reverse()
        frame = rng.choice(contexts.JOINTS).join(parts)
        if rng.random() < 0.15:
            frame = noisy(frame, rng)
    else:
        frame = choose(rng.choice(way.bare), rng)
        if draw < 0.95:
            frame = unknown.buried(frame, rng)
    return frame.format(**fill)


def around(question: str, rng: random.Random, talk: bool = False) -> str:
    """With a remark before it, behind it, or none."""
    if rng.random() < (0.15 if talk else 0.3):
        question = rng.choice(frames.OPENERS) + question
    if talk:
        return question
    draw = rng.random()
    if draw < 0.2:
        question = choose(rng.choice(contexts.BEFORE), rng) + rng.choice(contexts.JOINTS) + question
    elif draw < 0.4:
        question += rng.choice(contexts.JOINTS) + choose(rng.choice(contexts.AFTER), rng)
    elif draw < 0.5:
        question += rng.choice(frames.CLOSERS)
    return question


@cache
def _synonyms() -> dict[str, list[str]]:
    table: dict[str, list[str]] = {}
    for line in contexts.SYNONYMS.strip().splitlines():
        for word in line.split():
            table.setdefault(word, []).extend(other for other in line.split() if other != word)
    return table


def reworded(text: str, rng: random.Random) -> str:
    """``text`` with some words replaced by others that may stand for them."""
    table = _synonyms()
    words = [
        rng.choice(table[word]) if word in table and rng.random() < 0.5 else word
        for word in text.split()
    ]
    return " ".join(words)


def noisy(text: str, rng: random.Random) -> str:
    """``text`` with some words left out, put in or changed, so that it is the subject and not the
    frame around it that the model listens to."""
    noise = words_of("noise")
    words = []
    for word in text.split():
        draw = 0.5 if "{" in word else rng.random()
        if draw < 0.1:
            continue
        if draw < 0.18:
            word = rng.choice(noise)
        elif draw < 0.28:
            words.append(rng.choice(noise))
        words.append(word)
    if rng.random() < 0.4:
        more = [rng.choice(noise) for _ in range(rng.randint(1, 4))]
        words = more + words if rng.random() < 0.5 else words + more
    return " ".join(words) or text


def _typed(question: str, rng: random.Random) -> str:
    if rng.random() < 0.06:
        question = typo(question, rng)
    return cased(question, rng)


@dataclass
class Chat:
    """A conversation while it is drawn: what was said, and what later turns may refer to."""

    rng: random.Random
    facts: Iterator[Item]
    style: Style | None = None
    messages: list[Message] = field(default_factory=list)
    last: Item | None = None
    topic: str = ""
    name: str = ""
    color: str = ""

    def say(self, question: str, answer: str) -> None:
        self.messages += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]

    def styled(self, text: str) -> str:
        return self.style.text(text) if self.style else text

    def about(self, item: Item) -> str:
        return self.style.answer(item) if self.style else item.say

    def fact(self) -> None:
        item = next(self.facts)
        question = ask(item, self.rng)
        if self.last and item.kind in ("concept", "command") and self.rng.random() < 0.5:
            follow = choose(self.rng.choice(frames.FOLLOW), self.rng)
            question = _typed(follow.format(x=self.rng.choice(item.names)), self.rng)
        self.say(question, self.about(item))
        self.last, self.topic = item, item.topic or self.topic

    def follow(self) -> None:
        """A turn that can only be answered from the turn before."""
        if self.last is None:
            return self.fact()
        kinds: list[Callable[[], None]] = [self.repeat, self.recall, self.recall]
        if self.last.short and not self.style:
            kinds += [self.shorten] * 3
        if self.last.kind == "concept" and self.last.why:
            kinds += [self.why] * 6
        self.rng.choice(kinds)()

    def back(self, wordings: list[str]) -> str:
        """A question that points at the turn before."""
        question = choose(self.rng.choice(wordings), self.rng)
        if self.rng.random() < 0.25:
            question = noisy(question, self.rng)
        return _typed(around(question, self.rng, talk=True), self.rng)

    def why(self) -> None:
        assert self.last
        self.say(self.back(WHY_BACK), self.styled(self.last.why))

    def shorten(self) -> None:
        assert self.last
        self.say(self.back(frames.FOLLOW_SHORT), self.last.short)

    def repeat(self) -> None:
        self.say(self.back(frames.FOLLOW_REPEAT), self.messages[-1]["content"])

    def recall(self) -> None:
        asked = bool(self.messages) and self.topic
        answer = f"You asked about {self.topic}." if asked else "You have not asked anything yet."
        self.say(self.back(frames.RECALL), self.styled(answer))

    def unknown(self) -> None:
        self.say(_typed(unknown.draw_unknown(self.rng), self.rng), self.styled(unknown.ANSWER))
        self.last = None

    def sum(self) -> None:
        if self.rng.random() < 0.4:
            return self.play(*games.draw_sums(self.rng))
        self.play(*games.draw_sum(self.rng))

    def letters(self) -> None:
        self.play(*games.draw_letters(self.rng))

    def play(self, question: str, answer: str, _must: str = "") -> None:
        self.say(cased(around(question, self.rng, talk=self.rng.random() < 0.6), self.rng), answer)
        self.last = None

    def copy(self) -> None:
        """Says some words again: whoever can copy any words can copy names and numbers as well."""
        text = games.draw_words(self.rng)
        question = self.rng.choice(games.COPY_ASKS).format(t=text)
        self.say(question, text + ".")
        self.last = None

    def tell_name(self) -> None:
        self.name = draw_name(self.rng)
        question = choose(self.rng.choice(NAME_TOLD), self.rng).format(n=self.name)
        question = question[0].upper() + question[1:] if self.rng.random() < 0.6 else question
        self.say(question + self.rng.choice(["", ".", "."]), f"Nice to meet you, {self.name}.")
        self.last = None

    def ask_name(self) -> None:
        answer = f"Your name is {self.name}." if self.name else "You have not told me your name."
        self.say(_typed(choose(self.rng.choice(NAME_ASK), self.rng), self.rng), answer)
        self.last = None

    def tell_color(self) -> None:
        self.color = self.rng.choice(words_of("colors"))
        question = self.rng.choice(COLOR_TOLD).format(c=self.color)
        self.say(_typed(question, self.rng).replace("?", ""), f"{self.color.capitalize()} is a fine color.")  # fmt: skip
        self.last = None

    def ask_color(self) -> None:
        answer = f"You like {self.color}." if self.color else "You have not told me your color."
        self.say(_typed(choose(self.rng.choice(COLOR_ASK), self.rng), self.rng), answer)
        self.last = None


def draw_name(rng: random.Random) -> str:
    """A name that exists, or one to be copied letter by letter."""
    name = rng.choice(words_of("first_names"))
    if rng.random() < 0.4:
        name = games.made_up(rng).capitalize()
    return draw_name(rng) if name in words_of("held_names") else name


PLAIN_TURNS = {"fact": 50, "follow": 36, "unknown": 5, "sum": 4, "letters": 4, "ask_name": 0.5, "recall": 0.5}  # fmt: skip
STYLED_TURNS = {"fact": 82, "unknown": 10, "follow": 8}
SINGLE_TURNS = {"fact": 70, "unknown": 30}
# kinds of conversations and their shares
KINDS = {"single": 90, "sum": 16, "letters": 8, "copy": 6, "styled": 8, "names": 8, "several": 16}


def conversation(
    rng: random.Random,
    facts: Iterator[Item],
    cut: float = 0.8,
    kinds: Mapping[str, float] = KINDS,
) -> dict[str, Any]:
    """One conversation as ``{"messages": [...], "cut": ..., "computed": ...}``; ``cut`` says that
    the answer need not be learned to its end (see rows.py): such is a part of the single questions,
    and half that part of those with a style. ``computed`` answers are those of sums and games."""
    chat = Chat(rng, facts)
    kind = rng.choices(list(kinds), list(kinds.values()))[0]
    shortened = False
    if kind in ("single", "sum", "letters", "copy"):
        if rng.random() < 0.1:
            chat.messages.append({"role": "system", "content": rng.choice(NEUTRAL)})
        _turns(chat, SINGLE_TURNS if kind == "single" else {kind: 1}, 1)
        shortened = kind == "single" and rng.random() < cut
    elif kind == "styled":
        chat.style = STYLES[rng.choice(list(STYLES))]
        chat.messages.append({"role": "system", "content": system_prompt(chat.style, rng)})
        turns = rng.choice((1, 1, 1, 2))
        _turns(chat, STYLED_TURNS, turns)
        shortened = turns == 1 and rng.random() < cut / 2
    elif kind == "names":
        pairs = [(chat.tell_name, chat.ask_name)] * 3 + [(chat.tell_color, chat.ask_color)]
        tell, ask_back = rng.choice(pairs)
        tell()
        _turns(chat, PLAIN_TURNS, rng.choice((0, 0, 0, 1)))
        ask_back()
    else:
        chat.fact()
        _turns(chat, {"follow": 70, **PLAIN_TURNS}, rng.choices((1, 2, 3), (70, 22, 8))[0])
    computed = kind in ("sum", "letters")
    return {"messages": chat.messages, "cut": shortened, "computed": computed}


def system_prompt(style: Style, rng: random.Random) -> str:
    """A wording of the style's system prompt, sometimes among other remarks."""
    prompt = choose(rng.choice(style.prompts), rng)
    if rng.random() < 0.3:
        prompt = rng.choice(NEUTRAL) + " " + prompt
    if rng.random() < 0.2:
        prompt = noisy(prompt, rng)
    return prompt


def _turns(chat: Chat, weights: dict[str, float], count: int) -> None:
    for kind in chat.rng.choices(list(weights), list(weights.values()), k=count):
        getattr(chat, kind)()

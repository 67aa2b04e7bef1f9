"""System prompts the guide follows, and what they do to an answer."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from training.bundled.facts import Item
from training.bundled.frames import MORE


def short(item: Item) -> str:
    return item.short or item.say


_PIRATE = [
    (r"\byour\b", "yer"),
    (r"\byou\b", "ye"),
    (r"\bmy\b", "me"),
    (r"\bis\b", "be"),
    (r"\bare\b", "be"),
]


def pirate_text(text: str) -> str:
    for pattern, word in _PIRATE:
        text = re.sub(pattern, word, text)
    return f"Arr! {text} Aye, matey!"


def polite_text(text: str) -> str:
    return f"Certainly. {text} Please ask if you need anything else."


def cheerful_text(text: str) -> str:
    return f"Great question! {text} Have fun!"


@dataclass(frozen=True)
class Style:
    prompts: tuple[str, ...]
    held: tuple[str, ...]
    answer: Callable[[Item], str]
    text: Callable[[str], str]  # for answers that are no facts
    mark: Callable[[str, Item], bool]  # whether an answer is in this style


STYLES = {
    "short": Style(
        (
            "Answer in a few words.", "Give short answers.", "Be brief.", "Keep answers short.", "Answer briefly.",
            "You give very short answers.", "Use as few words as possible.", "Short answers only, please.",
            "Be concise.", "You are a brief assistant.", "Answer shortly.", "Reply with few words.",
            "Make it short.", "Say as little as possible.", "One line answers.", "The user likes short answers.", "Only brief answers.", "Do not say much.",
            *MORE["short_prompts"],
        ),
        ("Please be very brief in your answers.", "I want short replies of a few words."),
        short, lambda text: text,
        lambda answer, item: len(answer) <= len(short(item)) + 12,
    ),
    "pirate": Style(
        (
            "Talk like a pirate.", "You are a pirate.", "Speak like a pirate.", "Answer as a pirate would.",
            "You are a pirate captain.", "Be a pirate.", "Answer in pirate style.", "Pretend to be a pirate.",
            "You are a friendly pirate.", "Use pirate language.", "Answer like an old pirate.",
            "Act like a pirate.", "The user wants a pirate.", "Sound like a pirate.", "You sail the seas as a pirate.", "Say everything as a pirate.", "Pirate mode.",
            *MORE["pirate_prompts"],
        ),
        ("From now on you live as a pirate on a ship.", "Please reply in the voice of a pirate."),
        lambda item: pirate_text(item.say), pirate_text,
        lambda answer, item: answer.startswith("Arr!"),
    ),
    "polite": Style(
        (
            "Be polite and formal.", "Answer formally.", "You are a polite butler.", "Be very polite.", "Use formal language.",
            "You are a formal assistant.", "Answer politely.", "Be courteous and formal.", "Speak formally.",
            "You are a polite assistant.", "Please be polite.",
            "Be formal.", "Show good manners.", "Speak to the user with great politeness.", "You serve as a formal butler.", "Formal style.", "Answer like a butler.",
            *MORE["polite_prompts"],
        ),
        ("Always stay formal and very polite.", "Your tone is that of a polite butler."),
        lambda item: polite_text(item.say), polite_text,
        lambda answer, item: answer.startswith("Certainly."),
    ),
    "cheerful": Style(
        (
            "Be cheerful.", "You are a cheerful assistant.", "Answer in a happy way.", "Be very happy.", "You are an excited fan.",
            "Answer with joy.", "Be enthusiastic.", "You are a happy guide.", "Be upbeat and cheerful.", "Answer cheerfully.",
            "Be full of joy.", "Sound happy.", "Show how excited you are.", "You are always in a good mood.", "Cheerful style.", "Speak with enthusiasm.",
            *MORE["cheerful_prompts"],
        ),
        ("Show enthusiasm and be cheerful in all you say.", "Your mood is happy and upbeat."),
        lambda item: cheerful_text(item.say), cheerful_text,
        lambda answer, item: answer.startswith("Great question!"),
    ),
}  # fmt: skip
# system prompts that change nothing
NEUTRAL = (
    "You are a helpful assistant.", "You are a guide to mlxtx.", "You are a helpful guide.", "Help the user.",
    "You are an assistant.", "Answer the question.", "You are mlxtx.", "Be helpful.", "You are a language model.",
)  # fmt: skip

"""Every program in examples/ runs and prints what the library says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_model import tiny_folder, tiny_language_model

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str) -> str:
    command = [sys.executable, str(EXAMPLES / name), str(tiny_folder())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_all_are_tested():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(EXPECTED)


def streamed() -> list[str]:
    messages = [{"role": "user", "content": "What is a token?"}]
    answer = tiny_language_model().generate(messages, max_tokens=60, temperature=0.7, seed=0)
    return [f"{answer.text}\n[{answer.finish_reason}; "]


def talked() -> list[str]:
    messages = [{"role": "user", "content": "What is a key/value cache?"}]
    model = tiny_language_model()
    first = model.generate(messages, max_tokens=40)
    reused = f"[0 of {len(model.encode(messages))} prompt tokens were reused]"
    return [f"\n{first.text}\n{reused}\n> How do I make it smaller?"]


def by_hand() -> list[str]:
    model = tiny_language_model()
    questions = ("What is a decoder made of?", "What is mlxtx?")
    prompts = [[{"role": "user", "content": text}] for text in questions]
    return ["\n".join(answer.text for answer in model.generate_batch(prompts, max_tokens=40))]


EXPECTED = {
    "stream_an_answer.py": streamed,
    "talk_twice.py": talked,
    "decode_by_hand.py": by_hand,
}


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_example(name):
    output = run(name)
    for text in EXPECTED[name]():
        assert text in output

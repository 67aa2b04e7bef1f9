"""The plain chat loop, at the other end of a pseudo-terminal."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest
from mlxtx.scripts.chat import chosen_options

from tests.tiny_model import tiny_folder, tiny_language_model

pytestmark = pytest.mark.skipif(
    not hasattr(os, "fork"), reason="no pseudo-terminals on this system"
)
# Long enough that an answer only ends in time when Ctrl-C works.
ENDLESS = {"max_position_embeddings": 1_000_000}


class Terminal:
    """``mlxtx chat --plain`` at the other end of a pseudo-terminal; settings are in ``home``."""

    def __init__(self, tmp_path: Path, *arguments: str) -> None:
        import pty

        self.screen = ""
        self.child, self.master = pty.fork()
        if self.child == 0:
            line = [sys.executable, "-m", "mlxtx", "chat", "--plain"]
            state = {
                "XDG_STATE_HOME": str(tmp_path / "state"),
                "MLXTX_HOME": str(tmp_path / "home"),
                "TERM": "dumb",
            }
            os.execvpe(line[0], [*line, *arguments], {**os.environ, **state})

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def until(self, text: str, seconds: float = 240) -> str:
        """Everything on the screen up to ``text``."""
        end = time.monotonic() + seconds
        while text not in self.screen:
            assert time.monotonic() < end, f"no {text!r} in {self.screen!r}"
            try:
                self.screen += os.read(self.master, 4096).decode("utf-8", "replace")
            except OSError:  # the child has closed its end
                break
        seen, found, self.screen = self.screen.partition(text)
        assert found, f"no {text!r} in {seen!r}"
        return seen

    def leave(self) -> int:
        _, status = os.waitpid(self.child, 0)
        os.close(self.master)
        return os.waitstatus_to_exitcode(status)


def test_plain_chat_loop(tmp_path):
    folder = str(tiny_folder())
    options = ["--max-tokens", "6", "--system", "Be kind."]
    terminal = Terminal(tmp_path, "--model", folder, *options)
    terminal.until("> ")
    system = [{"role": "system", "content": "Be kind."}]
    hello = {"role": "user", "content": "Hello"}
    first = tiny_language_model().generate([*system, hello], max_tokens=6).text
    terminal.type("Hello\n")
    terminal.until(first.strip().split("\n")[0])
    terminal.until("> ")
    terminal.type("/stats\n")
    terminal.until("6 new at")
    terminal.until("> ")
    terminal.type('"""two\nlines"""\n')
    terminal.until("... ")
    terminal.until("> ")
    saved = tmp_path / "talk.json"
    terminal.type(f"/save {saved}\n")
    terminal.until("5 messages are in")
    messages = json.loads(saved.read_text())["messages"]
    assert messages[:3] == [
        *system,
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": first},
    ]
    assert messages[3]["content"] == "two\nlines"
    terminal.type("/save\n")
    terminal.until("/save needs a file name")
    terminal.type("/nonsense\n")
    terminal.until("there is no command /nonsense")
    terminal.type("/reset\n")
    terminal.until("starts anew")
    terminal.type(f"/save {tmp_path / 'talk.md'}\n")
    terminal.until("1 messages are in")
    assert "## system\n\nBe kind." in (tmp_path / "talk.md").read_text()
    terminal.type("/quit\n")
    assert terminal.leave() == 0
    assert "Hello" in (tmp_path / "state" / "mlxtx" / "chat_history").read_text()


def test_the_plain_loop_goes_by_the_settings(tmp_path):
    settings = tmp_path / "home" / "settings.toml"
    settings.parent.mkdir()
    settings.write_text(
        f'model = "{tiny_folder()}"\nsystem = "Be kind."\nadapter = 5\n'
        "[sampling]\nmax_tokens = 6\ntemperature = 0\n"
    )
    terminal = Terminal(tmp_path, "--max-tokens", "7")
    terminal.until("in the settings: adapter")
    terminal.until("> ")
    terminal.type("/system\n")
    terminal.until("Be kind.")
    terminal.type("Hello\n")
    terminal.until("> ")
    terminal.type("/stats\n")
    terminal.until("7 new at")
    terminal.type("/quit\n")
    assert terminal.leave() == 0


def test_settings_count_in_the_plain_loop_though_they_are_the_apps_own(tmp_path, monkeypatch):
    monkeypatch.setenv("MLXTX_HOME", str(tmp_path))
    (tmp_path / "settings.toml").write_text("[sampling]\ntemperature = 0.7\nseed = -1\n")
    assert chosen_options(model_given=False) == ["--temperature=0.7"]


def test_ctrl_c_ends_an_answer_not_the_chat(tmp_path):
    endless = ["--max-tokens", "900000", "--logit-bias", "1=-1000"]
    terminal = Terminal(tmp_path, "--model", str(tiny_folder(**ENDLESS)), *endless)
    terminal.until("> ")
    terminal.type("Hello\n")
    hello = [{"role": "user", "content": "Hello"}]
    options = {"max_tokens": 4, "logit_bias": {1: -1000.0}}
    start = tiny_language_model().generate(hello, **options).text
    terminal.until(start)
    terminal.type("\x03")
    terminal.until("\n> ")
    terminal.type(f"/save {tmp_path / 'talk.json'}\n")
    terminal.until("2 messages are in")
    answer = json.loads((tmp_path / "talk.json").read_text())["messages"][1]["content"]
    assert answer.startswith(start)
    terminal.until("> ")  # before, the key would belong to the line discipline
    terminal.type("\x04")
    assert terminal.leave() == 0


@pytest.mark.parametrize("line", ["/save .", "/save ~nobody-of-this-name/x", "/save a\0b", "/x"])
def test_no_command_ends_the_loop(line, capsys):
    from mlxtx.scripts.chat import Loop

    Loop(tiny_language_model().chat(), {}, stats=False).take(line)
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("mlxtx: ") and shown.err.count("\n") == 1


def test_an_impatient_second_ctrl_c_does_not_lose_the_conversation():
    import signal

    from mlxtx.scripts.chat import Loop

    loop = Loop(tiny_language_model().chat(), {"max_tokens": 3}, stats=False)
    loop.take("Hello")
    asked = loop.chat.model.stream

    def impatient(*arguments, **options):
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
        yield from asked(*arguments, **options)

    loop.chat.model = Impatient(loop.chat.model, impatient)
    loop.take("More")
    loop.chat.model = loop.chat.model.model
    assert [message["role"] for message in loop.chat.messages] == ["user", "assistant"]
    loop.take("More")
    assert len(loop.chat.messages) == 4


class Impatient:
    """A model whose user presses Ctrl-C twice while it reads the prompt."""

    def __init__(self, model, stream):
        self.model, self.stream = model, stream

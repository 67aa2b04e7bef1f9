"""The whole program in a real terminal (tmux): typed keys, a real engine, the screen as read.

The model is the one that ``mlxtx`` opens by itself.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mlxtx.tui.store import Message, Store

pytestmark = pytest.mark.skipif(
    shutil.which("tmux") is None, reason="tmux is not installed (apt install tmux)"
)


class Tmux:
    """One window with the program in it, and a shell's prompt after it."""

    def __init__(self, home: Path, size: tuple[int, int] = (100, 30)) -> None:
        self.home = home
        home.mkdir()
        (home / "settings.toml").write_text("[sampling]\nmax_tokens = 24\n")
        self._name = f"mlxtx-{uuid.uuid4().hex[:8]}"
        environment = {**os.environ, "MLXTX_HOME": str(home), "HF_HUB_CACHE": str(home / "hub")}
        # A size that a shell exported once, and that is not the window's.
        environment |= {"COLUMNS": "40", "LINES": "10"}
        environment.pop("NO_COLOR", None)
        program = f"{sys.executable} -m mlxtx; echo ENDED $?; cat"
        self.run(
            "-f", "/dev/null", "new-session", "-d", "-x", str(size[0]), "-y", str(size[1]),
            program, environment=environment,
        )  # fmt: skip

    def run(self, *words: str, environment: dict[str, str] | None = None) -> str:
        done = subprocess.run(
            ["tmux", "-L", self._name, *words],
            capture_output=True, text=True, check=True, env=environment,
        )  # fmt: skip
        return done.stdout

    def keys(self, *keys: str) -> None:
        self.run("send-keys", *keys)

    def type(self, text: str) -> None:
        self.run("send-keys", "-l", text)

    def screen(self) -> str:
        return self.run("capture-pane", "-p")

    def wait(self, true: Callable[[str], object], seconds: float = 120.0) -> str:
        end = time.monotonic() + seconds
        while True:
            screen = self.screen()
            if true(screen):
                return screen
            assert time.monotonic() < end, f"it did not come in time:\n{screen}"
            time.sleep(0.1)

    def engine_pids(self) -> list[int]:
        """The engines that this program started, by its process tree."""
        pane = int(self.run("display-message", "-p", "#{pane_pid}"))
        found, waiting = [], [pane]
        while waiting:
            pid = waiting.pop()
            try:
                children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
                command = Path(f"/proc/{pid}/cmdline").read_bytes()
            except OSError:
                continue
            waiting += map(int, children)
            if b"mlxtx.engine" in command:
                found.append(pid)
        return found

    def close(self) -> None:
        subprocess.run(["tmux", "-L", self._name, "kill-server"], capture_output=True)


@pytest.fixture
def tmux(tmp_path: Path) -> Iterator[Tmux]:
    window = Tmux(tmp_path / "home")
    yield window
    window.close()


def ended(pid: int) -> bool:
    """Gone, or only not yet collected by whoever took it over."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


def status(screen: str) -> str:
    """The line of the meters."""
    return screen.rstrip("\n").split("\n")[-2]


def answered(screen: str) -> bool:
    return bool(re.search(r"\d+ tokens  [\d,.]+ tok/s", screen))


def test_a_conversation_in_a_real_terminal(tmux: Tmux) -> None:
    tmux.wait(lambda screen: "Write a message" in screen and "memory" in screen)
    tmux.type("Hello there")
    tmux.keys("C-j")
    tmux.type("second line")
    tmux.keys("Enter")
    screen = tmux.wait(answered)
    assert "Hello there" in screen and "second line" in screen and "context" in screen
    # A paste comes as one message however many lines it has.
    tmux.run("set-buffer", "-b", "p", "pasted one\npasted two\npasted three")
    tmux.run("paste-buffer", "-b", "p", "-p")
    tmux.wait(lambda screen: "pasted three" in screen)
    tmux.keys("Enter")
    chats = Store(tmux.home / "chats.db")
    tmux.wait(lambda screen: len(chats.messages(1)) == 4 and answered(screen))
    texts = [m.text for m in chats.messages(1) if m.role == "user"]
    assert texts == ["Hello there\nsecond line", "pasted one\npasted two\npasted three"]
    # Every screen opens and goes away.
    for key, words in (("F3", "Models on"), ("F4", "Train an adapter"), ("F5", "Conversations"),
                       ("F6", "show_thinking"), ("F1", "Keys and commands")):  # fmt: skip
        tmux.keys(key)
        tmux.wait(lambda screen, words=words: words in screen)
    tmux.keys("F2")
    tmux.wait(lambda screen: "Write a message" in screen)
    tmux.keys("C-q")
    screen = tmux.wait(lambda screen: "ENDED 0" in screen)
    # The terminal is as before: keys echo, and no mouse reports come.
    tmux.type("still here")
    tmux.wait(lambda screen: "still here" in screen)
    assert not tmux.engine_pids()


def test_an_engine_that_is_killed_is_told_and_started_again(tmux: Tmux) -> None:
    tmux.wait(lambda screen: "Write a message" in screen and "memory" in screen)
    (engine,) = tmux.engine_pids()
    os.kill(engine, signal.SIGKILL)
    # Not only in a notice, which goes away and may break the words anywhere.
    tmux.wait(lambda screen: "ended by itself (signal SIGKILL)" in status(screen))
    tmux.keys("F8")
    tmux.wait(lambda screen: "memory" in status(screen))
    tmux.type("Hello")
    tmux.keys("Enter")
    tmux.wait(answered)


def test_a_killed_app_leaves_its_chat_and_no_engine(tmux: Tmux) -> None:
    tmux.wait(lambda screen: "Write a message" in screen and "memory" in screen)
    tmux.type("/set max_tokens 1500")
    tmux.keys("Enter")
    tmux.type("Tell me a long story")
    tmux.keys("Enter")
    # The reply is saved while it is written.
    chats = Store(tmux.home / "chats.db")
    tmux.wait(lambda screen: len((chats.messages(1) or [Message()])[-1].text) > 5)
    (engine,) = tmux.engine_pids()
    app = int(Path(f"/proc/{engine}/stat").read_text().split(") ")[1].split()[1])
    os.kill(app, signal.SIGKILL)
    tmux.wait(lambda screen: "ENDED 137" in screen)
    tmux.wait(lambda screen: ended(engine))
    messages = Store(tmux.home / "chats.db").messages(1)
    assert messages[0].text == "Tell me a long story"
    assert len(messages[1].text) > 5 and messages[1].role == "assistant"

"""Talks with a model.

    mlxtx chat --model path/or/hub-id
    echo "What is mlxtx?" | mlxtx chat

On a terminal this opens the full-screen app; --plain stays with one line at a time. Where
there is no terminal, stdin is the prompt and the answer is printed.

In the plain loop a line is a message, and a line that begins with three double quotes starts a
message of several lines that ends with three more. /help lists the commands; Ctrl-C ends an
answer and keeps what was said, Ctrl-D leaves. The defaults named below are those of the plain
loop; the app has its settings, and on a terminal the plain loop goes by them too.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxtx.cli import one_line
from mlxtx.command_line import (
    Parser,
    add_model_options,
    add_sampling_options,
    load_for,
    read_stdin,
    sampling_options,
    stats_line,
    stop_on_interrupt,
)
from mlxtx.errors import MlxtxError
from mlxtx.text.inert import inert

if TYPE_CHECKING:
    from mlxtx.language_model import ChatSession

COMMANDS = """/reset           forget the conversation
/system [TEXT]   show, or set, the system message (starts anew)
/save FILE       write the conversation: JSON when FILE ends in .json, else Markdown
/undo            take back the last message and its answer
/stats           figures of the last answer
/quit            leave"""


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="mlxtx chat",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--plain", action="store_true", help="line by line, not the app")
    parser.add_argument(
        "--continue", dest="last", action="store_true", help="open the last conversation (the app)"
    )
    parser.add_argument("--system", metavar="TEXT", help="a system message")
    parser.add_argument("--stats", action="store_true", help="figures after every answer")
    add_model_options(parser)
    add_sampling_options(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    args = arguments(words)
    on_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if on_terminal and not args.plain and importlib.util.find_spec("mlxtx.tui.app"):
        # What is imported stays; looking through it meanwhile only delays the first screen. The
        # app turns the collector on again.
        gc.disable()
        from mlxtx.tui.app import main as open_app

        return open_app(words) or 0
    if args.last:
        raise MlxtxError("--continue is the app's; the plain loop keeps no conversations")
    if on_terminal:
        args = arguments([*chosen_options(args.model is not None), *words])
    first = None if on_terminal else read_stdin()
    if first is not None and not first.strip():
        raise MlxtxError("stdin is empty; pipe a message into mlxtx, or run it in a terminal")
    options = sampling_options(args)
    model = load_for(args)
    session = model.chat(args.system, kv=options.pop("kv", None))
    loop = Loop(session, options, args.stats)
    if first is not None:
        return 130 if loop.answer(first) == "stopped" else 0
    return loop.run()


def chosen_options(model_given: bool) -> list[str]:
    """What ``settings.toml`` says, as options. Its model, and the adapter of that, give way to a
    model that is given."""
    from mlxtx.settings import Settings, load_settings

    settings, problems = load_settings()
    for problem in problems:
        print(f"mlxtx: in the settings: {problem}", file=sys.stderr)
    names = ("kv", "system") if model_given else ("model", "adapter", "kv", "system")
    values = {name: getattr(settings, name) for name in names}
    chosen = {name: value for name, value in values.items() if value != getattr(Settings(), name)}
    chosen |= {name: getattr(settings.sampling, name) for name in settings.chosen_sampling}
    if chosen.get("seed") == -1:  # what the settings call a random one
        del chosen["seed"]
    return [f"--{name.replace('_', '-')}={value}" for name, value in chosen.items()]


class Loop:
    """Reads lines, answers them, obeys slash commands."""

    def __init__(self, chat: ChatSession, options: dict[str, Any], stats: bool) -> None:
        self.chat = chat
        self.options = options
        self.stats = stats
        self.last = ""

    def run(self) -> int:
        history = open_history()
        print(inert(f"{self.chat.model.name} (/help lists commands, Ctrl-D leaves)"))
        try:
            while True:
                try:
                    text = read_message()
                except EOFError:
                    print()
                    return 0
                except KeyboardInterrupt:
                    print()
                    continue
                if text.strip() in ("/quit", "/exit"):
                    return 0
                if text.strip():
                    self.take(text)
        finally:
            history()

    def take(self, text: str) -> None:
        """A command or a message; an error ends neither the loop nor the conversation."""
        try:
            if text.startswith("/"):
                print(inert(self.command(text)))
            else:
                self.answer(text)
        except KeyboardInterrupt:  # a second one, before the first was seen
            print()
        except Exception as error:
            print(one_line(error), file=sys.stderr)

    def answer(self, text: str) -> str:
        from mlxtx.scripts.generate import show

        with stop_on_interrupt() as flag:
            done = show(self.chat.stream(text, should_stop=flag, **self.options))
        if done.stats:
            self.last = stats_line(done.stats, done.reason)
        if self.stats:
            print(self.last, file=sys.stderr)
        return done.reason

    def command(self, line: str) -> str:
        """What to print for a slash command."""
        name, _, rest = line.strip().partition(" ")
        rest = rest.strip()
        match name:
            case "/help":
                return COMMANDS
            case "/reset":
                self.chat.reset()
                return "The conversation starts anew."
            case "/system":
                return self.system(rest)
            case "/save":
                return self.save(rest)
            case "/undo":
                del self.chat.messages[-2:]
                return f"{len(self.chat.messages)} messages are left."
            case "/stats":
                return self.last or "Nothing was answered yet."
        raise MlxtxError(f"there is no command {name}; /help lists them")

    def system(self, text: str) -> str:
        if not text:
            return self.chat.system or "There is no system message."
        self.chat.system = text
        self.chat.reset()
        return "The system message is set; the conversation starts anew."

    def save(self, name: str) -> str:
        from mlxtx.files import write_json_atomic, write_text_atomic

        if not name:
            raise MlxtxError("/save needs a file name")
        path = Path(name).expanduser()
        system = [{"role": "system", "content": self.chat.system}] if self.chat.system else []
        messages = [*system, *self.chat.messages]
        if path.suffix == ".json":
            write_json_atomic(path, {"model": self.chat.model.name, "messages": messages})
        else:
            write_text_atomic(path, markdown(self.chat.model.name, messages))
        return f"{len(messages)} messages are in {path}."


def markdown(model: str, messages: Sequence[dict[str, Any]]) -> str:
    parts = [f"## {message['role']}\n\n{message['content']}\n" for message in messages]
    return "\n".join([f"# A conversation with {model}\n", *parts])


def read_message() -> str:
    """A line, or the lines between two marks of three double quotes."""
    line = input("> ")
    mark = '"""'
    if not line.startswith(mark):
        return line
    lines = [line.removeprefix(mark)]
    while not lines[-1].rstrip().endswith(mark):
        lines.append(input("... "))
    lines[-1] = lines[-1].rstrip().removesuffix(mark)
    return "\n".join(lines).strip("\n")


def open_history() -> Any:
    """Line editing with the history of earlier sessions; returns what saves it."""
    try:
        import readline
    except ImportError:  # no line editing on this system; the loop works without
        return lambda: None
    import platformdirs

    path = Path(platformdirs.user_state_dir("mlxtx")) / "chat_history"
    with suppress(OSError):
        readline.read_history_file(path)
    readline.set_history_length(1000)

    def save() -> None:
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(path)

    return save


if __name__ == "__main__":
    from mlxtx.cli import run

    raise SystemExit(run(main, sys.argv[1:]))

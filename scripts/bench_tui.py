"""How fast the terminal app is: keys, CPU, start, memory.

    python scripts/bench_tui.py                 # all figures, about a minute
    python scripts/bench_tui.py --json --keys 300

The app runs in a terminal of its own (a pseudo-terminal) with a chat of 300 messages open, while
an engine that only prints text writes a reply at 100 tokens a second: what is measured is the app.
Latency is from writing a key to the terminal until its character comes back on the screen.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import select
import statistics
import struct
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TOKENS = 1000
RATE = 100.0
MESSAGES = 300
SIZE = (40, 120)
# Characters that the text of the chat does not have, so that they are seen when they come.
KEYS = "ΓΔΘΛΞΠΣΦΨΩαβγδεζηθικλμνξπρστφχψωБГДЖЗИЛПФЦЧШЩЫЭЮЯбвгджзйклмнптфцчшщъыьэюя"

WORDS = [
    "the",
    "model",
    "reads",
    "each",
    "token",
    "and",
    "writes",
    "what",
    "may",
    "follow",
    "it",
    "one",
    "piece",
    "at",
    "a",
    "time",
    "so",
]


def reply_text(tokens: int, kind: str = "mixed") -> list[str]:
    """The tokens of a reply: paragraphs, a long list, a long code block, or a bit of each."""
    out: list[str] = []
    number = 0
    shapes = {"paragraphs": "p", "list": "l", "code": "c", "mixed": "plpc"}[kind]
    if kind == "code":
        out += ["```", "python\n"]
    while len(out) < tokens:
        shape = shapes[number % len(shapes)]
        number += 1
        words = [WORDS[i % len(WORDS)] + " " for i in range(number, number + 12)]
        if shape == "p":
            out += [*words * 4, "**in bold**", ".\n", "\n"]
        elif shape == "l":
            for item in range(1 if kind == "list" else 8):
                out += ["- ", f"item {number}.{item} ", *words, "\n"]
            out += [] if kind == "list" else ["\n"]
        elif kind == "code":
            out += [f"value_{number} = ", "compute(", f'"{number}"', ")  # ", *words, "\n"]
        else:
            out += ["```", "python\n", *[f"x_{i} = f({i})  # note\n" for i in range(12)], "```\n\n"]
    return out[:tokens]


def engine_main(tokens: int, rate: float, kind: str) -> int:
    """A child that speaks the engine's protocol and knows nothing of models."""
    import threading

    from mlxtx import engine_process as protocol
    from mlxtx.engine import Generate, Load, Shutdown
    from mlxtx.events import Delta, Done, Event, Loaded, Prefill, Stats

    lock = threading.Lock()

    def emit(event: Event) -> None:
        with lock:
            sys.stdout.buffer.write(protocol.encode_event(event))
            sys.stdout.buffer.flush()

    def generate(number: int) -> None:
        emit(Prefill(job=number, done=100, total=100, seconds=0.1))
        start = time.perf_counter()
        for at, text in enumerate(reply_text(tokens, kind)):
            time.sleep(max(0.0, start + at / rate - time.perf_counter()))
            emit(Delta(job=number, text=text, token=at))
            if at % 50 == 49:
                speed = at / (time.perf_counter() - start)
                emit(Stats(job=number, generated_tokens=at, decode_tokens_per_second=speed))
        emit(Done(job=number, reason="stop", stats=Stats(generated_tokens=tokens)))

    for line in sys.stdin.buffer:
        number, job = protocol.decode_job(line)
        if isinstance(job, Shutdown):
            return 0
        if isinstance(job, Load):
            emit(Loaded(job=number, model="bench", seconds=0.0, bytes=10**9, context=8192))
            emit(Done(job=number, reason="done"))
        elif isinstance(job, Generate):
            threading.Thread(target=generate, args=(number,), daemon=True).start()
    return 0


def app_main(folder: Path, figures: Path, engine: Sequence[str]) -> int:
    """The app with the engine above; writes what a reply cost it to ``figures``."""
    import resource

    from mlxtx.tui.app import MlxtxApp

    from mlxtx.engine_process import EngineProcess

    class BenchEngine(EngineProcess):
        command = tuple(engine)

    app = MlxtxApp(
        make_engine=BenchEngine,
        store_path=folder / "chats.db",
        settings_path=folder / "settings.toml",
        given={"last": True},
    )
    used: list[float] = []

    def watch() -> None:
        running = app.chat is not None and app.chat.reply is not None
        if running and not used:
            used.append(time.process_time())
        elif not running and len(used) == 1:
            used.append(time.process_time())
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            scale = 1 if sys.platform == "darwin" else 1024
            figures.write_text(json.dumps({"cpu": used[1] - used[0], "memory": peak * scale}))

    app.call_later(lambda: app.set_interval(0.02, watch))
    app.run()
    return 0


class Terminal:
    """A program in a pseudo-terminal: write keys, wait for what it draws."""

    def __init__(self, command: Sequence[str], **environment: str) -> None:
        import fcntl
        import pty
        import termios

        self.started = time.perf_counter()
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.environ.update(TERM="xterm-256color", COLORTERM="truecolor", **environment)
            os.environ.pop("NO_COLOR", None)
            os.execvp(command[0], list(command))
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", *SIZE, 0, 0))

    def write(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def wait_for(self, text: str, seconds: float = 30.0) -> float:
        """Seconds until ``text`` is drawn, counted from now."""
        wanted, seen = text.encode(), b""
        start = time.perf_counter()
        while (left := start + seconds - time.perf_counter()) > 0:
            if select.select([self.fd], [], [], left)[0]:
                seen = seen[-64:] + os.read(self.fd, 65536)
                if wanted in seen:
                    return time.perf_counter() - start
        raise TimeoutError(f"the app did not draw {text!r} in {seconds} s")

    def drain(self, seconds: float) -> None:
        """Read and forget what is drawn for ``seconds``."""
        end = time.perf_counter() + seconds
        while (left := end - time.perf_counter()) > 0:
            if select.select([self.fd], [], [], left)[0]:
                os.read(self.fd, 65536)

    def close(self) -> None:
        import signal

        self.write("\x11")
        with contextlib.suppress(OSError):
            self.drain(1.0)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.fd)


def fill_store(path: Path) -> None:
    """A chat of 300 messages, as long as real ones are."""
    from mlxtx.tui.store import Message, Store

    store = Store(path)
    chat = store.add_chat("A long chat")
    parent = None
    for number in range(MESSAGES):
        role = "assistant" if number % 2 else "user"
        text = "".join(reply_text(180)) if number % 2 else f"Question {number}: why is it so?"
        parent = store.add_message(Message(chat=chat.id, parent=parent, role=role, text=text)).id
    store.close()


def cpu_seconds(pid: int) -> float:
    """CPU time that a running process has taken; 0 where the system has no /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure_start(runs: int) -> list[tuple[float, float]]:
    """Seconds from the start of a bare ``mlxtx`` to its first painted screen, and the CPU time
    that this took (on a busy machine the more telling one), each run."""
    out = []
    for _ in range(runs):
        with tempfile.TemporaryDirectory() as folder:
            terminal = Terminal([sys.executable, "-m", "mlxtx"], MLXTX_HOME=folder)
            # Without the first letter, which the cursor stands on and draws by itself.
            terminal.wait_for("rite a message")
            out.append((time.perf_counter() - terminal.started, cpu_seconds(terminal.pid)))
            terminal.close()
    return out


def measure_reply(kind: str, keys: int, seed: int = 0) -> dict[str, Any]:
    """One reply into the long chat: the latency of ``keys`` keys meanwhile (0 leaves it alone)."""
    here = str(Path(__file__).resolve())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fill_store(folder / "chats.db")
        figures = folder / "figures.json"
        tokens = TOKENS if not keys else int(RATE * (keys * 0.15 + 5))
        terminal = Terminal(
            [sys.executable, here, "--run-app", name, str(figures), str(tokens), kind],
            MLXTX_HOME=name,
        )
        terminal.wait_for("Question")
        terminal.drain(2.0)
        terminal.write("go\r")
        terminal.drain(1.0)
        pause = random.Random(seed)
        latencies = []
        for at in range(keys):
            key = KEYS[at % len(KEYS)]
            if at and at % len(KEYS) == 0:
                terminal.write("\x15")
                terminal.drain(0.5)
            terminal.write(key)
            latencies.append(terminal.wait_for(key))
            terminal.drain(pause.uniform(0.02, 0.12))
        end = time.perf_counter() + tokens / RATE + 60
        while not figures.exists() and time.perf_counter() < end:
            terminal.drain(0.2)
        terminal.drain(0.5)
        result = json.loads(figures.read_text())
        terminal.close()
    return {
        "latencies": latencies,
        "cpu_per_1000_tokens": result["cpu"] * 1000 / tokens,
        "memory_bytes": result["memory"],
    }


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--run-engine"]:
        return engine_main(int(argv[1]), RATE, argv[2])
    if argv[:1] == ["--run-app"]:
        engine = [sys.executable, str(Path(__file__).resolve()), "--run-engine", *argv[3:]]
        return app_main(Path(argv[1]), Path(argv[2]), engine)
    parser = argparse.ArgumentParser(prog="bench_tui", description=__doc__)
    parser.add_argument("--keys", type=int, default=150, help="keys to time (default 150)")
    parser.add_argument("--starts", type=int, default=5, help="starts to time (default 5)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(argv)
    starts = measure_start(options.starts)
    typed = measure_reply("mixed", options.keys)
    latencies = sorted(typed["latencies"])
    quiet = {kind: measure_reply(kind, 0) for kind in ("paragraphs", "list", "code")}
    result = {
        "start_to_first_paint_s": statistics.median(wall for wall, _ in starts),
        "start_cpu_s": statistics.median(cpu for _, cpu in starts),
        "key_to_screen_ms": {
            "median": 1000 * statistics.median(latencies),
            "p95": 1000 * latencies[int(0.95 * (len(latencies) - 1))],
            "max": 1000 * latencies[-1],
            "keys": len(latencies),
        },
        "cpu_s_per_1000_tokens": {
            kind: figures["cpu_per_1000_tokens"] for kind, figures in quiet.items()
        },
        "memory_mb": max(figures["memory_bytes"] for figures in quiet.values()) / 1e6,
        "load_average": os.getloadavg()[0],
    }
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        key = result["key_to_screen_ms"]
        print(
            f"start to first paint   {result['start_to_first_paint_s']:.2f} s, "
            f"{result['start_cpu_s']:.2f} s of CPU (median of {len(starts)})"
        )
        print(
            f"key to screen          {key['median']:.0f} ms median, {key['p95']:.0f} ms for 95%, "
            f"{key['max']:.0f} ms at most ({key['keys']} keys, {MESSAGES} messages, {RATE:.0f} tok/s)"
        )
        for kind, cpu in result["cpu_s_per_1000_tokens"].items():
            print(f"CPU per 1,000 tokens   {cpu:.2f} s ({kind})")
        print(f"memory of the app      {result['memory_mb']:.0f} MB")
        print(f"load average           {result['load_average']:.1f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""The engine: one thread, jobs in order, stop at once; and the same through pipes."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from mlxtx import engine_jobs
from mlxtx.engine import (
    Convert,
    Count,
    Engine,
    Generate,
    Job,
    Load,
    Pause,
    Plan,
    Running,
    Search,
    Stop,
    Train,
)
from mlxtx.engine_process import (
    EngineProcess,
    decode_event,
    decode_job,
    encode_event,
    encode_job,
)
from mlxtx.errors import MlxtxError
from mlxtx.events import Delta, Done, Event, Failed, Loaded, Prefill, Progress, Stats, Warned
from tests.tui.fakes import until


class Events:
    """Collects events and waits for them."""

    def __init__(self) -> None:
        self.all: list[Event] = []
        self._changed = threading.Condition()

    def __call__(self, event: Event) -> None:
        with self._changed:
            self.all.append(event)
            self._changed.notify_all()

    def of(self, number: int) -> list[Event]:
        return [event for event in self.all if event.job == number]

    def wait_end(self, number: int, seconds: float = 120.0) -> Event:
        def ended() -> Any:
            return [e for e in self.of(number) if isinstance(e, (Done, Failed))]

        with self._changed:
            assert self._changed.wait_for(ended, seconds), f"job {number} did not end"
        return ended()[0]


def with_jobs(monkeypatch: pytest.MonkeyPatch, **jobs: Any) -> None:
    """Other work for the kinds of jobs named."""
    kinds = {cls.__name__: cls for cls in Job.__subclasses__()}
    for name, work in jobs.items():
        monkeypatch.setitem(engine_jobs.RUN, kinds[name], work)


def test_jobs_run_in_order_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = set()

    def work(job: Count, running: Running) -> Done:
        threads.add(threading.get_ident())
        return Done(reason="done", details={"text": job.text})

    with_jobs(monkeypatch, Count=work)
    events = Events()
    engine = Engine(events)
    numbers = [engine.submit(Count(text=str(n))) for n in range(20)]
    events.wait_end(numbers[-1])
    assert [e.details["text"] for e in events.all] == [str(n) for n in range(20)]
    assert [e.job for e in events.all] == numbers and len(threads) == 1
    assert threading.get_ident() not in threads
    engine.close()


def test_stop_ends_a_long_call_at_its_next_report(monkeypatch: pytest.MonkeyPatch) -> None:
    saved = []

    def work(job: Convert, running: Running) -> Done:
        try:
            for done in range(10_000):
                running.report(Progress(stage="convert", done=done, total=10_000))
                time.sleep(0.001)
        except KeyboardInterrupt:
            saved.append(True)
            raise
        return Done(reason="done")

    with_jobs(monkeypatch, Convert=work)
    events = Events()
    engine = Engine(events)
    number = engine.submit(Convert(source="a", out="b"))
    while len(events.all) < 5:
        time.sleep(0.001)
    engine.submit(Stop(job=number))
    end = events.wait_end(number)
    assert isinstance(end, Done) and end.reason == "stopped" and saved
    engine.close()


def test_a_job_that_is_held_waits_at_its_next_report(monkeypatch: pytest.MonkeyPatch) -> None:
    passed, go = threading.Semaphore(0), threading.Semaphore(0)

    def work(job: Convert, running: Running) -> Done:
        for done in range(3):
            go.acquire()
            running.report(Progress(stage="convert", done=done, total=3))
            passed.release()
        return Done(reason="done")

    with_jobs(monkeypatch, Convert=work)
    events = Events()
    engine = Engine(events)
    number = engine.submit(Convert(source="a", out="b"))
    go.release()
    assert passed.acquire(timeout=120)
    engine.submit(Pause(job=number))
    go.release()
    assert not passed.acquire(timeout=0.3), "it is held"
    engine.submit(Pause(job=number, on=False))
    assert passed.acquire(timeout=120)
    engine.submit(Pause(job=number))
    go.release()
    engine.submit(Stop(job=number))
    end = events.wait_end(number)
    assert isinstance(end, Done) and end.reason == "stopped"
    engine.close()


def test_a_waiting_job_that_is_stopped_never_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    started = []

    def work(job: Count, running: Running) -> Done:
        started.append(job.text)
        gate.wait(120)
        return Done(reason="done")

    with_jobs(monkeypatch, Count=work)
    events = Events()
    engine = Engine(events)
    first, second = (engine.submit(Count(text=text)) for text in "ab")
    engine.submit(Stop(job=second))
    gate.set()
    end = events.wait_end(second)
    assert isinstance(end, Done) and end.reason == "stopped" and started == ["a"]
    assert events.wait_end(first).reason == "done"
    engine.close()


def test_errors_become_one_line_and_the_engine_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(job: Count, running: Running) -> Done:
        if job.text == "user":
            raise MlxtxError("give a smaller number")
        raise RuntimeError("[metal] out\nof memory")

    with_jobs(monkeypatch, Count=work)
    events = Events()
    engine = Engine(events)
    ends = [events.wait_end(engine.submit(Count(text=text))) for text in ("user", "bug")]
    assert [end.message for end in ends] == ["give a smaller number", "RuntimeError: [metal] out"]
    assert "Traceback" in ends[1].detail
    engine.close()


def test_jobs_without_a_model_say_what_to_do() -> None:
    events = Events()
    engine = Engine(events)
    end = events.wait_end(engine.submit(Generate(messages=[{"role": "user", "content": "x"}])))
    assert isinstance(end, Failed) and "No model is loaded" in end.message
    engine.close()


@pytest.mark.parametrize(
    "job",
    [
        Load(model="a/b", adapter="c"),
        Generate(messages=[{"role": "user", "content": "ä\ud800\n\x1b"}], options={"top_k": 3}),
        Plan(model="x", options={"context": 4096}),
        Train(model="m", data="d", out="o", options={"rank": 8}),
        Search(query="q", mlx_only=True),
        Stop(job=7),
    ],
)
def test_jobs_survive_the_pipe(job: Job) -> None:
    line = encode_job(3, job)
    assert line.endswith(b"\n") and line.count(b"\n") == 1 and line.isascii()
    assert decode_job(line) == (3, job)


@pytest.mark.parametrize(
    "event",
    [
        Delta(job=1, text="half \ud83d a pair\u2028\n", token=3, logprob=-0.5),
        Done(job=1, reason="stop", stats=Stats(generated_tokens=4), details={"a": [1, "b"]}),
        Loaded(job=1, model="m", seconds=0.5, bytes=7, context=None),
        Progress(stage="train", done=1, total=2, details={"loss": float("inf")}),
        Prefill(done=1, total=2),
        Failed(message="x", detail="y"),
        Warned(message="x"),
    ],
)
def test_events_survive_the_pipe(event: Event) -> None:
    assert decode_event(encode_event(event)) == event


CHILD = """
    import os, sys, time, warnings
    from mlxtx import engine_jobs, engine, engine_process
    from mlxtx.errors import MlxtxWarning
    from mlxtx.events import Delta, Done

    def count(job, running):
        print("a stray print")
        os.write(1, b"and one by a C library\\n")
        if job.text == "abort":
            sys.stderr.write("[METAL] Command buffer execution failed: Insufficient Memory\\n")
            sys.stderr.flush()
            os.abort()
        if job.text == "warn":
            warnings.warn("a library's own business")
            warnings.warn("a kernel does not run", MlxtxWarning)
        return Done(reason="done", details={"length": len(job.text)})

    def generate(job, running):
        for number in range(100000):
            if running.stopped():
                return Done(reason="stopped")
            running.emit(Delta(text=f"{number} "))
            time.sleep(0.002)

    engine_jobs.RUN[engine.Count] = count
    engine_jobs.RUN[engine.Generate] = generate
    engine_process.serve()
"""


class Child(EngineProcess):
    command = (sys.executable, "-c", textwrap.dedent(CHILD))


async def test_the_child_answers_stops_and_keeps_stray_prints_out() -> None:
    events = Events()
    engine = Child(events)
    text = "x" * 1_000_000
    first = engine.submit(Count(text=text))
    second = engine.submit(Generate(messages=[]))
    await until(lambda: len(events.of(second)) > 5)
    assert events.wait_end(first, 0).details == {"length": 1_000_000}
    engine.submit(Stop(job=second))
    await until(lambda: isinstance(events.of(second)[-1], Done))
    deltas = [event.text for event in events.of(second) if isinstance(event, Delta)]
    assert deltas == [f"{number} " for number in range(len(deltas))]
    await engine.close()
    assert not engine.alive


async def test_what_a_user_should_know_is_an_event_of_no_job() -> None:
    events = Events()
    engine = Child(events)
    number = engine.submit(Count(text="warn"))
    await until(lambda: events.of(number))
    assert events.of(0) == [Warned(message="a kernel does not run")]
    await engine.close()


async def test_a_child_that_dies_fails_its_jobs_and_can_be_started_again() -> None:
    events = Events()
    ended: list[str] = []
    engine = Child(events, lambda message, detail: ended.append(message + detail))
    doomed = engine.submit(Count(text="abort"))
    waiting = engine.submit(Count(text="never"))
    await until(lambda: ended)
    for number in (doomed, waiting):
        end = events.wait_end(number, 0)
        assert isinstance(end, Failed) and "SIGABRT" in end.message
        assert "ran out of memory" in end.message and "Insufficient Memory" in end.detail
    again = engine.submit(Count(text="four"))
    await until(lambda: events.of(again))
    assert events.wait_end(again, 0).details == {"length": 4}
    await engine.close()


async def test_an_engine_that_can_not_start_is_told() -> None:
    class Missing(EngineProcess):
        command = ("/no/such/program",)

    events = Events()
    ended: list[str] = []
    engine = Missing(events, lambda message, detail: ended.append(message))
    number = engine.submit(Count(text="x"))
    await until(lambda: ended)
    end = events.wait_end(number, 0)
    assert isinstance(end, Failed) and end.message == ended[0]
    assert ended == ["The engine can't be started: No such file or directory."]
    await engine.close()


async def test_closing_does_not_wait_for_a_job_that_ignores_its_flag() -> None:
    class Deaf(EngineProcess):
        command = (
            sys.executable,
            "-c",
            "import time\nfrom mlxtx import engine_jobs, engine, engine_process\n"
            "engine_jobs.RUN[engine.Count] = lambda job, running: time.sleep(60)\n"
            "engine_process.serve()",
        )

    engine = Deaf(Events())
    engine.submit(Count(text=""))
    await asyncio.sleep(0.5)
    await asyncio.wait_for(engine.close(timeout=0.3), 120)
    assert not engine.alive


def test_the_child_ends_when_its_parent_is_gone() -> None:
    program = (
        "import subprocess, sys, os\n"
        "child = subprocess.Popen([sys.executable, '-m', 'mlxtx.engine'], stdin=subprocess.PIPE)\n"
        "print(child.pid, flush=True)\n"
        "os._exit(9)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    pid = int(done.stdout)
    end = time.monotonic() + 120
    while time.monotonic() < end:
        try:
            with open(f"/proc/{pid}/stat") as file:
                if file.read().split(") ")[1][0] == "Z":
                    return
        except OSError:
            return
        time.sleep(0.05)
    raise AssertionError("the child is still there")


def test_a_long_job_saves_its_state_when_its_parent_is_gone(tmp_path: Path) -> None:
    """As when the window of the terminal is closed: both pipes break, and the job reports on."""
    child = """
        import sys, time
        from mlxtx import engine, engine_jobs, engine_process
        from mlxtx.events import Done, Progress

        def convert(job, running):
            try:
                while True:
                    running.report(Progress(stage="convert", done=1, total=2))
                    time.sleep(0.01)
            except KeyboardInterrupt:
                with open(job.out, "w") as file:
                    file.write("the state")
                raise

        engine_jobs.RUN[engine.Convert] = convert
        engine_process.serve()
    """
    out = tmp_path / "state"
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(child)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(encode_job(1, Convert(source="a", out=str(out))))
        process.stdin.flush()
        process.stdout.readline()
        process.stdout.close()
        time.sleep(0.1)  # some reports go nowhere
        process.stdin.close()
        assert process.wait(120) == 0
    assert out.read_text() == "the state"


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("mlxtx.engine", ("mlx", "textual", "huggingface_hub", "tokenizers")),
        ("mlxtx.engine_process", ("mlx", "textual", "huggingface_hub")),
        ("mlxtx.settings", ("mlx", "textual", "huggingface_hub")),
        ("mlxtx.tui.app", ("mlx", "mlx.core", "numpy", "huggingface_hub", "markdown_it")),
    ],
)
def test_importing_loads_nothing_heavy(module: str, absent: tuple[str, ...]) -> None:
    program = f"import sys, {module}; print([m for m in {absent!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr

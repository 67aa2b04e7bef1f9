"""Events between the engine and the screens: joined, paced, and dropped when nobody wants them."""

from __future__ import annotations

import asyncio

from mlxtx.tui.bridge import RATE, Bridge, join

from mlxtx.engine import Download, Generate, Job, Search, Stop
from mlxtx.events import Delta, Done, Event, Prefill, Progress, Stats
from tests.tui.fakes import Script, until


def test_text_is_joined_and_only_the_last_figures_are_kept() -> None:
    events = [
        Prefill(job=1, done=1, total=3),
        Prefill(job=1, done=3, total=3),
        Delta(job=1, text="a", token=5),
        Delta(job=1, text="b", token=6),
        Stats(job=1, generated_tokens=2),
        Delta(job=1, text="t", kind="thinking"),
        Delta(job=1, text="c"),
        Delta(job=2, text="d"),
    ]
    assert join(events) == [
        Prefill(job=1, done=3, total=3),
        Delta(job=1, text="ab"),
        Stats(job=1, generated_tokens=2),
        Delta(job=1, text="t", kind="thinking"),
        Delta(job=1, text="c"),
        Delta(job=2, text="d"),
    ]


def test_training_points_are_all_kept() -> None:
    points = [Progress(stage="train", done=n, total=9, details={"loss": n}) for n in range(3)]
    plain = [Progress(stage="download", done=n, total=9) for n in range(3)]
    assert join([*points, *plain]) == [*points, plain[-1]]


class Recorder:
    """A bridge over a scripted engine, and what it handed over."""

    def __init__(self, script: Script) -> None:
        self.batches: list[list[Event]] = []
        self.seen: list[Event] = []
        self.bridge = Bridge(self.take, lambda message, detail: None, script)

    def take(self, events: list[Event]) -> None:
        self.batches.append(events)
        for event in events:
            self.bridge.dispatch(event)


def stream(count: int, pause: float) -> object:
    def play(job: Job) -> object:
        for number in range(count):
            yield Delta(text=f"{number} ")
            yield pause
        yield Done(reason="stop")

    return play


async def test_a_fast_stream_is_handed_over_at_the_rate_with_nothing_lost() -> None:
    recorder = Recorder(Script(Generate=stream(100, 0.005)))
    start = asyncio.get_running_loop().time()
    recorder.bridge.submit(Generate(messages=[]), recorder.seen.append)
    await until(lambda: recorder.seen and isinstance(recorder.seen[-1], Done))
    taken = asyncio.get_running_loop().time() - start
    assert len(recorder.batches) <= taken * RATE + 3
    text = "".join(event.text for event in recorder.seen if isinstance(event, Delta))
    assert text == "".join(f"{number} " for number in range(100))


async def test_a_forgotten_job_is_silent() -> None:
    recorder = Recorder(Script(Generate=stream(30, 0.01)))
    number = recorder.bridge.submit(Generate(messages=[]), recorder.seen.append)
    await until(lambda: recorder.seen)
    recorder.bridge.forget(number)
    seen = len(recorder.seen)
    await asyncio.sleep(0.3)
    assert len(recorder.seen) == seen


async def test_nothing_is_scheduled_while_nothing_happens() -> None:
    recorder = Recorder(Script())
    recorder.bridge.submit(Generate(messages=[]), recorder.seen.append)
    await until(lambda: recorder.seen and isinstance(recorder.seen[-1], Done))
    assert recorder.bridge._timer is None, "an idle app takes no CPU"


async def test_a_long_job_has_its_own_engine_which_ends_with_it() -> None:
    waiting = [Progress(stage="download", done=1, total=2), asyncio.Event()]
    script = Script(Download=lambda job: waiting)
    recorder = Recorder(script)
    number = recorder.bridge.submit_long(Download(repo="a/b"), recorder.seen.append)
    assert len(script.engines) == 2
    await until(lambda: recorder.seen)
    recorder.bridge.stop(number)
    await until(lambda: script.engines[1]._task is None)
    assert isinstance(recorder.seen[-1], Done) and recorder.seen[-1].reason == "stopped"


async def test_a_long_job_that_does_not_stop_is_killed() -> None:
    script = Script(Download=lambda job: [3.0])
    recorder = Recorder(script)
    number = recorder.bridge.submit_long(Download(repo="a/b"), recorder.seen.append)
    await until(lambda: script.submitted(Download))
    recorder.bridge.stop(number)
    await until(lambda: script.engines[1].killed)


async def test_a_question_that_was_forgotten_is_not_asked_any_more() -> None:
    gate = asyncio.Event()
    asked: list[str] = []

    def search(job: Search) -> object:
        asked.append(job.query)
        yield gate
        yield Done(reason="done", details={"models": []})

    script = Script(Search=search)
    recorder = Recorder(script)
    numbers = [recorder.bridge.ask(Search(query=q), recorder.seen.append) for q in ("a", "b")]
    await until(lambda: asked)
    recorder.bridge.forget(numbers[0])
    assert [stop.job for stop in script.submitted(Stop)] == numbers[:1]
    gate.set()
    await until(lambda: recorder.seen)
    # What has its answer needs no word any more.
    recorder.bridge.forget(numbers[1])
    assert asked == ["a", "b"] and len(script.submitted(Stop)) == 1

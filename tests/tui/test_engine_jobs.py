"""What the engine's jobs do with a real model, a tiny one: load, talk, count, adapt, train."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from mlxtx.engine import (
    Convert,
    Count,
    Download,
    Engine,
    Generate,
    Load,
    Pause,
    Plan,
    Preview,
    Search,
    Stop,
    Train,
    Unload,
)
from mlxtx.events import Delta, Done, Failed, Loaded, Prefill, Progress, Stats
from mlxtx.tiny_model import write_tiny_model
from tests.checkpoint.hub_server import Hub
from tests.tui.test_engine import Events

HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    write_tiny_model(folder)
    return folder


class Desk:
    """An engine, and jobs run one after another with their events."""

    def __init__(self) -> None:
        self.events = Events()
        self.engine = Engine(self.events)

    def run(self, job: Any, seconds: float = 240.0) -> list[Any]:
        number = self.engine.submit(job)
        self.events.wait_end(number, seconds)
        return self.events.of(number)

    def text(self, **values: Any) -> str:
        options = {"max_tokens": 12, **values.pop("options", {})}
        events = self.run(Generate(**{"messages": HELLO, **values}, options=options))
        assert isinstance(events[-1], Done), events[-1]
        return "".join(event.text for event in events if isinstance(event, Delta))


@pytest.fixture
def desk() -> Any:
    desk = Desk()
    yield desk
    desk.engine.close()


def loaded(desk: Desk, model: Path, **values: Any) -> Loaded:
    events = desk.run(Load(model=str(model), **values))
    assert isinstance(events[-1], Done), events[-1]
    return next(event for event in events if isinstance(event, Loaded))


def test_loading_and_answering(desk: Desk, model: Path) -> None:
    event = loaded(desk, model)
    assert event.model == str(model) and event.context == 2048 and event.bytes > 100_000
    assert event.details["memory_limit"] > 1e9
    events = desk.run(Generate(messages=HELLO, options={"max_tokens": 12}))
    assert isinstance(events[0], Prefill)
    stats = events[-1].stats
    assert events[-1].reason == "length" and stats.generated_tokens == 12
    assert len([e for e in events if isinstance(e, Delta) and e.token is not None]) == 12
    # The same model again is there at once: nothing is read.
    again = desk.run(Load(model=str(model)))
    assert not [event for event in again if isinstance(event, Progress)]


def test_the_next_turn_reads_only_what_is_new(desk: Desk, model: Path) -> None:
    loaded(desk, model)
    said = desk.text()
    more = [*HELLO, {"role": "assistant", "content": said}, {"role": "user", "content": "More"}]
    events = desk.run(Generate(messages=more, options={"max_tokens": 4}))
    assert events[-1].stats.reused_tokens >= 8
    # Another cache setting starts anew; the same question has the same answer as before.
    events = desk.run(Generate(messages=more, options={"max_tokens": 4, "kv": "k8v8g32"}))
    assert isinstance(events[-1], Done) and events[-1].stats.reused_tokens == 0
    assert desk.text() == said


def test_the_next_turn_reuses_a_cache_whose_setting_was_looked_up(desk: Desk, model: Path) -> None:
    loaded(desk, model)
    options = {"max_tokens": 4, "kv": "auto"}
    desk.run(Generate(messages=HELLO, options=options))
    events = desk.run(Generate(messages=HELLO, options=options))
    assert isinstance(events[-1], Done) and events[-1].stats.reused_tokens > 0


def test_a_cache_setting_is_looked_up_by_the_name_of_the_model(
    desk: Desk, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlxtx.diagnostics.kv_defaults import store_default_kv

    monkeypatch.setenv("MLXTX_HOME", str(tmp_path))
    monkeypatch.setattr("mlxtx.checkpoint.resolve", lambda *_, **__: model)
    store_default_kv("owner/name", "k4v4g32")
    assert isinstance(desk.run(Load(model="owner/name"))[-1], Done)
    held = []
    for kv in ("plain", "auto"):
        events = desk.run(Generate(messages=HELLO, options={"max_tokens": 4, "kv": kv}))
        assert isinstance(events[-1], Done)
        held.append(events[-1].stats.cache_bytes)
    assert held[1] < held[0] / 2


def test_a_reply_goes_on_where_it_ended(desk: Desk, model: Path) -> None:
    loaded(desk, model)
    whole = desk.text(options={"max_tokens": 16})
    begun = [*HELLO, {"role": "assistant", "content": whole[: len(whole) // 2]}]
    events = desk.run(Generate(messages=begun, options={"max_tokens": 4}, goes_on=True))
    from mlxtx.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(model)
    prompt = tokenizer.encode_chat(HELLO)
    prompt += tokenizer.encode(begun[-1]["content"], add_special=False)
    assert events[-1].stats.prompt_tokens == len(prompt)


def test_a_reply_that_goes_on_has_thought_already(model: Path, tmp_path: Path) -> None:
    """Where the template opens the thinking, a reply with a text has left it."""
    from mlxtx.engine_jobs import _going_on
    from mlxtx.language_model import LanguageModel
    from mlxtx.text.tokenizer import Tokenizer
    from mlxtx.tiny_model import tiny_tokenizer

    inner = tiny_tokenizer()
    inner.add_tokens(["<think>", "</think>"])
    inner.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}<think>{{ '\n' }}")
    tokenizer = Tokenizer.load(tmp_path)
    thinker = LanguageModel(None, tokenizer)  # type: ignore[arg-type]
    begun = [*HELLO, {"role": "assistant", "content": "The lamp"}]
    prompt, count = _going_on(thinker, begun, {})
    assert tokenizer.decode(prompt) == "Hello<think>\n</think>\n\nThe lamp"
    assert tokenizer.decode(prompt[-count:]) == "The lamp"


def test_stop_ends_within_a_token_and_tells_the_figures(desk: Desk, model: Path) -> None:
    loaded(desk, model)
    number = desk.engine.submit(
        Generate(messages=HELLO, options={"max_tokens": 2000, "temperature": 1.0, "seed": 1})
    )
    while not [e for e in desk.events.of(number) if isinstance(e, Delta)]:
        pass
    before = len(desk.events.of(number))
    desk.engine.submit(Stop(job=number))
    at_stop = len(desk.events.of(number))
    end = desk.events.wait_end(number)
    assert isinstance(end, Done) and end.reason == "stopped" and end.stats is not None
    assert end.stats.generated_tokens >= 1
    # What came after the flag: the token in work, a figure, the held-back text, the end.
    assert len(desk.events.of(number)) - max(before, at_stop) <= 5


def test_speed_and_memory_are_told_while_it_writes(
    desk: Desk, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlxtx.engine_jobs._STATS_SECONDS", 0.0)
    loaded(desk, model)
    events = desk.run(Generate(messages=HELLO, options={"max_tokens": 20}))
    figures = [event for event in events if isinstance(event, Stats)]
    assert len(figures) >= 10
    assert figures[-1].generated_tokens == len([e for e in events if isinstance(e, Delta)])
    assert figures[-1].cache_bytes > 0 and figures[-1].memory_bytes > 100_000


def test_counting_and_unloading(desk: Desk, model: Path) -> None:
    loaded(desk, model)
    assert desk.run(Count(text="hello world, hello"))[-1].details["tokens"] > 3
    desk.run(Unload())
    (end,) = desk.run(Count(text="x"))
    assert isinstance(end, Failed) and "No model is loaded" in end.message


def test_a_bad_model_or_option_is_one_line(desk: Desk, model: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "lama"}')
    for job in (Load(model=str(tmp_path)), Load(model="/no/such/folder")):
        end = desk.run(job)[-1]
        assert isinstance(end, Failed) and "\n" not in end.message and end.message
    loaded(desk, model)
    end = desk.run(Generate(messages=HELLO, options={"heat": 1}))[-1]
    assert isinstance(end, Failed) and "unknown option 'heat'" in end.message
    end = desk.run(Generate(messages=HELLO, options={"kv": "k7v7"}))[-1]
    assert isinstance(end, Failed) and "\n" not in end.message
    # And the engine still answers.
    assert desk.text()


def write_data(folder: Path) -> Path:
    rows = [("Who are you?", "I am a helper."), ("Name a river", "The Rhine."), ("Hi", "Hello.")]
    file = folder / "data.jsonl"
    file.write_text(
        "".join(
            json.dumps({"messages": [{"role": "user", "content": ask},
                                     {"role": "assistant", "content": say}]}) + "\n"
            for ask, say in rows
        )
    )  # fmt: skip
    return file


def test_preview_train_with_samples_and_switch_the_adapter(
    desk: Desk, model: Path, tmp_path: Path
) -> None:
    data = str(write_data(tmp_path))
    options = {"iters": 12, "batch_size": 2, "rank": 4, "learning_rate": 1e-2, "report_every": 3}
    found = desk.run(Preview(model=str(model), data=data, options=options))[-1].details
    assert found["count"] == 3 and found["fits"]
    pieces = [tuple(piece) for piece in found["samples"][0]]
    assert [learned for _, learned in pieces] == [False, True]
    assert "I am a helper." in pieces[1][0]

    def losses(events: list[Any]) -> list[float]:
        steps = [e for e in events if isinstance(e, Progress) and e.stage == "train"]
        return [event.details["loss"] for event in steps]

    plain = desk.run(Train(model=str(model), data=data, out=str(tmp_path / "a"), options=options))
    tried = {**options, "sample_prompt": "Hi", "sample_every": 6}
    sampled = desk.run(Train(model=str(model), data=data, out=str(tmp_path / "b"), options=tried))
    assert losses(plain) == losses(sampled), "trying the adapter does not change the training"
    assert losses(plain)[-1] < losses(plain)[0]
    said = [e for e in sampled if isinstance(e, Progress) and e.stage == "sample"]
    assert [event.done for event in said] == [6, 12]
    assert all(event.details["prompt"] == "Hi" for event in said)

    loaded(desk, model)
    before = desk.text()
    switched = desk.run(Load(model=str(model), adapter=str(tmp_path / "b")))
    assert not [event for event in switched if isinstance(event, Progress)], "the base stays"
    changed = desk.text()
    assert changed != before
    # The run goes on and writes over its adapter: the new one is read.
    for file in (tmp_path / "a").glob("adapter*"):
        shutil.copyfile(file, tmp_path / "b" / file.name)
    weaker = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    weaker["lora_parameters"]["scale"] = 0.0
    (tmp_path / "b" / "adapter_config.json").write_text(json.dumps(weaker))
    desk.run(Load(model=str(model), adapter=str(tmp_path / "b")))
    assert desk.text() == before
    loaded(desk, model)
    assert desk.text() == before
    # An adapter that is no adapter leaves the base as it is.
    end = desk.run(Load(model=str(model), adapter=str(tmp_path)))[-1]
    assert isinstance(end, Failed)
    loaded(desk, model)
    assert desk.text() == before


def test_training_is_paused_with_its_state_and_goes_on(
    desk: Desk, model: Path, tmp_path: Path
) -> None:
    data, out = str(write_data(tmp_path)), str(tmp_path / "run")
    # A stop does not wait for the next report, which may be a hundred steps away.
    options = {"iters": 100_000, "batch_size": 1, "rank": 2, "report_every": 100_000}

    def steps(number: int) -> list[float]:
        events = desk.events.of(number)
        return [e.done for e in events if isinstance(e, Progress) and e.stage == "step"]

    number = desk.engine.submit(Train(model=str(model), data=data, out=out, options=options))
    while max(steps(number), default=0) < 6:
        time.sleep(0.01)
    desk.engine.submit(Stop(job=number))
    end = desk.events.wait_end(number)
    assert isinstance(end, Done) and end.reason == "stopped"
    assert (Path(out) / "adapter_config.json").exists(), "what was learned can be tried"
    again = {**options, "resume": True}
    number = desk.engine.submit(Train(model=str(model), data=data, out=out, options=again))
    while not steps(number):
        time.sleep(0.01)
    desk.engine.submit(Stop(job=number))
    desk.events.wait_end(number)
    assert steps(number)[0] >= 6


def test_sampling_as_the_makers_of_a_model_would(tmp_path: Path) -> None:
    from mlxtx.engine_jobs import own_sampling

    file = tmp_path / "generation_config.json"
    assert own_sampling(tmp_path) == {}
    for text, found in (
        ('{"do_sample": false, "temperature": 0.6}', {"temperature": 0.0}),
        ('{"temperature": 0.6, "top_k": 20, "eos_token_id": 1}', {"temperature": 0.6, "top_k": 20}),
        ('{"temperature": -1, "top_p": "x", "min_p": null, "top_k": 5}', {"top_k": 5}),
        ("[1]", {}),
        ("{", {}),
    ):
        file.write_text(text)
        assert own_sampling(tmp_path) == found


def test_the_makers_sampling_goes_before_defaults_and_after_what_was_chosen(
    desk: Desk, model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "greedy"
    shutil.copytree(model, folder)
    (folder / "generation_config.json").write_text('{"do_sample": false}')
    loaded(desk, folder)
    likeliest = desk.text(options={"temperature": 0.0})
    ours = {"temperature": 5.0, "seed": 1}
    assert desk.text(defaults=ours) == likeliest
    assert desk.text(defaults={"seed": -1}, options=ours) != likeliest
    loaded(desk, model)
    assert desk.text(defaults=ours) != likeliest


def test_a_dry_run_that_nobody_waits_for_ends_at_its_next_report(
    desk: Desk, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "data.jsonl").write_text('{"prompt": "Who?", "completion": "A helper."}\n' * 8)
    desk.engine.submit(Pause(job=77))
    desk.engine.submit(Preview(model=str(model), data=str(tmp_path / "data.jsonl")), 77)
    while not desk.events.of(77):
        time.sleep(0.01)
    desk.engine.submit(Stop(job=77))
    end = desk.events.wait_end(77)
    assert isinstance(end, Done) and end.reason == "stopped"


def test_the_plan_is_what_the_screen_needs(desk: Desk, model: Path) -> None:
    found = desk.run(Plan(model=str(model)))[-1].details
    assert found["fits"] and found["weights"] > 100_000 and found["limit"] > 1e9
    assert {"cache_per_1k", "total", "context", "largest_context"} <= found.keys()
    json.dumps(found)


def test_conversion_reports_and_its_result_loads(desk: Desk, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "four"
    options = {"bits": 4, "group_size": 64}
    events = desk.run(Convert(source=str(model), out=str(out), options=options), 120)
    assert isinstance(events[-1], Done), events[-1]
    assert [event for event in events if isinstance(event, Progress)]
    from mlxtx.tui.library import read_model

    assert read_model(out, "four", str(out)).bits == 4
    loaded(desk, out)
    assert desk.text()


def test_a_download_through_the_engine(
    desk: Desk, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {path.name: path.read_bytes() for path in model.iterdir() if path.is_file()}
    with Hub({"org/tiny": {"main": files}}).serving() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        end = desk.run(Download(repo="org/none"))[-1]
        assert isinstance(end, Failed) and "org/none" in end.message
    end = desk.run(Download(repo="not a repo"))[-1]
    assert isinstance(end, Failed) and "\n" not in end.message


class _Search(BaseHTTPRequestHandler):
    asked: list[dict[str, list[str]]] = []  # noqa: RUF012

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.asked.append(parse_qs(urlsplit(self.path).query))
        row = {
            "id": "org/tiny-4bit", "modelId": "org/tiny-4bit", "downloads": 12, "likes": 3,
            "lastModified": "2026-10-01T10:00:00.000Z", "gated": "manual", "tags": ["mlx"],
            "safetensors": {"parameters": {"BF16": 10, "U32": 100}, "total": 110},
        }  # fmt: skip
        body = json.dumps([row, {"id": "org/odd", "modelId": "org/odd"}]).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def test_searching_the_hub(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    server = HTTPServer(("127.0.0.1", 0), _Search)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    try:
        found = desk.run(Search(query="tiny", mlx_only=True, sort="likes"))[-1]
        assert isinstance(found, Done), found
    finally:
        server.shutdown()
        server.server_close()
    assert found.details["models"][0] == {
        "id": "org/tiny-4bit", "downloads": 12, "likes": 3, "modified": "2026-10-01",
        "gated": True, "mlx": True, "bytes": 420,
    }  # fmt: skip
    assert found.details["models"][1]["bytes"] == 0
    asked = _Search.asked[0]
    assert asked["search"] == ["tiny"] and asked["limit"] == ["50"] and "mlx" in str(asked)
    # And with nobody there: one line.
    end = desk.run(Search(query="tiny"))[-1]
    assert isinstance(end, Failed) and "The Hub can't be searched" in end.message
    assert "\n" not in end.message


def test_a_model_whose_adapter_is_not_there_does_not_answer_without_it(
    desk: Desk, model: Path, tmp_path: Path
) -> None:
    loaded(desk, model)
    assert isinstance(desk.run(Load(model=str(model), adapter=str(tmp_path)))[-1], Failed)
    assert isinstance(desk.run(Generate(messages=HELLO))[-1], Failed)
    loaded(desk, model)
    assert desk.text()


def test_a_model_that_was_written_anew_is_read_anew(
    desk: Desk, model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    loaded(desk, folder)
    said = desk.text()
    write_tiny_model(folder, seed=5)
    os.utime(folder / "model.safetensors", ns=(1, 1))  # a clock may be too coarse to tell
    loaded(desk, folder)
    assert desk.text() != said

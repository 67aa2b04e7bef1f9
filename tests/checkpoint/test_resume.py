"""Conversions that are stopped, killed or out of room, and go on where they stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import mlx.core as mx
import numpy as np
import pytest

import mlxtx
from mlxtx.checkpoint import shards, units
from mlxtx.checkpoint.shards import ShardWriter, journal_of
from mlxtx.errors import MlxtxError
from tests.checkpoint.builders import write_llama
from tests.checkpoint.compare import digest, tensors

# ---------------------------------------------------------------------- stopped and gone on with


def test_stopped_at_every_step_and_gone_on_with(tmp_path, monkeypatch):
    monkeypatch.setattr(units, "PIECE_BYTES", 16_000)
    monkeypatch.setattr(shards, "SYNC_BYTES", 30_000)
    write_llama(tmp_path / "source", dtype="BF16")
    options = {"bits": 4, "group_size": 32, "max_shard_bytes": 60_000}
    mlxtx.convert(tmp_path / "source", tmp_path / "whole", **options)
    expected = digest(tmp_path / "whole")
    runs = 0
    reads = []

    def stop_after(count):
        def on_event(event):
            nonlocal count
            if event.stage == "convert":
                reads.append(event.done)
            count -= 1
            if count == 0:
                raise KeyboardInterrupt

        return on_event

    for allowed in range(1, 40):
        runs += 1
        try:
            mlxtx.convert(
                tmp_path / "source", tmp_path / "out", on_event=stop_after(allowed), **options
            )
            break
        except KeyboardInterrupt:
            assert not (tmp_path / "out").exists()
    assert 4 < runs < 40
    assert digest(tmp_path / "out") == expected
    assert not list(tmp_path.glob("out.*"))
    # What was finished was not done again: far fewer steps than runs from the start would take.
    total = sum(w.nbytes for w in tensors(tmp_path / "source").values())
    assert max(reads) == total and reads.count(reads[0]) <= 3


def test_another_plan_starts_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SYNC_BYTES", 1)
    write_llama(tmp_path / "source")

    def stop(event):
        if event.stage == "convert" and event.done > event.total / 2:
            raise KeyboardInterrupt

    for bits in (4, 8):
        with pytest.raises(KeyboardInterrupt):
            mlxtx.convert(tmp_path / "source", tmp_path / "out", bits=bits, on_event=stop)
    # The source changes between two runs: nothing of the first may be used.
    write_llama(tmp_path / "source", seed=1)
    mlxtx.convert(tmp_path / "source", tmp_path / "out", bits=8)
    mlxtx.convert(tmp_path / "source", tmp_path / "fresh", bits=8)
    assert digest(tmp_path / "out") == digest(tmp_path / "fresh")


def test_a_model_keeps_nothing_of_another_that_was_stopped(tmp_path, monkeypatch):
    """Stopped in the proof, when tokenizer files are there already."""
    for name in ("first", "second"):
        write_llama(tmp_path / name, dtype="F32" if name == "first" else "BF16")
    (tmp_path / "first" / "chat_template.jinja").write_text("of the first")

    def stopped(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("mlxtx.checkpoint.convert.prove", stopped)
        mlxtx.convert(tmp_path / "first", tmp_path / "out", bits=4)
    assert (tmp_path / "out.partial" / "chat_template.jinja").exists()
    mlxtx.convert(tmp_path / "second", tmp_path / "out", bits=4)
    assert not (tmp_path / "out" / "chat_template.jinja").exists()


def test_what_a_killed_run_left_half_written_is_not_published(tmp_path):
    write_llama(tmp_path / "source")

    def stop(event):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mlxtx.convert(tmp_path / "source", tmp_path / "out", bits=4, on_event=stop)
    (tmp_path / "out.partial" / ".config.json.123.partial").write_text("{half")
    mlxtx.convert(tmp_path / "source", tmp_path / "out", bits=4)
    assert not list((tmp_path / "out").glob(".*"))


def test_a_journal_that_lies_is_not_believed(tmp_path):
    layout = {"a": ("U8", (8,)), "b": ("U8", (4,))}

    def fill(writer):
        for unit, (name, (_, shape)) in enumerate(layout.items()):
            if unit not in writer.done:
                writer.write(name, mx.full(shape, unit + 1, mx.uint8))
                writer.finish_unit(unit)
        writer.close()

    folder = tmp_path / "x"
    fill(ShardWriter(folder, layout, "key"))
    content = (folder / "model.safetensors").read_bytes()
    assert ShardWriter(folder, layout, "key").done == {0, 1}
    journal = journal_of(folder)
    complete = journal.read_bytes()
    for damage in (b"", b"{", complete[:-3], b'{"plan": "other"}\n', complete + b'{"done": [1'):
        journal.write_bytes(damage)
        writer = ShardWriter(folder, layout, "key")
        assert writer.done <= {0, 1}
        fill(writer)
        assert (folder / "model.safetensors").read_bytes() == content
    (folder / "model.safetensors").write_bytes(content[:-1])
    assert ShardWriter(folder, layout, "key").done == set()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_disk_that_is_full_at_the_end_is_one_line(tmp_path):
    """What is still in a buffer is written when the file is closed."""
    writer = ShardWriter(tmp_path / "x", {"a": ("U8", (8,))}, "key")
    (tmp_path / "x" / "model.safetensors").unlink()
    (tmp_path / "x" / "model.safetensors").symlink_to("/dev/full")
    writer.write("a", mx.zeros(8, mx.uint8))
    with pytest.raises(MlxtxError, match="the disk is full"):
        writer.close()


KILLED = """
import sys
from mlxtx.checkpoint import shards, streaming, units
from mlxtx.checkpoint.convert import convert
shards.SYNC_BYTES, units.PIECE_BYTES = 40_000, 30_000
print("ready", flush=True)
convert(sys.argv[1], sys.argv[2], bits=4, max_shard_bytes=200_000)
"""


def test_killed_and_run_again(tmp_path):
    """SIGKILL at moments of the clock: no clean-up of ours can run."""
    write_llama(tmp_path / "source", dtype="BF16", num_hidden_layers=6, hidden_size=128)
    mlxtx.convert(tmp_path / "source", tmp_path / "whole", bits=4, max_shard_bytes=200_000)
    rng = np.random.default_rng(5)
    for _ in range(4):
        command = [sys.executable, "-c", KILLED, str(tmp_path / "source"), str(tmp_path / "out")]
        run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert run.stdout.readline() == b"ready\n"
        time.sleep(rng.uniform(0, 0.25))
        os.kill(run.pid, signal.SIGKILL)
        _, error = run.communicate()
        if (tmp_path / "out").exists():
            break
        assert run.returncode in (-signal.SIGKILL, 0), error.decode()
    else:
        mlxtx.convert(tmp_path / "source", tmp_path / "out", bits=4, max_shard_bytes=200_000)
    # The pieces differ in size from those of the whole run; the files may not.
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")

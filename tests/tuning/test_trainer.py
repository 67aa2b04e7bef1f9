"""The loop: resume to the bit after kills, bad steps, schedules, and what is written."""

from __future__ import annotations

import errno
import json
import math
import os
import random

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxtx.decoder.config import NormConfig
from mlxtx.errors import MlxtxError
from mlxtx.tuning.config_file import from_dict, read_toml, to_dict, to_toml
from mlxtx.tuning.optimizer import OPTIMIZERS, Schedule
from mlxtx.tuning.samples import Order, Rows
from mlxtx.tuning.scratch import train_from_scratch
from mlxtx.tuning.settings import Training
from mlxtx.tuning.state import StateFolder
from tests.tuning.test_objective import LATENT
from tests.tuning.tiny import block, decoder, samples

DATA = samples((12, 30, 7, 19, 25, 12, 40), masked=False)
SETTINGS = {
    "iters": 12,
    "batch_size": 2,
    "accumulate": 2,
    "learning_rate": 3e-3,
    "warmup": 3,
    "report_every": 1,
    "save_every": 2,
    "seed": 5,
}


class Killed(BaseException):
    pass


def train(out, resume=False, stop_at=None, config=None, data=DATA, **changes):
    losses = {}

    def on_event(event):
        if event.stage == "train":
            losses[event.done] = event.details["loss"]
            if event.done == stop_at:
                raise Killed

    settings = Training(**{**SETTINGS, **changes})
    net, result = train_from_scratch(
        config or decoder(), data, out, settings, resume=resume, on_event=on_event
    )
    return net, result, losses


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_resume_is_bitwise_the_run_that_never_stopped(tmp_path, kind):
    net, _, losses = train(tmp_path / "whole", optimizer=kind)
    chance = random.Random(kind)
    out, seen, resume = tmp_path / "killed", {}, False
    for stop in sorted(chance.sample(range(1, 12), 3)):
        trainer_losses = {}
        with pytest.raises(Killed):
            train(out, resume, stop, optimizer=kind)
        resume = True
        # As after a power cut: the state of the kill itself is lost, older ones are there.
        states = sorted((out / "state").iterdir())
        if len(states) > 1 and chance.random() < 0.5:
            states[-1].unlink()
        seen |= trainer_losses
    again, result, rest = train(out, True, optimizer=kind)
    assert result.step == 12
    assert rest and all(losses[step] == loss for step, loss in rest.items())
    for (name, a), (_, b) in zip(
        tree_flatten(net.parameters()), tree_flatten(again.parameters()), strict=True
    ):
        assert mx.array_equal(a, b), name
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if line["stage"] == "train"]
    assert [line["step"] for line in trained] == list(range(1, 13))
    assert [line["loss"] for line in trained] == [losses[s] for s in range(1, 13)]


@pytest.mark.parametrize("batch", [7, 12, 13])
def test_a_run_ended_between_two_reports_goes_on_to_the_bit(tmp_path, batch):
    """Before the second batch of step 4; before the first of a validation, and inside it."""
    reports = {"iters": 8, "report_every": 100, "save_every": 100, "validate_every": 6}
    settings = Training(**{**SETTINGS, **reports})
    arguments = (DATA, tmp_path / "whole", settings)
    net, whole = train_from_scratch(decoder(), *arguments, validation=DATA[:3])
    looks = []

    def stop(event):
        looks.extend([event.done] if event.stage == "step" else [])
        if len(looks) == batch + 1:
            raise KeyboardInterrupt

    arguments = (DATA, tmp_path / "cut", settings)
    with pytest.raises(KeyboardInterrupt):
        train_from_scratch(decoder(), *arguments, validation=DATA[:3], on_event=stop)
    step = min(batch // 2, 6)
    assert [p.name for p in (tmp_path / "cut" / "state").iterdir()] == [
        f"step-{step:08d}.safetensors"
    ]
    again, result = train_from_scratch(decoder(), *arguments, validation=DATA[:3], resume=True)
    assert result.step == 8 and result.tokens == whole.tokens
    for (name, a), (_, b) in zip(
        tree_flatten(net.parameters()), tree_flatten(again.parameters()), strict=True
    ):
        assert mx.array_equal(a, b), name


def test_resume_refuses_changed_settings_and_names_them(tmp_path):
    with pytest.raises(Killed):
        train(tmp_path, stop_at=3)
    with pytest.raises(MlxtxError, match=r"learning_rate was 0.003 and is 0.1"):
        train(tmp_path, True, learning_rate=0.1)
    with pytest.raises(MlxtxError, match="data was"):
        train(tmp_path, True, data=DATA[1:])
    train(tmp_path, True, save_every=5)


def test_accumulated_small_batches_are_one_large_batch(tmp_path):
    small = train(tmp_path / "a", batch_size=2, accumulate=3, optimizer="sgd")[2]
    large = train(tmp_path / "b", batch_size=6, accumulate=1, optimizer="sgd")[2]
    assert small.keys() == large.keys()
    for step, loss in small.items():
        assert loss == pytest.approx(large[step], rel=1e-5)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_optimizer_learns(tmp_path, kind):
    text = np.tile(np.arange(20), 40)
    rate = {"sgd": 0.3, "muon": 0.02, "lion": 1e-3}.get(kind, 1e-2)
    settings = {"iters": 25, "learning_rate": rate, "report_every": 25, "accumulate": 1}
    _, result, _ = train(tmp_path, data=Rows(text, 24), optimizer=kind, **settings)
    assert result.loss < math.log(61) - 0.2


def test_steps_that_are_not_finite_stop_the_run_with_the_last_good_state(tmp_path):
    out = tmp_path / "run"
    with pytest.raises(Killed):
        train(out, stop_at=4, optimizer="sgd")
    before = mx.load(str(sorted((out / "state").iterdir())[-1]))
    import mlxtx.tuning.trainer as trainer

    real = trainer.loss_and_gradients

    def poisoned(*args):
        loss, gradients = real(*args)
        loss.total = math.nan
        return loss, gradients

    trainer.loss_and_gradients = poisoned
    try:
        with pytest.raises(MlxtxError, match="not finite 3 steps in a row"):
            train(out, True, optimizer="sgd")
    finally:
        trainer.loss_and_gradients = real
    after = mx.load(str(sorted((out / "state").iterdir())[-1]))
    for name, array in before.items():
        if name.startswith("weights/"):
            assert mx.array_equal(array, after[name]), name
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["in_a_row"] for line in lines if line["stage"] == "skip"] == [1, 2, 3]


def test_a_full_disk_keeps_the_older_state(tmp_path, monkeypatch):
    out = tmp_path / "run"
    with pytest.raises(Killed):
        train(out, stop_at=4)
    kept = {p.name: p.read_bytes() for p in (out / "state").iterdir()}
    real = os.fsync

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MlxtxError, match="the disk is full"):
        train(out, True)
    monkeypatch.setattr(os, "fsync", real)
    assert {p.name: p.read_bytes() for p in (out / "state").iterdir()} == kept
    assert train(out, True)[1].step == 12


def test_best_weights_and_old_states(tmp_path):
    settings = Training(**{**SETTINGS, "validate_every": 4, "keep": 2})
    _, result = train_from_scratch(decoder(), DATA, tmp_path, settings, validation=DATA[:2])
    assert (tmp_path / "best" / "model.safetensors").exists()
    assert len(list((tmp_path / "state").iterdir())) == 2
    losses = [
        json.loads(line)["loss"]
        for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
        if '"validate"' in line
    ]
    assert len(losses) == 3 and result.best == min(losses)


@pytest.mark.parametrize("stage", ["train", "step", "validate"])
def test_no_validation_is_lost_or_done_twice_by_a_stop(tmp_path, stage):
    """Stopped by the report before the validation of step 6, inside it, and by its own report."""
    settings = Training(**{**SETTINGS, "iters": 8, "validate_every": 3})
    more = {"validation": DATA[:3]}

    def stop(event):
        if event.stage == stage and event.done == 6:
            metrics = (tmp_path / "cut" / "metrics.jsonl").read_text()
            assert '"step": 6' in metrics, "step 6 is done and told"
            raise KeyboardInterrupt

    def validations(run):
        lines = (tmp_path / run / "metrics.jsonl").read_text().splitlines()
        return [line for line in lines if '"validate"' in line]

    _, whole = train_from_scratch(decoder(), DATA, tmp_path / "whole", settings, **more)
    with pytest.raises(KeyboardInterrupt):
        train_from_scratch(decoder(), DATA, tmp_path / "cut", settings, on_event=stop, **more)
    _, cut = train_from_scratch(decoder(), DATA, tmp_path / "cut", settings, resume=True, **more)
    assert validations("cut") == validations("whole") and len(validations("cut")) == 3
    assert cut.best == whole.best
    best = [tmp_path / run / "best" / "model.safetensors" for run in ("whole", "cut")]
    assert best[0].read_bytes() == best[1].read_bytes()


def test_a_state_that_notes_no_validation_goes_on(tmp_path):
    settings = Training(**{**SETTINGS, "iters": 4, "save_every": 2})
    train_from_scratch(decoder(), DATA, tmp_path, settings)
    states = StateFolder(tmp_path / "state")
    states.path(4).unlink()
    state = states.load()
    del state.facts["validated"]
    states.save(state)
    seen = []
    settings = Training(**{**SETTINGS, "iters": 4, "validate_every": 1})
    train_from_scratch(
        decoder(), DATA, tmp_path, settings, validation=DATA[:2], resume=True, on_event=seen.append
    )
    assert [e.done for e in seen if e.stage == "validate"] == [3, 4]


def test_a_loss_that_is_no_number_is_never_the_best(tmp_path, monkeypatch):
    losses = iter([math.nan, 3.0, 2.0, math.nan])
    monkeypatch.setattr("mlxtx.tuning.trainer.validation_loss", lambda *_: next(losses))
    settings = Training(**{**SETTINGS, "iters": 4, "validate_every": 1})
    _, result = train_from_scratch(decoder(), DATA, tmp_path, settings, validation=DATA[:2])
    assert result.best == 2.0


def test_schedules():
    cosine = Schedule(1.0, 110, "cosine", warmup=10, final=0.1)
    assert [cosine(0), cosine(9), cosine(10)] == pytest.approx([0.1, 1.0, 1.0])
    assert cosine(60) == pytest.approx(0.55)
    assert cosine(110) == pytest.approx(0.1)
    linear = Schedule(2.0, 100, "linear")
    assert [linear(0), linear(50), linear(100)] == pytest.approx([2.0, 1.0, 0.0])
    with pytest.raises(MlxtxError, match="unknown schedule"):
        Schedule(1.0, 10, "triangle")


def test_every_epoch_sees_every_sample_once():
    order = Order(10, 4, seed=3)
    seen = [i for step in range(10) for i in order.step(step)]
    for epoch in range(4):
        assert sorted(seen[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert seen[:10] != seen[10:20]
    assert Order(10, 4, seed=3).step(7) == order.step(7)


def test_rows_predict_every_token_once():
    rows = Rows(np.arange(100), 9)
    predicted = [t for row in rows for t in row.tokens[1:]]
    assert predicted == list(range(1, 100))


def test_toml_says_the_whole_decoder(tmp_path):
    latent = block().__class__(attention=LATENT, feed_forward=block().feed_forward)
    no_norm = block().__class__(
        attention=block(window=9).attention,
        feed_forward=block(experts=True).feed_forward,
        attention_norm=None,
        attention_output_norm=NormConfig(eps=1e-5),
    )
    config = decoder(block(), block(), latent, no_norm, prediction_heads=(block(),))
    assert from_dict(to_dict(config)) == config
    path = tmp_path / "decoder.toml"
    path.write_text(to_toml(config))
    assert read_toml(path) == config
    assert "repeat = 2" in to_toml(config)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("vocabulary = ", "not valid TOML"),
        ("vocabulary = 10\nwidth = 8\ncontext = 4\nblocks = []\nwidht = 3", "unknown key: widht"),
        ('vocabulary = "ten"\nwidth = 8\ncontext = 4', "decoder.vocabulary must be of type int"),
        ("vocabulary = 10\nwidth = 8\ncontext = 4", "blocks is empty"),
    ],
)
def test_wrong_toml_says_what_is_wrong(tmp_path, text, message):
    path = tmp_path / "decoder.toml"
    path.write_text(text)
    with pytest.raises(MlxtxError, match=message):
        read_toml(path)

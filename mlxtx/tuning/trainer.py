"""The training loop: from samples and a model to weights that were trained, with a state that
a stopped run goes on from as if it had never been stopped."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxtx.errors import MlxtxError
from mlxtx.events import Event, Progress
from mlxtx.files import write_error, write_text_atomic
from mlxtx.tuning.objective import (
    Objective,
    StepLoss,
    add_gradients,
    evaluate_batch,
    loss_and_gradients,
)
from mlxtx.tuning.optimizer import Optimizer
from mlxtx.tuning.packing import Batch, make_batch
from mlxtx.tuning.samples import Order, Sample, fingerprint
from mlxtx.tuning.settings import FREE_SETTINGS, Training
from mlxtx.tuning.state import RunState, StateFolder
from mlxtx.tuning.trees import named, nested

# What a state notes of its run beside the step.
_COUNTED = ("best", "bad", "tokens", "validated")


@dataclass
class Result:
    """How a run ended: the last step, its reported loss, and the best validation loss."""

    step: int
    loss: float
    best: float | None
    tokens: int
    seconds: float


class Trainer:
    """Trains the trainable weights of ``model`` on ``samples`` and keeps its state in ``out``.

    write: saves what was trained, as it is in the model, to a folder (adapters or a model).
    facts: what else has to be the same when the run is resumed (the base model, the method).
    sampler: what the model says now, as ``prompt`` and ``text``; asked every ``sample_every`` steps.
    every_step: also tell before each batch, of a step or of a validation, so that who listens can
    end the run there and need not wait for the next report.
    """

    def __init__(
        self,
        model: Any,
        samples: Sequence[Sample],
        settings: Training,
        out: str | Path,
        *,
        write: Callable[[Path], None],
        validation: Sequence[Sample] = (),
        objective: Objective | None = None,
        facts: Mapping[str, Any] | None = None,
        sampler: Callable[[], list[dict[str, str]]] | None = None,
        on_event: Callable[[Event], None] | None = None,
        every_step: bool = False,
    ):
        self.model, self.samples, self.settings = model, samples, settings
        self.validation, self.write, self.sampler = validation, write, sampler
        self.out = Path(out)
        self.objective = objective or settings.objective()
        self.on_event = on_event or (lambda event: None)
        self.every_step = every_step
        self.ahead = len(model.config.prediction_heads) if settings.ahead_weight else 0
        per_step = settings.batch_size * settings.accumulate
        self.order = Order(len(samples), per_step, settings.seed, settings.shuffle)
        self.schedule = settings.learning_schedule()
        self.optimizer = Optimizer(
            settings.optimizer, settings.weight_decay, settings.optimizer_options, settings.master
        )
        self.states = StateFolder(self.out / "state", settings.keep)
        self.facts = {"data": fingerprint(samples), **(facts or {})}
        self.step = 0
        self.best: float | None = None
        self.bad = 0
        self.tokens = 0
        self.validated = 0  # the newest step with a validation
        self._first, self._started = 0, 0.0
        weights = self.weights()
        if not weights:
            raise MlxtxError("nothing in the model is trainable: choose other targets")
        self.optimizer.start(weights)
        self._good = self._snapshot()

    def weights(self) -> dict[str, mx.array]:
        return named(self.model.trainable_parameters())

    def _snapshot(self) -> RunState:
        facts = {name: getattr(self, name) for name in _COUNTED}
        return RunState(self.step, self.weights(), self.optimizer.state(), facts)

    # Resume

    def resume(self) -> bool:
        """Goes on from the newest state in ``out``; False when there is none. The metrics of steps
        that it has not seen are forgotten."""
        state = self.states.load()
        if state is None:
            self._cut_metrics()
            return False
        self._check_same(state.facts)
        self.model.update(nested(state.weights))
        self.optimizer.restore(state.optimizer)
        self.step = state.step
        # An older version did not note its validations.
        facts = {"validated": state.step, **state.facts}
        for name in _COUNTED:
            setattr(self, name, facts[name])
        self._good = self._snapshot()
        self._cut_metrics()
        return True

    def _identity(self) -> dict[str, Any]:
        settings = {k: v for k, v in asdict(self.settings).items() if k not in FREE_SETTINGS}
        if self.settings.schedule == "constant":
            settings.pop("iters")
        return json.loads(json.dumps({**settings, **self.facts}))

    def _check_same(self, facts: Mapping[str, Any]) -> None:
        old, new = facts["identity"], self._identity()
        changed = [
            f"{key} was {old[key]!r} and is {new.get(key)!r}"
            for key in old  # an older version may not have noted all of them
            if old[key] != new.get(key)
        ]
        if changed:
            raise MlxtxError(
                f"can't resume {self.out} with other settings: {'; '.join(changed)}. "
                "Set them back, or start in another folder"
            )

    # The loop

    def run(self) -> Result:
        """Trains up to ``iters`` steps. On an interruption the last whole step is saved."""
        started, loss = time.perf_counter(), math.nan
        try:
            loss = self._loop()
        except BaseException as error:
            self._restore_good()
            if self.step:  # a run that did nothing leaves nothing
                self._save_state()
                if isinstance(error, KeyboardInterrupt):  # what was learned so far can be tried
                    self.write(self.out)
            raise
        self._save_state()
        self.write(self.out)
        return Result(self.step, loss, self.best, self.tokens, time.perf_counter() - started)

    def _loop(self) -> float:
        settings, loss = self.settings, math.nan
        report = _Report()
        self._first, self._started = self.step, time.perf_counter()
        if self._validation_due():  # the run was stopped before it
            self._validate()
        while self.step < settings.iters:
            begun = time.perf_counter()
            step_loss, tokens = self._train_step()
            report.add(step_loss, tokens, time.perf_counter() - begun)
            last = self.step == settings.iters
            if self.step % settings.report_every == 0 or last:
                loss = report.loss
                self._tell_training(report)
                report = _Report()
            if self._validation_due():
                self._validate()
            if self.sampler and settings.sample_every and self.step % settings.sample_every == 0:
                for said in self.sampler():
                    self._tell("sample", self.step, said)
            if settings.save_every and self.step % settings.save_every == 0 and not last:
                self._save_state()
                self.write(self.out)
        return loss

    def _batches(self) -> list[Batch]:
        picked, size = self.order.step(self.step), self.settings.batch_size
        return [
            make_batch(
                [self.samples[i] for i in picked[start : start + size]],
                packing=self.settings.packing,
                ahead=self.ahead,
            )
            for start in range(0, len(picked), size)
        ]

    def _train_step(self) -> tuple[StepLoss, int]:
        mx.random.seed(self.settings.seed * 1_000_003 + self.step)  # dropout
        batches = self._batches()
        counts = [
            sum(len(terms[n].scored) for terms in map(self._terms, batches))
            for n in range(len(self._terms(batches[0])))
        ]
        total: dict[str, mx.array] | None = None
        loss = StepLoss(0.0, 0)
        for batch in batches:
            self._look()
            part, gradients = loss_and_gradients(self.model, batch, self.objective, counts)
            total = add_gradients(total, gradients)
            loss.total += part.total
            loss.count += part.count
            loss.extra += part.extra
        assert total is not None
        norm = _norm(total)
        if math.isfinite(loss.total) and math.isfinite(loss.extra) and math.isfinite(norm):
            self._update(total, norm)
            self.bad = 0
        else:
            self._skip()
        tokens = sum(batch.real_tokens for batch in batches)
        self.tokens += tokens
        self.step += 1
        self._good = self._snapshot()
        return loss, tokens

    def _terms(self, batch: Batch):
        return self.objective.terms(self.model, batch)

    def _update(self, gradients: dict[str, mx.array], norm: float) -> None:
        clip = self.settings.clip
        if clip and norm > clip:
            gradients = {n: g * (clip / norm) for n, g in gradients.items()}
        weights = self.optimizer.apply(self.weights(), gradients, self.schedule(self.step))
        self.model.update(nested(weights))
        mx.eval(weights, self.optimizer.state())

    def _skip(self) -> None:
        self.bad += 1
        self._tell("skip", self.step + 1, {"in_a_row": self.bad})
        if self.bad >= self.settings.bad_steps:
            raise MlxtxError(
                f"the loss or its gradient was not finite {self.bad} steps in a row, up to step "
                f"{self.step + 1}: stopped. The weights before that are saved in {self.out}; "
                "lower the learning rate or look at the data"
            )

    def _restore_good(self) -> None:
        good = self._good
        self.model.update(nested(good.weights))
        self.optimizer.restore(good.optimizer)
        self.step = good.step
        for name in _COUNTED:
            setattr(self, name, good.facts[name])

    def _save_state(self) -> None:
        state = self._snapshot()
        state.facts["identity"] = self._identity()
        self.states.save(state)

    # Reports

    def _validation_due(self) -> bool:
        every = self.settings.validate_every
        if not every or not len(self.validation) or self.validated == self.step:
            return False
        return self.step % every == 0 or self.step == self.settings.iters

    def _validate(self) -> None:
        size, most = self.settings.batch_size, self.settings.validate_batches
        loss = validation_loss(self.model, self.validation, size, most, self._look)
        # Not "loss < best": an older run may have noted a best loss that is no number.
        if not math.isnan(loss) and (self.best is None or not loss >= self.best):
            self.best = loss
            self.write(self.out / "best")
        self.validated = self.step
        self._good = self._snapshot()
        self._tell("validate", self.step, {"loss": loss})

    def _tell_training(self, report: _Report) -> None:
        details = {
            "loss": report.loss,
            "learning_rate": self.schedule(self.step - 1),
            "tokens_per_second": report.tokens / report.seconds,
            "peak_memory_bytes": mx.get_peak_memory(),
            "tokens": self.tokens,
        }
        self._tell("train", self.step, details)

    def _tell(self, stage: str, step: int, details: dict[str, Any]) -> None:
        line = {"step": step, "stage": stage, **details}
        try:
            with open(self._metrics(), "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise write_error(self.out / "metrics.jsonl", error) from None
        self._send(stage, step, details)

    def _look(self) -> None:
        """A place to end the run at, with the state of the last whole step."""
        if self.every_step:
            self._send("step", self.step, {})

    def _send(self, stage: str, step: int, details: dict[str, Any]) -> None:
        here = self.step - self._first
        # As if all steps had been of this run, so that the time left is right after a resume.
        seconds = (time.perf_counter() - self._started) / here * step if here else 0.0
        self.on_event(
            Progress(
                stage=stage,
                done=step,
                total=self.settings.iters,
                unit="steps",
                seconds=seconds,
                details=details,
            )
        )

    def _metrics(self) -> Path:
        self.out.mkdir(parents=True, exist_ok=True)
        return self.out / "metrics.jsonl"

    def _cut_metrics(self) -> None:
        path = self.out / "metrics.jsonl"
        if not path.exists():
            return
        lines = path.read_text("utf-8", errors="replace").splitlines()
        kept = [line for line in lines if _step_of(line) <= self.step]
        write_text_atomic(path, "".join(line + "\n" for line in kept))


def _norm(gradients: Mapping[str, mx.array]) -> float:
    squares = [mx.square(g.astype(mx.float32)).sum() for g in gradients.values()]
    return math.sqrt(float(mx.stack(squares).sum()))


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return math.inf


class _Report:
    """What adds up between two reports."""

    def __init__(self) -> None:
        self.total, self.count, self.tokens, self.seconds = 0.0, 0, 0, 0.0

    def add(self, loss: StepLoss, tokens: int, seconds: float) -> None:
        self.total += loss.total
        self.count += loss.count
        self.tokens += tokens
        self.seconds += seconds

    @property
    def loss(self) -> float:
        return self.total / max(self.count, 1)


def validation_loss(
    model: Any,
    samples: Sequence[Sample],
    batch_size: int,
    batches: int = 0,
    before_batch: Callable[[], None] = lambda: None,
) -> float:
    """Mean loss of the next token over ``samples`` (of the first ``batches`` batches, 0: all)."""
    total, count = 0.0, 0
    training = model.training
    model.eval()
    starts = range(0, len(samples), batch_size)
    for start in starts[: batches or None]:
        before_batch()
        rows = [samples[i] for i in range(start, min(start + batch_size, len(samples)))]
        part = evaluate_batch(model, make_batch(rows))
        total, count = total + part.total, count + part.count
    model.train(training)
    if not count:
        raise MlxtxError("the validation samples have no token in the loss")
    return total / count

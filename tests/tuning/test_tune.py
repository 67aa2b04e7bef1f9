"""``mlxtx.tune`` and the commands from files to adapters and back."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
import warnings

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlxtx.scripts import lora

import mlxtx
from mlxtx.errors import MlxtxError, MlxtxWarning
from mlxtx.events import Progress
from mlxtx.tiny_model import write_tiny_model
from mlxtx.tuning import Adapters, preview
from mlxtx.tuning.finetune import make_job
from mlxtx.tuning.lora import LowRank
from mlxtx.tuning.memory import plan_memory
from mlxtx.tuning.objective import NextToken, loss_and_gradients
from mlxtx.tuning.optimizer import Optimizer
from mlxtx.tuning.packing import make_batch
from mlxtx.tuning.samples import sample
from mlxtx.tuning.scratch import initial_model
from mlxtx.tuning.state import StateFolder
from mlxtx.tuning.targets import add_adapters, choose
from mlxtx.tuning.trees import named
from tests.tuning.tiny import block, decoder

RECORDS = [
    {"prompt": f"what is {n} plus {n}", "completion": f"The lamp says {2 * n}."} for n in range(12)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("tune")
    write_tiny_model(made / "model")
    lines = [json.dumps(r) for r in RECORDS]
    (made / "train.jsonl").write_text("\n".join([*lines, "{broken"]) + "\n")
    (made / "valid.jsonl").write_text("\n".join(lines[:3]) + "\n")
    return made


def tokens(model, text="what is 3 plus 3"):
    return mx.array([model.tokenizer.encode(text)])


@pytest.mark.parametrize("method", ["lora", "rslora", "dora", "full"])
def test_tune_learns_and_what_it_writes_loads(folder, tmp_path, method):
    seen = []
    model = mlxtx.load(folder / "model")
    before = np.array(model.model(tokens(model)))
    rate = 1e-3 if method == "full" else 1e-2
    result = mlxtx.tune(
        model,
        folder,
        tmp_path,
        method=method,
        iters=10,
        learning_rate=rate,
        report_every=5,
        validate_every=5,
        on_event=seen.append,
    )
    assert result.step == 10 and result.best < 8
    told = [e for e in seen if isinstance(e, Progress) and e.total == 10]
    batches = [e.done for e in told if e.stage == "step"]
    # before each step, and before the one batch of validation behind steps 5 and 10
    assert batches == [0, 1, 2, 3, 4, 5, 5, 6, 7, 8, 9, 10]
    assert [(e.stage, e.done, e.total) for e in told if e.stage != "step"] == [
        ("train", 5, 10),
        ("validate", 5, 10),
        ("train", 10, 10),
        ("validate", 10, 10),
    ]
    details = [e.details for e in seen if e.stage == "train"]
    assert details[1]["loss"] < details[0]["loss"]
    assert {"loss", "learning_rate", "tokens_per_second", "peak_memory_bytes"} <= set(details[0])
    after = np.array(model.model(tokens(model)))
    assert np.abs(after - before).max() > 0.1
    if method == "full":
        again = mlxtx.load(tmp_path)
    else:
        again = mlxtx.load(folder / "model", adapter=tmp_path)
    np.testing.assert_allclose(np.array(again.model(tokens(again))), after, atol=1e-5)
    assert again.generate("what is 3 plus 3", max_tokens=3).text is not None


def test_resume_through_the_command(folder, tmp_path, capsys):
    arguments = ["--model", str(folder / "model"), "--data", str(folder), "--iters", "8"]
    arguments += ["--report-every", "2", "--learning-rate", "1e-2", "--dropout", "0.2"]
    assert lora.main([*arguments, "--out", str(tmp_path / "whole")]) == 0
    whole = capsys.readouterr()
    assert "left out train.jsonl:13: not valid JSON" in whole.err
    events = 0

    def stop(event):
        nonlocal events
        events += getattr(event, "stage", "") == "train"
        if events == 2:
            raise KeyboardInterrupt

    options = {"iters": 8, "report_every": 2, "learning_rate": 1e-2, "dropout": 0.2}
    with pytest.raises(KeyboardInterrupt):
        mlxtx.tune(folder / "model", folder, tmp_path / "cut", on_event=stop, **options)
    assert mlxtx.load(folder / "model", adapter=tmp_path / "cut").model is not None
    with pytest.raises(MlxtxError, match="holds a run already: resume it"):
        mlxtx.tune(folder / "model", folder, tmp_path / "cut", **options)
    assert lora.main([*arguments, "--out", str(tmp_path / "cut"), "--resume"]) == 0

    def losses(text):
        return re.findall(r"step +(\d) of 8 +loss ([\d.]+)", text)

    rest = losses(capsys.readouterr().out)
    assert rest and rest == losses(whole.out)[-len(rest) :]
    files = [tmp_path / run / "adapters.safetensors" for run in ("whole", "cut")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_resume_refuses_another_base_of_the_same_shape(folder, tmp_path):
    shutil.copytree(folder / "model", tmp_path / "base")
    mlxtx.tune(tmp_path / "base", folder, tmp_path / "run", iters=2)
    weights = mx.load(str(tmp_path / "base" / "model.safetensors"))
    weights = {n: w + 0.01 if "layers.1" in n else w for n, w in weights.items()}
    mx.save_safetensors(str(tmp_path / "base" / "model.safetensors"), weights)
    with pytest.raises(MlxtxError, match="base weights was"):
        mlxtx.tune(tmp_path / "base", folder, tmp_path / "run", iters=2, resume=True)
    states = StateFolder(tmp_path / "run" / "state")
    state = states.load()
    del state.facts["identity"]["base weights"]  # as from a version that did not note them
    states.save(state)
    assert mlxtx.tune(tmp_path / "base", folder, tmp_path / "run", iters=2, resume=True).step == 2


def test_answers_while_it_trains_change_nothing(folder, tmp_path):
    seen = []
    options = {"iters": 4, "learning_rate": 1e-2, "report_every": 4, "dropout": 0.1}
    mlxtx.tune(folder / "model", folder, tmp_path / "a", **options)
    mlxtx.tune(
        folder / "model",
        folder,
        tmp_path / "b",
        sample_prompt="what is 3 plus 3",
        sample_every=2,
        on_event=seen.append,
        **options,
    )
    said = [e for e in seen if getattr(e, "stage", "") == "sample"]
    assert [e.done for e in said] == [2, 4]
    assert all(e.details["prompt"] == "what is 3 plus 3" for e in said)
    assert all(isinstance(e.details["text"], str) for e in said)
    files = [tmp_path / run / "adapters.safetensors" for run in "ab"]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_preview_shows_masks_plan_and_bad_lines(folder, capsys):
    found = preview(folder / "model", folder, samples=1)
    assert found["samples"] == [
        [
            ("<|user|>what is 0 plus 0<|end|><|assistant|>", False),
            ("The lamp says 0.<|end|>", True),
        ]
    ]
    assert found["count"] == 12 and found["validation_count"] == 3
    assert found["bad_lines"][0].startswith("train.jsonl:13: not valid JSON")
    assert found["fits"] and found["seconds_per_step"] > 0
    assert found["memory"]["total"] > found["memory"]["weights"] > 0
    lora.main(["--model", str(folder / "model"), "--data", str(folder), "--dry-run"])
    out = capsys.readouterr().out
    assert "<|assistant|>⟦The lamp says 0.<|end|>⟧" in out and "memory: about" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": "wq"}, "no layer is called 'wq'; there are: down_proj"),
        ({"method": "magic"}, "unknown method 'magic': use lora"),
        ({"optimizer": "best"}, "unknown optimizer 'best'"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"rank": 0}, "rank must be at least 1"),
        ({"itres": 3}, "tune has no option itres"),
        ({"loss_on": "none"}, "unknown loss_on 'none'"),
        ({"max_length": 3}, "no record can be used"),
    ],
)
def test_wrong_options_say_what_is_wrong(folder, tmp_path, options, message):
    with pytest.raises(MlxtxError, match=message):
        mlxtx.tune(folder / "model", folder, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_run_that_fails_at_once_leaves_no_state(folder, tmp_path):
    def refuse(event):
        raise KeyboardInterrupt

    seen = {"report_every": 1, "iters": 3}
    model = mlxtx.load(folder / "model")
    model.model.lm_head.weight = model.model.lm_head.weight * mx.nan
    with pytest.raises(KeyboardInterrupt):
        mlxtx.tune(model, folder, tmp_path / "out", on_event=refuse, **seen)
    assert not (tmp_path / "out" / "state").exists()


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_killed_before_its_first_state_leaves_no_points(folder, tmp_path, resume):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 90, "stage": "train", "loss": 4.0}\n{"step": 9')
    mlxtx.tune(folder / "model", folder, tmp_path, iters=2, report_every=1, resume=resume)
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == [1, 2]


def test_a_plan_that_does_not_fit_stops_before_the_first_step(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("mlxtx.tuning.memory.memory_limit", lambda: 100_000)
    with pytest.raises(MlxtxError, match=r"a step would need about .* use a smaller batch_size"):
        mlxtx.tune(folder / "model", folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    mlxtx.tune(folder / "model", folder, tmp_path / "out", iters=1, force=True)
    assert (tmp_path / "out" / "adapter_config.json").is_file()


@pytest.mark.parametrize("checkpoint", [False, True])
def test_the_memory_plan_is_near_what_a_step_takes(checkpoint):
    """Not below it by more than a tenth, and not above twice as much."""
    config = decoder(block(), block(), block(), block(), vocabulary=2000, width=128)
    net = initial_model(config)
    net.freeze()
    add_adapters(net, dict.fromkeys(choose(net, "all"), LowRank()))
    rows = [sample(np.arange(257) % 2000) for _ in range(4)]
    batch, objective = make_batch(rows), NextToken(checkpoint=checkpoint)
    plan = plan_memory(net, [256] * 4, checkpoint=checkpoint)
    loss_and_gradients(net, batch, objective)
    mx.synchronize()
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    loss_and_gradients(net, batch, objective)
    taken = mx.get_peak_memory() - before + plan.weights
    assert 0.9 * taken < plan.total < 2 * taken, (plan, taken)


# Bytes a weight: gradient and new weight, and old and new copies, first and second moments.
@pytest.mark.parametrize(
    ("dtype", "master", "bytes_a_weight"),
    [
        (mx.float32, True, 4 + 4 + 2 * (4 + 4)),
        (mx.bfloat16, True, 2 + 2 + 2 * (4 + 4 + 4)),
        (mx.bfloat16, False, 2 + 2 + 2 * (2 + 2)),
    ],
)
def test_the_memory_plan_counts_what_the_optimizer_keeps(dtype, master, bytes_a_weight):
    before = mx.get_active_memory()
    net = initial_model(decoder(*[block()] * 12, width=128))
    net.set_dtype(dtype)
    weights = named(net.trainable_parameters())
    mx.eval(weights)
    plan = plan_memory(net, [8], master=master)
    count = sum(w.size for w in weights.values())
    assert plan.trained == bytes_a_weight * count
    stepper = Optimizer("adamw", master=master)
    stepper.start(weights)
    for _ in range(2):  # the second has an old state as well
        gradients = {n: mx.ones_like(w) for n, w in weights.items()}
        old = stepper.state()  # as the run keeps the last good one
        mx.eval(gradients, old)
        mx.clear_cache()
        mx.reset_peak_memory()
        mx.eval(stepper.apply(weights, gradients, 1e-3), stepper.state())
    taken = mx.get_peak_memory() - before
    assert 0.9 * taken < plan.weights + plan.trained < 1.1 * taken


def test_whole_weights_are_trained_beside_an_adapter_and_come_back(folder, tmp_path):
    model = mlxtx.load(folder / "model")
    head = np.array(model.model.lm_head.weight)
    mlxtx.tune(
        model, folder, tmp_path, targets="q_proj", whole=["lm_head"], iters=4, learning_rate=1e-2
    )
    assert np.abs(np.array(model.model.lm_head.weight) - head).max() > 1e-3
    wanted = np.array(model.model(tokens(model)))
    fresh = mlxtx.load(folder / "model")
    adapters = Adapters(fresh.model, fresh.config)
    name = adapters.load(tmp_path)
    adapters.use(name)
    np.testing.assert_allclose(np.array(fresh.model(tokens(fresh))), wanted, atol=1e-5)
    adapters.use(None)
    assert np.array_equal(np.array(fresh.model.lm_head.weight), head)


def test_packed_weights_are_not_trained_as_they_are(folder, tmp_path):
    model = mlxtx.load(folder / "model")
    nn.quantize(model.model, group_size=32, bits=4)
    with pytest.raises(MlxtxError, match="is packed in 4 bits and can't be trained as it is"):
        mlxtx.tune(model, folder, tmp_path, method="full")
    result = mlxtx.tune(model, folder, tmp_path, method="qlora", iters=4, learning_rate=1e-2)
    assert result.loss < 9


@pytest.mark.parametrize("method", ["lora", "full"])
def test_bfloat16_weights_learn_by_steps_smaller_than_their_rounding(folder, tmp_path, method):
    """A step of 1e-4 on weights near 1 is lost in bfloat16 (whose steps there are 2^-8), but not in
    the optimizer's float32 copies."""
    losses = {}
    for master in (True, False):
        model = mlxtx.load(folder / "model", dtype="bfloat16")
        seen = []
        mlxtx.tune(
            model,
            folder,
            tmp_path / str(master),
            method=method,
            adapter_dtype="bfloat16",
            master=master,
            optimizer="sgd",
            schedule="constant",
            iters=12,
            learning_rate=1e-3 if method == "full" else 1e-2,
            report_every=12,
            validate_every=12,
            on_event=seen.append,
        )
        losses[master] = next(e.details["loss"] for e in seen if e.stage == "validate")
        kinds = {a.dtype for a in named(model.model.trainable_parameters()).values()}
        assert kinds == {mx.bfloat16}
    assert losses[True] <= losses[False]


def test_a_killed_process_resumes_to_the_bit(folder, tmp_path):
    """SIGKILL at random moments; whatever state was on disk last, the end is the same.

    With MLX's own BLAS: under a preloaded OpenBLAS even runs that were never stopped end in one
    of two ways, from process to process.
    """
    command = [sys.executable, "-m", "mlxtx", "lora", "--model", str(folder / "model")]
    command += ["--data", str(folder), "--iters", "30", "--save-every", "1", "--dropout", "0.1"]
    command += ["--report-every", "1", "--learning-rate", "1e-2", "--out"]
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    run = {"capture_output": True, "text": True, "check": True, "env": environment}
    whole = subprocess.run([*command, str(tmp_path / "whole")], **run)
    chance, kills = random.Random(7), 0
    out = tmp_path / "killed"
    for _ in range(2):
        resume = ["--resume"] if (out / "state").exists() else []
        with subprocess.Popen(
            [*command, str(out), *resume],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        ) as process:
            for _ in range(chance.randrange(3, 10)):  # so many reports, then no warning
                process.stdout.readline()
            process.kill()
        kills += process.returncode == -9
    assert kills == 2
    rest = subprocess.run([*command, str(out), "--resume"], **run)

    def losses(text):
        return re.findall(r"step +(\d+) of 30 +loss ([\d.]+)", text)

    assert 0 < len(losses(rest.stdout)) < 30
    assert losses(rest.stdout) == losses(whole.stdout)[-len(losses(rest.stdout)) :]
    files = [tmp_path / name / "adapters.safetensors" for name in ("whole", "killed")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_list_of_records_is_split_as_a_file_is(folder):
    job = make_job(folder / "model", RECORDS, validation_part=0.25, validate_every=1)
    assert (len(job.train.samples), len(job.validation.samples)) == (9, 3)


def test_weights_trained_whole_stay_in_an_adapter_that_goes_on(folder, tmp_path):
    options = {"learning_rate": 1e-2, "iters": 4}
    first, second = tmp_path / "first", tmp_path / "second"
    mlxtx.tune(str(folder / "model"), folder, first, whole=["lm_head"], **options)
    options = {"learning_rate": 1e-9, "iters": 1}
    mlxtx.tune(str(folder / "model"), folder, second, adapter=str(first), **options)
    wanted, found, base = (
        np.array(model.model(tokens(model)))
        for model in (mlxtx.load(folder / "model", adapter=a) for a in (first, second, None))
    )
    assert np.abs(wanted - found).max() < 1e-4 < np.abs(wanted - base).max()


def test_options_without_effect_are_said(folder, tmp_path):
    mlxtx.tune(folder / "model", folder, tmp_path, iters=1, rank=2)
    given = {"adapter": str(tmp_path), "rank": 4, "dropout": 0.1, "method": "dora"}
    with pytest.warns(MlxtxWarning, match="^without effect: rank, dropout, method, for the"):
        make_job(folder / "model", RECORDS, **given)
    with pytest.warns(MlxtxWarning, match="nothing looks at without validate_every"):
        make_job(folder / "model", RECORDS, validation_part=0.25)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_job(
            folder / "model", RECORDS, adapter=str(tmp_path), method="qlora", whole=["lm_head"]
        )


def test_a_full_training_does_not_write_over_its_model(folder, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(folder / "model", model)
    before = (model / "model.safetensors").read_bytes()
    with pytest.raises(MlxtxError, match="is where the model lies"):
        mlxtx.tune(str(model), folder, model, method="full", iters=1)
    assert (model / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    "options",
    [
        {"clip": -1.0},
        {"learning_rate": float("nan")},
        {"seed": -1},
        {"validate_every": -1},
        {"layers": 0},
        {"alpha": float("nan")},
        {"max_length": -5},
        {"method": "full", "adapter": "somewhere"},
    ],
)
def test_options_that_make_no_sense_are_refused(folder, tmp_path, options):
    with pytest.raises(MlxtxError, match=r"must be|without adapters"):
        mlxtx.tune(str(folder / "model"), folder, tmp_path / "out", iters=1, **options)


@pytest.mark.parametrize("given", [["--sample-prompts", "Hi"], ["--sample-every", "2"]])
def test_prompts_and_how_often_they_are_asked_go_together(given, tmp_path):
    with pytest.raises(MlxtxError, match="go together"):
        lora.main(["--model", "none", "--data", "none", "--out", str(tmp_path), *given])


def test_a_validation_of_nothing_is_told(folder, tmp_path, capsys):
    (tmp_path / "train.jsonl").write_text('{"prompt": "a", "completion": "b c"}\n')
    line = ["--model", str(folder / "model"), "--data", str(tmp_path / "train.jsonl")]
    for more in (["--validate-every", "1"], []):
        out = str(tmp_path / f"out{len(more)}")
        assert lora.main([*line, "--out", out, "--iters", "1", *more]) == 0
        assert ("there are no validation records" in capsys.readouterr().err) is bool(more)

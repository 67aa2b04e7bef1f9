"""The ladder of cache settings, and what is kept on disk, through the commands."""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
import pytest

from mlxtx.diagnostics.kv_check import bytes_per_token, check_kv, smallest_within
from mlxtx.diagnostics.kv_defaults import default_kv, store_default_kv
from mlxtx.errors import MlxtxError
from mlxtx.language_model import load
from mlxtx.tiny_model import write_tiny_model
from scripts.cache import main as cache_command
from scripts.kv_check import main as kv_check_command
from tests.cache.tiny_models import KINDS, tiny_model
from tests.tiny_model import tiny_folder

TOKENS = np.random.default_rng(5).integers(0, 50, 150).tolist()


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("MLXTX_HOME", str(tmp_path / "home"))


@pytest.mark.parametrize("kind", KINDS)
def test_fewer_bits_lose_more_and_take_less(kind):
    scores = check_kv(tiny_model(*KINDS[kind]), TOKENS, ladder=["k8v8g32", "k4v4g32", "k2v2g32"])
    assert [s.kv for s in scores] == ["plain", "k8v8g32", "k4v4g32", "k2v2g32"]
    assert scores[0].divergence == 0 and scores[0].agreement == 1
    losses = [s.divergence for s in scores]
    assert losses == sorted(losses) and losses[1] < 1e-3 < losses[3]
    sizes = [s.bytes_per_token for s in scores]
    assert sizes == sorted(sizes, reverse=True)
    assert smallest_within(scores, 0.0).kv == "plain"
    assert smallest_within(scores, 1e9).kv == "k2v2g32"
    assert smallest_within(scores, -1.0).kv == "plain"


def test_the_divergence_is_that_of_the_distributions():
    model = tiny_model()
    score = check_kv(model, TOKENS[:60], ladder=["k3v3g32"])[1]
    plain = np.array(model(mx.array([TOKENS[:60]]), model.make_cache())[0], np.float64)
    kept = np.array(model(mx.array([TOKENS[:60]]), model.make_cache("k3v3g32"))[0], np.float64)
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (plain, kept))
    divergence = (np.exp(p) * (p - q)).sum(-1)[8:]
    assert score.divergence == pytest.approx(divergence.mean(), rel=1e-3)


def test_bytes_per_token_are_those_of_the_cache():
    model = tiny_model(*KINDS["full"])
    sizes = []
    for tokens in (256, 512):
        cache = model.make_cache("k8v4g32")
        model(mx.zeros((1, tokens), mx.int32), cache)
        sizes.append(cache.nbytes)
    assert sizes[1] - sizes[0] == 256 * bytes_per_token(model, "k8v4g32")


def test_a_short_text_is_refused():
    with pytest.raises(MlxtxError, match="give a text of a page"):
        check_kv(tiny_model(), TOKENS[:10])


def test_the_command_stores_what_auto_means(capsys, tmp_path):
    folder = tiny_folder()
    assert default_kv(folder) == "plain"
    options = [str(folder), "--tokens", "100", "--kv", "k8v8g32,k2v2g32", "--loss", "0.05"]
    assert kv_check_command([*options, "--store"]) == 0
    told = capsys.readouterr().out
    assert "k8v8g32" in told and "smallest within 0.05" in told
    assert kv_check_command([*options, "--json"]) == 0
    chosen = json.loads(capsys.readouterr().out)["chosen"]
    assert default_kv(folder) == chosen != "plain"
    model = load(folder, kv="auto")
    assert str(model.session().cache.settings) == chosen
    assert str(model.session("plain").cache.settings) == "plain"
    with pytest.raises(MlxtxError, match="cannot read"):
        kv_check_command([str(folder), "--text", str(tmp_path / "none")])
    with pytest.raises(MlxtxError, match="not 7"):
        store_default_kv(folder, "k7v7")


def test_a_prefix_is_built_listed_used_and_deleted(capsys, tmp_path):
    folder = tiny_folder()
    system = tmp_path / "system.txt"
    system.write_text("Answer kindly. " * 30)
    assert cache_command(["build", str(folder), "--system", str(system)]) == 0
    assert "kept" in capsys.readouterr().out
    assert cache_command(["list"]) == 0
    name = capsys.readouterr().out.split()[0]

    model = load(folder)
    chat = model.chat(system.read_text())
    done = list(chat.stream("Hello?", max_tokens=4))[-1]
    assert done.stats.prompt_tokens - done.stats.reused_tokens < 30
    assert done.stats.reused_tokens > 100
    fresh = model.generate(
        [{"role": "system", "content": system.read_text()}, {"role": "user", "content": "Hello?"}],
        max_tokens=4,
    )
    assert chat.messages[-1]["content"] == fresh.text
    other = load(folder, dtype="bfloat16")  # not the model that filled it
    done = list(other.chat(system.read_text()).stream("Hello?", max_tokens=2))[-1]
    assert done.stats.reused_tokens == 0

    assert cache_command(["rm", name]) == 0
    capsys.readouterr()
    cache_command(["list"])
    assert capsys.readouterr().out.startswith("0.0 MB of")


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        (cache_command, ["--folder", "FILE", "build", "MODEL", "--text", "FILE"], "cannot make"),
        (cache_command, ["--budget", "nan", "list"], "--budget must be"),
        (kv_check_command, ["MODEL", "--tokens", "-4"], "must be 1 or more"),
    ],
)
def test_impossible_options_are_one_line(tmp_path, command, options, message):
    text = tmp_path / "text.txt"
    text.write_text("Answer kindly. " * 10)
    given = {"FILE": str(text), "MODEL": str(tiny_folder())}
    with pytest.raises(MlxtxError, match=message):
        command([given.get(option, option) for option in options])


def test_a_prefix_longer_than_prompts_can_share_is_refused(tmp_path):
    """Behind the trained context dynamic scaling turns all keys by angles of that length."""
    folder = write_tiny_model(
        tmp_path / "model",
        rope_scaling={"rope_type": "dynamic", "factor": 4.0},
        max_position_embeddings=64,
    )
    text = tmp_path / "text.txt"
    text.write_text("Answer kindly. " * 30)
    with pytest.raises(MlxtxError, match="from 1 to 64"):
        cache_command(["build", str(folder), "--text", str(text)])
    text.write_text("Answer kindly.")
    assert cache_command(["build", str(folder), "--text", str(text)]) == 0


def test_a_model_that_does_not_fit_is_not_loaded(monkeypatch):
    monkeypatch.setenv("MLXTX_MEMORY_LIMIT", "3000000")
    with pytest.raises(MlxtxError, match="--force"):
        load(tiny_folder())
    assert load(tiny_folder(), force=True).prefill_chunk < 1024


def test_commands_refuse_what_does_not_fit_unless_forced(monkeypatch, capsys):
    from mlxtx.cli import main

    monkeypatch.setenv("MLXTX_MEMORY_LIMIT", "3000000")
    options = ["--model", str(tiny_folder()), "--max-tokens", "2"]
    assert main(["generate", *options, "--prompt", "Hello"]) == 2
    told = capsys.readouterr().err
    assert "3.00 MB" in told and "--force" in told
    assert main(["generate", *options, "--force", "--prompt", "Hello"]) == 0
    capsys.readouterr()
    assert main(["plan", str(tiny_folder()), "--kv", "k4v4g32"]) == 1
    assert "does not fit" in capsys.readouterr().out
    monkeypatch.delenv("MLXTX_MEMORY_LIMIT")
    assert main(["plan", str(tiny_folder()), "--kv-bits", "8,4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kv"] == "k8v4g64"
    assert main(["plan", str(tiny_folder()), "--kv", "k7v4"]) == 2
    assert "not 7" in capsys.readouterr().err

"""The cache's benchmark runs, and its figures add up."""

from __future__ import annotations

import json
import re

from scripts import count_memory
from scripts.bench_cache import main


def test_both_benchmarks_tell_their_figures(tmp_path, capsys):
    file = tmp_path / "figures.json"
    options = ["--contexts", "96", "--kv", "plain,k4v4g64", "--tokens", "3", "--json", str(file)]
    assert main(options) == 0
    plain, kept = json.loads(file.read_text())
    assert (plain["side"], plain["kv"], kept["kv"]) == ("mlxtx", "plain", "k4v4g64")
    for row in (plain, kept):
        assert row["first token s"] > 0 and row["decode tok/s"] > 0 and row["peak MB"] > 1
    assert "| mlxtx | 96 | k4v4g64 |" in capsys.readouterr().out

    assert main(["--second-turn", "96", "--kv", "k8v8g64", "--json", str(file)]) == 0
    (row,) = json.loads(file.read_text())
    assert row["part"] == row["second turn s"] / row["first turn s"]


def test_planned_weights_and_cache_are_what_is_measured(monkeypatch):
    small = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 64}
    monkeypatch.setitem(count_memory.MODELS, "small", count_memory.SHAPE | small)
    found = count_memory.measure("small", 96, "k8v4g32")
    assert found["planned weights"] == found["weights"] > 0
    assert found["planned cache"] == found["cache"] > 0
    assert found["peak"] > found["weights"] + found["cache"]
    table = count_memory.render([(("small", 96, "k8v4g32"), found)])
    assert table.splitlines()[-1].startswith("| small | 96 | k8v4g32 |")


def test_the_page_tells_peaks_within_a_tenth():
    text = count_memory.PAGE.read_text(encoding="utf-8")
    table = text.split("<!-- memory: begin -->")[1].split("<!-- memory: end -->")[0]
    errors = [int(error) for error in re.findall(r"\| ([+-]\d+) % \|", table)]
    assert len(errors) == len(count_memory.CASES) >= 6
    assert max(map(abs, errors)) <= 10

"""The cache's benchmark runs, and its figures add up."""

from __future__ import annotations

import json

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

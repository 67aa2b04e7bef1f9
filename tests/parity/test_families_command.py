"""The table of families tells what is registered and what was proven, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cases import CASES
from mlxtx.scripts import families as command
from recipe import fixture_names

from mlxtx.errors import MlxtxError
from mlxtx.families import families, family_for

PROVEN = command.recorded()


def test_every_registered_family_is_proven_in_every_way() -> None:
    assert sorted(PROVEN["families"]) == sorted(families())
    for name, about in PROVEN["families"].items():
        assert about["cases"], f"{name} was never compared"
        for case, result in about["cases"].items():
            assert "greedy_miss" not in result, case
            errors = {way: result[way] for way in (*command.WAYS, "legacy")}
            assert max(errors.values()) <= PROVEN["tolerance"], (case, errors)


def test_every_case_has_its_fixture_and_its_record() -> None:
    recorded = {case for about in PROVEN["families"].values() for case in about["cases"]}
    assert sorted(recorded) == sorted(CASES) == fixture_names()


def test_table_has_a_row_for_each_family(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split("|")[1].strip() for line in lines if line.startswith("|")]
    assert rows[2:] == sorted(families())
    gemma = next(line for line in lines if line.startswith("| gemma2 "))
    assert "sandwich RMSNorm" in gemma and "soft cap" in gemma and "GeGLU" in gemma


def test_readme_holds_the_table_as_it_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command.main(["--markdown"])
    readme = Path(__file__).parents[2] / "README.md"
    assert f"{command.BEGIN}\n{capsys.readouterr().out}{command.END}" in readme.read_text()
    page = tmp_path / "page.md"
    page.write_text(f"above\n{command.BEGIN}\nan old table\n{command.END}\nbelow\n")
    assert command.main(["--write", str(page)]) == 0
    above, *table, below = page.read_text().splitlines()
    assert (above, below) == ("above", "below") and "an old table" not in table
    assert "\n".join(table) in readme.read_text()


def test_one_family_shows_its_cases(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["phi3", "--json"]) == 0
    cases = json.loads(capsys.readouterr().out)["families"]["phi3"]["cases"]
    assert {"phi3", "phi3_longrope", "phi3_window"} <= set(cases)


def test_unknown_family_names_the_nearest() -> None:
    with pytest.raises(MlxtxError, match="qwen3_moe"):
        family_for({"model_type": "qwen3moe"})
    with pytest.raises(MlxtxError, match="nearest supported"):
        command.main(["llama5"])

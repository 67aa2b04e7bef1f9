from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("textual", reason="pip install textual to test the terminal app")


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes what a person has: settings, chats, Hub cache."""
    monkeypatch.setenv("MLXTX_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    monkeypatch.delenv("NO_COLOR", raising=False)
    # Whether the bundled model is there must not decide a test.
    monkeypatch.setattr("mlxtx.tui.library.BUNDLED", tmp_path / "no-bundled")

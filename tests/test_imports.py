"""What starts quickly stays quick: heavy libraries are loaded when they are needed."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = {
    "mlx",
    "transformers",
    "torch",
    "textual",
    "tokenizers",
    "sentencepiece",
    "jinja2",
    "huggingface_hub",
    "numpy",
    "argparse",
}


def modules_after(code: str) -> set[str]:
    """Top-level modules that are loaded after ``code`` ran in a new interpreter."""
    report = "import sys, json; sys.stderr.write(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return {name.split(".")[0] for name in json.loads(done.stderr)}


@pytest.mark.parametrize(
    "code",
    [
        "import mlxtx",
        "import mlxtx.events, mlxtx.errors, mlxtx.text, mlxtx.generation",
        "from mlxtx.cli import main; main(['--help'])",
        "from mlxtx.cli import main; main(['--version'])",
        "import mlxtx; dir(mlxtx)",
    ],
)
def test_nothing_heavy_at_the_start(code):
    before = modules_after("pass")
    assert not (modules_after(code) - before) & HEAVY


@pytest.mark.parametrize("command", ["generate", "chat", "bench"])
def test_a_command_s_help_needs_no_model_library(command):
    code = f"""
from mlxtx.cli import main
try:
    main([{command!r}, '--help'])
except SystemExit:
    pass"""
    loaded = modules_after(code) - modules_after("pass")
    assert not loaded & (HEAVY - {"argparse"})


def test_public_names_are_there():
    import mlxtx

    for name in mlxtx.__all__:
        if name in ("convert", "tune"):  # rooms that need more than this test loads
            continue
        assert getattr(mlxtx, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        mlxtx.nothing  # noqa: B018


def test_the_library_never_loads_the_screen():
    code = "import mlxtx.language_model, mlxtx.generation.generate, mlxtx.text.tokenizer"
    assert not modules_after(code) & {"textual", "rich", "transformers", "torch"}

"""The commands as a user runs them, on a real (tiny) model."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from mlxtx.cli import COMMANDS, main
from tests.tiny_model import tiny_folder, tiny_language_model

PROMPT = "The lamp on the table"


def generate(*arguments: str) -> int:
    return main(["generate", "--model", str(tiny_folder()), *arguments])


def expected(messages=None, **options):
    messages = messages or [{"role": "user", "content": PROMPT}]
    return tiny_language_model().generate(messages, **options)


# --- dispatch -------------------------------------------------------------------------------


def test_help_lists_every_command(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for name, about in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(about)}$", shown, re.MULTILINE)


def test_version(capsys):
    import mlxtx

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"mlxtx {mlxtx.__version__}\n"


def one_error(capsys) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1 and "Traceback" not in captured.err
    return captured.err


def test_an_unknown_command_suggests_a_known_one(capsys):
    assert main(["genrate"]) == 2
    assert one_error(capsys) == "mlxtx: there is no command 'genrate'; did you mean generate?\n"
    assert main(["zzz"]) == 2
    assert "mlxtx --help lists them" in one_error(capsys)


def test_a_command_without_a_script_is_one_line(capsys, monkeypatch):
    monkeypatch.setitem(COMMANDS, "not-there", "nothing")
    assert main(["not-there"]) == 2
    assert one_error(capsys) == "mlxtx: the command not-there is not part of this installation\n"


def test_errors_are_one_line_and_debug_shows_where(capsys):
    arguments = ["generate", "--model", "/no/such/folder", "--prompt", "x"]
    assert main(arguments) == 2
    assert "/no/such/folder" in one_error(capsys)
    assert main([*arguments, "--debug"]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback") and "MlxtxError: there is no folder" in shown


def test_error_text_cannot_control_the_terminal(capsys):
    assert main(["generate", "--model", "/x\x1b[2J", "--prompt", "x"]) == 2
    assert "\x1b" not in one_error(capsys)


def test_a_warning_is_one_line_too(monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # main sets its own
    assert main(["--help"]) == 0
    told = warnings.formatwarning("two\nlines \x1b[2J", UserWarning, "file.py", 1)
    assert told == "mlxtx: two lines \u241b[2J\n"


def test_an_unexpected_error_is_one_line_too(capsys, monkeypatch):
    number = 28

    def fail(*arguments):
        raise OSError(number, "No space left on device\nreally")

    monkeypatch.setattr("mlxtx.scripts.generate.load_for", fail)
    assert main(["generate", "--prompt", "x"]) == 2
    assert "the disk is full (No space left on device really)" in one_error(capsys)
    number = 5
    assert main(["generate", "--prompt", "x"]) == 2
    assert "OSError: [Errno 5] No space left on device really (--debug" in one_error(capsys)


# --- generate -------------------------------------------------------------------------------


def test_generate_prints_the_answer(capsys):
    assert generate("--prompt", PROMPT, "--max-tokens", "8") == 0
    captured = capsys.readouterr()
    assert captured.out == expected(max_tokens=8).text + "\n"
    assert captured.err == ""


def test_generate_json(capsys):
    assert generate("-p", PROMPT, "--max-tokens", "5", "--json", "--logprobs", "2", "--stats") == 0
    captured = capsys.readouterr()
    wanted = expected(max_tokens=5, logprobs=2)
    result = json.loads(captured.out)
    assert result["text"] == wanted.text and result["tokens"] == wanted.tokens
    assert result["finish_reason"] == "length"
    assert result["stats"]["generated_tokens"] == 5
    assert result["logprobs"][0]["token"] == wanted.tokens[0]
    assert len(result["logprobs"][0]["top"]) == 2
    assert "5 new at" in captured.err and "ended by: length" in captured.err


def test_generate_options_reach_the_sampler(capsys):
    options = ["--temperature", "1.5", "--top-k", "40", "--top-p", "0.9", "--min-p", "0.01"]
    more = ["--seed", "4", "--repetition-penalty", "1.2", "--stop", "zz", "--logit-bias", "9=-50"]
    assert generate("-p", PROMPT, "--max-tokens", "9", *options, *more) == 0
    wanted = expected(
        max_tokens=9,
        temperature=1.5,
        top_k=40,
        top_p=0.9,
        min_p=0.01,
        seed=4,
        repetition_penalty=1.2,
        stop=["zz"],
        logit_bias={9: -50.0},
    )
    assert capsys.readouterr().out == wanted.text + "\n"


def test_filters_that_change_nothing_are_told(capsys):
    line = ["-p", PROMPT, "--max-tokens", "3", "--top-p", "0.9", "--min-p", "0"]
    assert generate(*line) == 0
    captured = capsys.readouterr()
    assert captured.out == expected(max_tokens=3).text + "\n"
    assert captured.err == "mlxtx: without a --temperature above 0, --top-p changes nothing\n"
    assert generate(*line, "--temperature", "0.5") == 0
    assert capsys.readouterr().err == ""


def test_generate_raw_system_and_beams(capsys):
    assert generate("-p", PROMPT, "--raw", "--max-tokens", "4") == 0
    assert (
        capsys.readouterr().out == tiny_language_model().generate(PROMPT, max_tokens=4).text + "\n"
    )
    assert generate("-p", PROMPT, "--system", "Be kind.", "--max-tokens", "4", "--beams", "2") == 0
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": PROMPT}]
    assert capsys.readouterr().out == expected(messages, max_tokens=4, beams=2).text + "\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", " \n"], "the prompt is empty"),
        (["--prompt", "x", "--temperature", "-1"], "temperature must be 0 or more"),
        (["--prompt", "x", "--logit-bias", "5"], "'5' is not TOKEN=X"),
        (["--prompt", "x", "--logprobs", "2"], "--logprobs goes with --json"),
        (["--prompt", "x", "--tempreature", "1"], "unrecognized arguments: --tempreature 1 (mlxtx"),
        (["--prompt", "x", "--beams"], "--beams: expected one argument (mlxtx generate --help"),
        (["--prompt", "lamp " * 3000], "more than the model's context of 2048"),
        (["--prompt", "x", "--kv", "k9v9"], "bits, not 9"),
        (["--prompt", "x", "--length-penalty", "2"], "goes with --beams"),
    ],
)
def test_bad_input_is_one_line(capsys, arguments, message):
    assert generate(*arguments) == 2
    assert message in one_error(capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert", "x", "--out", "y", "--private"], "--private goes with --upload"),
        (["evaluate", "-m", "x", "--data", "y", "--chat"], "--chat goes with --choices"),
        (["kv-check", "x", "--loss", "nan"], "--loss must be 0 or more"),
        (["chat", "--plain", "--continue"], "--continue is the app's"),
        (["families", "--write", "/no/such/page"], "cannot read /no/such/page"),
        (["families", "--write", __file__], "has no place for the table"),
    ],
)
def test_options_that_would_do_nothing_are_refused(capsys, arguments, message):
    assert main(arguments) == 2
    assert message in one_error(capsys)


def test_a_wrong_option_is_told_before_the_model_is_loaded(capsys):
    assert main(["generate", "--model", "./nowhere", "--prompt", "x", "--top-p", "2"]) == 2
    assert "top_p must be above 0 and at most 1" in one_error(capsys)


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-"])
def test_a_closed_stream_ends_no_command(closed, tmp_path):
    """The shell closes one of the three; what can still be said is said."""
    line = f'"$0" -m mlxtx generate -m "$1" -p x --max-tokens 2 {closed}'
    run = ["bash", "-c", line, sys.executable, str(tiny_folder())]
    done = subprocess.run(run, capture_output=True, text=True, env=environment(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    assert bool(done.stdout.strip()) == (closed != ">&-")


def test_broken_weights_are_one_line(tmp_path, capsys):
    import mlx.core as mx

    from mlxtx.tiny_model import write_tiny_model

    folder = write_tiny_model(tmp_path / "model")
    weights = dict(mx.load(str(folder / "model.safetensors")))
    weights["model.norm.weight"] = weights["model.norm.weight"] * float("nan")
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    assert main(["generate", "--model", str(folder), "--prompt", "x"]) == 2
    assert "logits are not numbers" in capsys.readouterr().err


def test_escape_sequences_of_a_model_are_shown_inert(tmp_path, capsys):
    """The model says ESC [ 2 J, again and again."""
    from mlxtx.tiny_model import tiny_tokenizer, write_tiny_model

    folder = write_tiny_model(tmp_path / "model")
    tokenizer = tiny_tokenizer()
    stand_in = chr(256 + 0x1B)
    bias = f"{tokenizer.token_to_id(stand_in)}=1000"
    command = ["generate", "--model", str(folder), "-p", "x", "--max-tokens", "3"]
    assert main([*command, "--logit-bias", bias]) == 0
    assert capsys.readouterr().out == "␛␛␛\n"
    assert main([*command, "--logit-bias", bias, "--json"]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and json.loads(shown)["text"] == "\x1b" * 3


# --- as processes ---------------------------------------------------------------------------


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "mlxtx", *arguments]


def environment(tmp_path: Path, **more: str) -> dict[str, str]:
    """No terminal, no network, folders of its own."""
    return {
        **os.environ,
        "HOME": str(tmp_path),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "XDG_STATE_HOME": str(tmp_path / "state"),
        "HF_HUB_OFFLINE": "1",
        **more,
    }


def test_the_main_job_reads_stdin_and_answers(tmp_path):
    """``echo ... | mlxtx`` with no model, no network and nothing prepared ends in text."""
    for _ in range(2):  # the second time with what the first has written
        done = subprocess.run(
            command(),
            input="What is a lamp?\n",
            capture_output=True,
            text=True,
            env=environment(tmp_path),
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        assert len(done.stdout.strip()) > 20
        assert done.stderr.count("\n") == 1 and "--model" in done.stderr


def test_stdin_without_text_is_an_error(tmp_path):
    done = subprocess.run(
        command("chat"), input="", capture_output=True, text=True, env=environment(tmp_path)
    )
    assert done.returncode == 2 and "stdin is empty" in done.stderr


def test_generate_reads_stdin(tmp_path):
    arguments = ["generate", "--model", str(tiny_folder()), "--max-tokens", "6", "--prompt", "-"]
    done = subprocess.run(
        command(*arguments),
        input=PROMPT + "\n",
        capture_output=True,
        text=True,
        env=environment(tmp_path),
    )
    assert done.stdout == expected(max_tokens=6).text + "\n" and done.returncode == 0


def long_answer(tmp_path) -> subprocess.Popen:
    """Too long to end by itself in the time of a test."""
    folder = tiny_folder(max_position_embeddings=1_000_000)
    arguments = ["generate", "--model", str(folder), "--prompt", PROMPT]
    return subprocess.Popen(
        command(*arguments, "--max-tokens", "900000", "--logit-bias", "1=-1000"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(tmp_path),
    )


def test_ctrl_c_keeps_the_text_so_far(tmp_path):
    process = long_answer(tmp_path)
    assert process.stdout is not None
    first = process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=240)
    assert process.returncode == 130
    assert (first + rest).endswith(b"\n") and b"Traceback" not in errors


def test_a_reader_that_leaves_is_no_error(tmp_path):
    process = long_answer(tmp_path)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(5)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(240) == 0


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["plan", "--help"]])
def test_a_reader_that_left_before_the_first_line_is_no_error(arguments, tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    variables = environment(tmp_path)
    variables.pop("PYTHONUNBUFFERED", None)
    done = subprocess.run(
        command(*arguments), stdout=writer, stderr=subprocess.PIPE, env=variables, timeout=120
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize(
    "script", ["cache list", "doctor", "families", "kv_check bundled", "plan bundled"]
)
def test_a_script_run_by_its_path_tells_errors_in_one_line_too(script, tmp_path):
    name, *words = script.split()
    path = Path(__file__).parents[1] / "scripts" / f"{name}.py"
    line = [sys.executable, str(path), *words, "--no-such-option"]
    done = subprocess.run(line, capture_output=True, text=True, env=environment(tmp_path))
    assert done.returncode == 2
    assert "unrecognized arguments" in done.stderr and done.stderr.count("\n") == 1


def test_a_small_conversion_has_a_size(tmp_path, capsys):
    folder = str(tiny_folder())
    line = ["convert", folder, "--out", str(tmp_path / "half"), "--dtype", "float16", "--no-verify"]
    assert main(line) == 0
    size = sum(path.stat().st_size for path in (tmp_path / "half").glob("*.safetensors"))
    shown = re.search(r"([\d.]+) MB\n", capsys.readouterr().out)
    assert shown and float(shown[1]) * 1e6 == pytest.approx(size, rel=0.05)

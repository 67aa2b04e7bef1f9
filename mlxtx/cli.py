"""``mlxtx <command>``: finds the command's script, runs it, and turns errors into one line.

Nothing heavy is imported here: ``mlxtx --help`` answers from the table below.
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress

# Command -> what it does. ``mlxtx kv-check`` runs ``mlxtx.scripts.kv_check:main``.
COMMANDS = {
    "chat": "talk with a model (what `mlxtx` alone does)",
    "generate": "answer one prompt",
    "bench": "measure speed and memory, alone or against mlx-lm",
    "convert": "change a checkpoint's type or quantization, or upload it",
    "lora": "fine-tune a model with LoRA",
    "fuse": "merge a LoRA adapter into its model",
    "evaluate": "perplexity and accuracy of a model on text",
    "plan": "how much memory a model will need",
    "kv-check": "what quantizing the cache costs in quality, on your model",
    "cache": "list, save and delete what is kept on disk",
    "families": "the model families that are supported",
    "doctor": "check this installation",
    "plot": "draw the losses of training runs",
}

HELP_HEAD = """usage: mlxtx [--version] [--debug] [command] [options]

On-device language models on Apple Silicon.

commands:
"""
HELP_TAIL = """
mlxtx COMMAND --help shows a command's options. --debug shows tracebacks.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and gives its exit code: 0, 1 where plan or doctor say no, 2 for an
    error, 130 when interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    first = arguments[0] if arguments else ""
    if first in ("-h", "--help", "help"):
        return run(lambda _: print(help_text(), end=""), [], debug)
    if first == "--version":
        return run(lambda _: print(version_text()), [], debug)
    if not first or first.startswith("-"):  # options alone belong to the main job
        return run(lambda rest: dispatch("chat", rest), arguments, debug)
    return run(lambda rest: dispatch(first, rest), arguments[1:], debug)


def version_text() -> str:
    from mlxtx import __version__

    return f"mlxtx {__version__}"


def help_text() -> str:
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:<{width}}{about}\n" for name, about in COMMANDS.items()]
    return HELP_HEAD + "".join(lines) + HELP_TAIL


def dispatch(command: str, arguments: list[str]) -> int | None:
    """Imports the script of ``command`` and calls its ``main``."""
    from mlxtx.errors import MlxtxError

    if command not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(command, COMMANDS, 1)
        hint = f"did you mean {near[0]}?" if near else "mlxtx --help lists them"
        raise MlxtxError(f"there is no command {command!r}; {hint}")
    name = f"mlxtx.scripts.{command.replace('-', '_')}"
    try:
        script = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise MlxtxError(f"the command {command} is not part of this installation") from None
    return script.main(arguments)


def run(
    job: Callable[[list[str]], int | None], arguments: Sequence[str], debug: bool = False
) -> int:
    """``job(arguments)``, with every error as one line on stderr and exit code 2."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by who started this
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
        stream = getattr(sys, name)
        if hasattr(stream, "reconfigure"):  # a broken character must not end a command
            stream.reconfigure(errors="replace")
    if not debug:  # warnings are one line as well
        warnings.formatwarning = lambda message, *_, **__: printable(str(message)) + "\n"
    try:
        try:
            code = job(list(arguments)) or 0
        except SystemExit:  # a help was shown, to somebody who may have left
            sys.stdout.flush()
            raise
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader left (`| head`). Python would complain once more while closing stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if debug:
            import traceback

            traceback.print_exception(error)
        else:
            with suppress(OSError):  # stderr may be what is full
                print(one_line(error), file=sys.stderr, flush=True)
        return 2


def one_line(error: Exception) -> str:
    """The message for people: a known error's own words, else its kind and how to learn more."""
    from mlxtx.errors import MlxtxError
    from mlxtx.files import disk_full

    message = str(error)
    if isinstance(error, OSError) and disk_full(error):
        message = f"the disk is full ({error.strerror}); free some space and run it again"
    elif not isinstance(error, MlxtxError):
        message = f"{type(error).__name__}: {message} (--debug shows where)"
    return printable(message)


def printable(message: str) -> str:
    """One line that cannot control the terminal."""
    from mlxtx.text.inert import inert

    return inert(" ".join(f"mlxtx: {message}".split()))


if __name__ == "__main__":
    raise SystemExit(main())

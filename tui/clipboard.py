"""The system's clipboard, where its own tool can be used."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys


def copy_with_tool(text: str) -> str:
    """Put ``text`` on the clipboard; gives the name of the tool, or "" when there is none.

    Over SSH this machine's clipboard is not the one the person sits at: then the terminal must be
    asked (OSC 52), which passes through SSH and, with ``set-clipboard on``, through tmux.
    """
    tool = shutil.which("pbcopy") if sys.platform == "darwin" else None
    if tool is None or "SSH_CONNECTION" in os.environ:
        return ""
    try:
        done = subprocess.run([tool], input=text.encode("utf-8", "replace"), timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return "pbcopy" if done.returncode == 0 else ""

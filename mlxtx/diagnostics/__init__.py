"""What a model needs and what a machine has: the memory plan and the choice of a cache setting."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def plan(path_or_repo: str | Path, **options: Any) -> dict[str, Any]:
    """The memory plan as plain data: see ``memory_plan.plan_memory`` for the options."""
    from mlxtx.diagnostics.memory_plan import plan_memory

    return plan_memory(path_or_repo, **options).to_json()

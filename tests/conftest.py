"""Settings of the whole suite."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# Exact float32 products on GPUs that would round them; read when MLX is first imported.
os.environ.setdefault("MLX_ENABLE_TF32", "0")

# No test depends on being fast: the machine may be slow or busy.
settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any machine")

"""Settings of the whole suite."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# No test depends on being fast: the machine may be slow or busy.
settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any machine")

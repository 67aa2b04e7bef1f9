"""Both attention kernels in the checked mode, over a pairwise part of the grid."""

from __future__ import annotations

import pytest

from .cases import DECODE, PREFILL_SUITE, pairwise
from .checks import check_decode, check_prefill
from .on_emulator import needs_emulator


@needs_emulator
@pytest.mark.parametrize("case", pairwise(DECODE), ids=str)
def test_decode(case):
    emulator = check_decode(case)
    assert [launch.name for launch in emulator.launches][1:] in ([], ["attention_merge"])
    for launch in emulator.launches:
        threads = launch.threadgroup[0] * launch.threadgroup[1] * launch.threadgroup[2]
        assert launch.threadgroup_bytes <= 32768 and threads <= 1024


@needs_emulator
@pytest.mark.parametrize("case", pairwise(PREFILL_SUITE), ids=str)
def test_prefill(case):
    (launch,) = check_prefill(case).launches
    assert launch.threadgroup_bytes <= 32768 and launch.threadgroup[0] <= 1024

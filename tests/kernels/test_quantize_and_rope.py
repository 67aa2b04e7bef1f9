"""kv_quantize, rope and rope_quantize in the checked mode, over a pairwise part of the grid."""

from __future__ import annotations

import pytest

from .cases import QUANTIZE, ROPE, pairwise
from .checks import check_quantize, check_rope
from .on_emulator import needs_emulator


@needs_emulator
@pytest.mark.parametrize("case", pairwise(QUANTIZE), ids=str)
def test_quantize(case):
    check_quantize(case)


@needs_emulator
@pytest.mark.parametrize("case", pairwise(ROPE), ids=str)
def test_rope(case):
    check_rope(case)

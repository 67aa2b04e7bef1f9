"""How many launches one decoded token takes in a layer: the figures of docs/kernels.md hold."""

from __future__ import annotations

import re

import pytest

from scripts import count_launches
from scripts.count_traffic import PAGE


@pytest.mark.parametrize("case", count_launches.CASES.values(), ids=count_launches.CASES)
def test_a_token_takes_at_most_five_launches(case):
    names = count_launches.count_mlxtx(**case)
    assert len(names) == (4 if case["length"] == 300 else 5), names
    assert names.count("SliceUpdate") == 2


def test_a_quantized_cache_takes_at_most_half_the_launches_of_mlx_lm():
    rows = re.findall(r"^\| ((?:plain|4-bit), .*?) \| (\d+) \| (\d+) \|$", PAGE.read_text(), re.M)
    assert [what for what, *_ in rows] == list(count_launches.CASES)
    for what, ours, theirs in rows:
        assert int(ours) == len(count_launches.count_mlxtx(**count_launches.CASES[what]))
        if what.startswith("4-bit"):
            assert 2 * int(ours) <= int(theirs)

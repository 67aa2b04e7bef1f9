"""What the attention kernels read, counted: the figures of docs/kernels.md hold."""

from __future__ import annotations

import re

import pytest
from mlxtx.metal_kernels.attention_decode import query_tile

from scripts import count_traffic

from .on_emulator import needs_counters


@needs_counters
@pytest.mark.parametrize("dims, group, cache", count_traffic.CASES, ids=str)
def test_each_cache_byte_is_read_once_for_its_tile_of_query_rows(dims, group, cache):
    counts = count_traffic.count_ours(dims, group, cache)
    times = -(-group // query_tile(group, max(dims)))
    if group <= 8 and dims[0] <= 128:
        assert times == 1
    assert counts["read_bytes"] <= 1.02 * times * counts["unique_read"]
    assert counts["read_lines_cached"] <= 1.02 * times * counts["minimum_lines"]
    if cache == "plain":  # wide loads: every line in one piece
        assert counts["read_lines"] <= 1.1 * times * counts["minimum_lines"]


@needs_counters
@pytest.mark.parametrize("group", [1, 4, 8])
def test_mlx_reads_the_keys_again_for_each_query_head(group):
    counts = count_traffic.count_mlx(128, group)
    assert counts["read_bytes"] == group * counts["unique_read"]


def test_the_page_has_the_estimate_the_command_makes():
    text = count_traffic.PAGE.read_text()
    found = re.search(r"<!-- estimate: begin -->\n\n(.*?)\n\n<!-- estimate: end -->", text, re.S)
    assert found and found.group(1) == count_traffic.estimate_table()


def test_mlx_and_ours_stand_beside_each_other_in_the_page():
    text = count_traffic.PAGE.read_text()
    rows = [line for line in text.splitlines() if line.startswith(("| attention_", "| MLX "))]
    assert len(rows) >= len(count_traffic.CASES) + 4

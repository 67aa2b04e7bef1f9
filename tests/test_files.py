"""Files that cannot be written are told in one line, and leave nothing behind."""

from __future__ import annotations

import pytest

from mlxtx.errors import MlxtxError
from mlxtx.files import write_text_atomic


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "a.txt"
    for text in ("one", "two"):
        write_text_atomic(path, text)
        assert path.read_text() == text and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["file/inside", "nowhere/inside", "x" * 300])
def test_a_place_where_no_file_can_be_is_one_line(tmp_path, name):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(MlxtxError, match="cannot write"):
        write_text_atomic(tmp_path / name, "a")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]

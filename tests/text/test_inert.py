from __future__ import annotations

import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from mlxtx.text.inert import inert


def test_escape_sequences_become_visible():
    assert inert("\x1b[2J\x1b]0;title\x07") == "␛[2J␛]0;title␇"
    assert inert("\x9b31m\x7f\r\x08") == "\\x9b31m␡␍␈"
    assert inert("a\u202eb\u2066c") == "a\\u202eb\\u2066c"


def test_ordinary_text_is_left_alone():
    text = "größer\n\t你好 👩‍🚀 שלום"
    assert inert(text) == text


@given(st.text(alphabet=st.characters(), max_size=50), st.integers(0, 50))
def test_nothing_but_newline_and_tab_controls_the_terminal(text, cut):
    shown = inert(text)
    assert not any(
        unicodedata.category(character) in ("Cc", "Cs")
        for character in shown
        if character not in "\n\t"
    )
    assert inert(text[:cut]) + inert(text[cut:]) == shown
    shown.encode("utf-8")

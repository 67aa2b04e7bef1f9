"""Markdown in pieces: what a stream shows is what the whole text shows."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from mlxtx.tui.clean import clean, duration, one_line, size
from mlxtx.tui.lines import Line, layout, wrap_plain
from mlxtx.tui.markdown import Splitter, parse, split
from mlxtx.tui.store import Message
from mlxtx.tui.widgets.message import MessageView
from rich.cells import cell_len

TEXT = """# Title
A **bold** and `code` [link](http://x.y) ~~gone~~ *soft* line
that goes on

- one
- two
  - nested
    with more
1. first

   a paragraph of the item
   ```python
   def f(x): return "a"  # c
   ```
2. second
> quoted **b**
> - item

| a | b |
|---|---|
| 1 | two |

---
```
plain
```
end"""


def lines_of(text: str, width: int) -> list[Line]:
    out: list[Line] = []
    for piece in split(text):
        for block in parse(piece):
            out += layout(block, width)
    return out


def plain(text: str, width: int = 60) -> list[str]:
    return [line.content.plain.rstrip() for line in lines_of(text, width)]


def test_each_construct_is_laid_out() -> None:
    assert plain(TEXT) == [
        "Title",
        "A bold and code link (http://x.y) gone soft line that goes",
        "on",
        "• one",
        "• two",
        "  • nested with more",
        "1. first",
        "   a paragraph of the item",
        "    python",
        '    def f(x): return "a"  # c',
        "2. second",
        "▎ quoted b",
        "▎ • item",
        "a  b",
        "──────",
        "1  two",
        "─" * 60,
        " plain",
        "end",
    ]


def test_styles_are_on_the_right_words() -> None:
    line = lines_of("A **bold** and `code`", 60)[0].content
    styled = {line.plain[span.start : span.end]: span.style for span in line.spans}
    assert styled == {"bold": ".md-strong", "code": ".md-code"}


def test_a_link_never_hides_where_it_leads() -> None:
    assert plain("[safe](http://evil.example)") == ["safe (http://evil.example)"]
    assert plain("<http://x.y>") == ["http://x.y"]


def test_html_is_text() -> None:
    assert plain("<script>x</script> & <b>y</b>") == ["<script>x</script> & <b>y</b>"]


def test_a_wide_table_fits_its_width() -> None:
    row = "| " + " | ".join(["many words in one cell"] * 4) + " |"
    text = "\n".join([row, "|---|---|---|---|", row])
    for width in (20, 40, 80):
        assert all(cell_len(line.content.plain) <= width for line in lines_of(text, width))
    assert "".join(plain(text, 40)).count("many") == 8


@given(st.lists(st.integers(1, 9), min_size=1, max_size=400))
def test_any_portions_give_the_same_pieces(cuts: list[int]) -> None:
    splitter, out, at = Splitter(), [], 0
    for cut in cuts:
        out += splitter.feed(TEXT[at : at + cut])
        at += cut
    out += splitter.feed(TEXT[at:])
    assert out + splitter.finish() == split(TEXT)


markdownish = st.lists(
    st.sampled_from([*"ab `*_#-|>1.\n[]()~\t漢é👍", "```", "\n\n", "- ", "| ", "|---|\n"]),
    max_size=120,
).map("".join)


@settings(max_examples=150, deadline=None)
@given(markdownish, st.integers(1, 50))
def test_any_text_is_laid_out_within_its_width(text: str, width: int) -> None:
    for line in lines_of(text, width):
        # A wide character can't be halved in a column of one cell.
        assert cell_len(line.content.plain) <= max(width, 12)


@settings(max_examples=100, deadline=None)
@given(markdownish, st.lists(st.integers(1, 20), max_size=30))
def test_a_growing_message_ends_as_the_loaded_one(text: str, cuts: list[int]) -> None:
    grown = MessageView(Message(role="assistant", state="streaming"))
    for cut in cuts:
        done = len(grown.message.text)
        grown.message.text += text[done : done + cut]
        grown.height(40)
    grown.message.text = text
    grown.message.state = "done"
    loaded = MessageView(Message(role="assistant", text=text))
    height = grown.height(40)
    assert height == loaded.height(40)
    for at in range(height):
        assert grown.line(at).content.plain == loaded.line(at).content.plain


def test_no_text_is_lost_while_it_grows() -> None:
    view = MessageView(Message(role="assistant", state="streaming"))
    for character in TEXT:
        view.message.text += character
        shown = "".join(view.line(at).content.plain for at in range(view.height(60)))
        if character.isalnum():
            assert character in shown
    assert "def f(x)" in shown


def test_a_long_paste_is_folded_until_asked() -> None:
    view = MessageView(Message(text="\n".join(f"row {n}" for n in range(1000))))
    height = view.height(60)
    assert height < 20
    assert "988 more lines" in "".join(view.line(at).content.plain for at in range(height))
    view.unfolded = True
    assert view.height(60) == 1001


def test_wrapped_plain_text_keeps_every_character() -> None:
    text = "ab cd 漢字漢字 " * 30 + "x" * 100
    assert "".join(line.content.plain for line in wrap_plain(text, 17)).replace(" ", "") == (
        text.replace(" ", "")
    )


@given(st.text())
def test_clean_leaves_nothing_that_drives_a_terminal(text: str) -> None:
    bad = {chr(c) for c in [*range(32), *range(0x7F, 0xA0)]} - {"\n", "\t"}
    cleaned = clean(text)
    assert not bad & set(cleaned)
    cleaned.encode("utf-8")
    assert clean(cleaned) == cleaned and "\n" not in one_line(text)


def test_figures_for_people() -> None:
    assert [size(n) for n in (0, 999, 1500, 999_600, 4.2e9, 1.4e11)] == [
        "0 B", "999 B", "1.5 kB", "1.0 MB", "4.2 GB", "140 GB",
    ]  # fmt: skip
    assert [duration(s) for s in (0.0384, 0.44, 12.4, 59.6, 200, 7500)] == [
        "38 ms", "0.4 s", "12 s", "1 min", "3 min 20 s", "2 h 5 min",
    ]  # fmt: skip

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mlxtx.generation.stop import StopStrings

letters = st.text(alphabet="ab ", max_size=6)


def pushed(stops: list[str], pieces: list[str]) -> tuple[list[str], StopStrings]:
    watcher = StopStrings(stops)
    return [*(watcher.push(piece) for piece in pieces), watcher.finish()], watcher


def test_a_stop_string_over_three_tokens_is_never_shown():
    shown, watcher = pushed(["\nUser:"], ["Hello", "\n", "Us", "er", ": more", "x"])
    assert shown == ["Hello", "", "", "", "", "", ""]
    assert watcher.found == "\nUser:"


def test_what_only_looked_like_one_comes_out():
    shown, watcher = pushed(["</s>"], ["a<", "/", "b"])
    assert shown == ["a", "", "</b", ""] and watcher.found is None
    assert pushed(["</s>"], ["a<"])[0] == ["a", "<"]


def test_the_earliest_wins():
    assert pushed(["cd", "b"], ["abcd"])[0] == ["a", ""]


def test_nothing_is_held_without_stop_strings():
    assert pushed([], ["a", "b"])[0] == ["a", "b", ""]
    assert pushed([""], ["a"])[0] == ["a", ""]


@given(st.lists(letters.filter(bool), min_size=1, max_size=3), st.lists(letters, max_size=12))
def test_shown_text_is_the_text_before_the_first_stop(stops, pieces):
    shown, watcher = pushed(stops, pieces)
    text, result = "".join(pieces), "".join(shown)
    # The first stop string to be complete ends the text.
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    if not ends:
        assert result == text and watcher.found is None
        return
    assert watcher.found is not None
    assert text.startswith(result + watcher.found)
    assert not any(stop in result for stop in stops)


def test_no_more_text_is_held_than_the_longest_stop_string():
    watcher = StopStrings(["</answer>"])
    for _ in range(32_000):
        watcher.push("</answe")
        assert len(watcher._held) < len("</answer>")

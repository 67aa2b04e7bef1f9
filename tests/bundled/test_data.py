"""The conversations: seeded, right by their own judge, and apart from the held-out questions."""

from __future__ import annotations

import random
import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.bundled import contexts, conversations, facts, frames, games, unknown
from training.bundled.conversations import ask
from training.bundled.data_set import _plain, held_out, training_set
from training.bundled.facts import Item, all_items, words_of
from training.bundled.grammar import choose, every, typo
from training.bundled.judge import loops, named, recall, right
from training.bundled.styles import STYLES

PAIRS = [
    (frames.WHAT, frames.WHAT_HELD),
    (frames.WHY, frames.WHY_HELD),
    (frames.HOW, frames.HOW_HELD),
    (frames.COMMAND, frames.COMMAND_HELD),
    (frames.PRESS, frames.PRESS_HELD),
    (frames.PAIR, frames.PAIR_HELD),
    (frames.FOLLOW, frames.FOLLOW_HELD),
    (frames.FOLLOW_WHY, frames.FOLLOW_WHY_HELD),
    (frames.FOLLOW_SHORT, frames.FOLLOW_SHORT_HELD),
    (frames.FOLLOW_REPEAT, frames.FOLLOW_REPEAT_HELD),
    (frames.RECALL, frames.RECALL_HELD),
    (conversations.NAME_ASK, conversations.NAME_HELD),
    *((games.SUM_ASKS[sign], games.SUM_HELD[sign]) for sign in games.SUM_ASKS),
    *((games.LETTER_ASKS[game], games.LETTER_HELD[game]) for game in games.LETTER_ASKS),
    *((unknown.KINDS[kind], unknown.HELD[kind]) for kind in unknown.KINDS),
    *((style.prompts, style.held) for style in STYLES.values()),
]


@pytest.fixture(scope="module")
def items() -> list[Item]:
    return all_items()


@pytest.fixture(scope="module")
def chats() -> list[dict]:
    return list(training_set(1500, seed=3))


def test_no_frame_is_both_trained_and_held_out():
    for trained, held in PAIRS:
        both = {f for text in trained for f in every(text)} & set(held)
        assert not both


def test_no_held_out_frame_lends_training_a_part():
    """Three words in a row, such as "the purpose of", may stand in any two questions; not four."""
    held = {run for _, frames_held in PAIRS for frame in frames_held for run in runs(frame)}
    lists = [getattr(contexts, name) for name in dir(contexts) if name.isupper()]
    trained = [text for texts in lists if isinstance(texts, list) for text in texts]
    trained += [text for texts, _ in PAIRS for text in texts]
    assert not held & {run for text in trained for full in every(text) for run in runs(full)}


def test_no_held_out_wish_lends_training_a_part(items):
    more = facts.words_file("wishes")
    added = more["asks"] | more["wishes"]
    for item in items:
        held = {run for q, novelty in item.held if novelty == "words" for run in runs(q)}
        texts = added.get(item.id.split(".")[-1], [])
        assert not held & {run for text in texts for full in every(text) for run in runs(full)}


def runs(text: str, size: int = 4) -> set[tuple[str, ...]]:
    """So many words in a row, leaving out what is filled in."""
    words = re.findall(r"[^\s,;.?]+", re.sub(r"{\w+}", "", text.lower()))
    return {tuple(words[n : n + size]) for n in range(len(words) - size + 1)}


def test_lists_of_held_out_things_are_apart():
    for name in ("things", "places", "people"):
        assert not set(words_of(name)) & set(words_of("held_" + name))
    assert not set(words_of("first_names")) & set(words_of("held_names"))


def test_no_held_out_question_is_trained(chats):
    trained = {_plain(m["content"]) for row in chats for m in row["messages"]}
    assert not trained & {_plain(row["messages"][-1]["content"]) for row in held_out()}


def test_every_fact_is_asked_for_in_the_test(items):
    asked = {row["id"] for row in held_out() if row["group"].startswith("facts/")}
    assert asked == {item.id for item in items}


def test_ids_are_unique(items):
    assert max(Counter(item.id for item in items).values()) == 1


def test_one_wording_never_asks_for_two_facts(items):
    """Two facts with one question would teach the model to guess."""
    owners: dict[str, str] = {}
    for item in items:
        for way in item.asks:
            for fill in way.fills:
                for frame in {f for text in (*way.frames, *way.bare) for f in every(text)}:
                    question = frame.format(**fill).lower()
                    assert owners.setdefault(question, item.id) == item.id, question


def test_a_seed_names_the_data():
    first, again = (list(training_set(40, seed=5)) for _ in range(2))
    assert first == again
    assert first != list(training_set(40, seed=6))


def test_turns_alternate_and_end_with_an_answer(chats):
    for row in chats:
        roles = [m["role"] for m in row["messages"]]
        start = int(roles[0] == "system")
        assert roles[start:] == ["user", "assistant"] * ((len(roles) - start) // 2)
        assert all(m["content"].strip() for m in row["messages"])


def test_all_facts_are_trained_about_equally_often():
    answers = Counter(m["content"] for row in training_set(6000, 1) for m in row["messages"])
    concepts = [answers[item.say] for item in all_items() if item.kind == "concept"]
    assert min(concepts) > 0.4 * sum(concepts) / len(concepts)


def test_the_judge_accepts_what_was_taught():
    wrong = [row["id"] for row in held_out() if not right(row, row["answer"])]
    assert wrong == []


def test_the_judge_refuses_the_answers_of_other_facts(items):
    rows = {row["id"]: row for row in held_out() if row["group"] == "facts/frame"}
    rng = random.Random(0)
    accepted = 0
    for row in rows.values():
        for other in rng.sample(items, 20):
            same = other.id.split(".")[0] == row["id"].split(".")[0]
            accepted += not same and right(row, other.say)
    assert accepted <= 0.001 * 20 * len(rows)


def test_the_judge_refuses_unknown_and_foreign_commands(items):
    rows = [row for row in held_out() if row["group"] == "facts/frame"]
    assert not any(right(row, unknown.ANSWER) for row in rows)
    foreign = [row for row in rows if "mlxtx convert" not in row["answer"]]
    assert not any(right(row, row["answer"] + " Or mlxtx convert.") for row in foreign)


def test_names_that_contradict():
    text = "Run mlxtx kv-check with --bits, or /reset; Ctrl+J too."
    assert named(text) == {"mlxtx kv-check", "--bits", "/reset", "ctrl+j"}


def test_recall_counts_longer_words():
    assert recall("rotates by angle", "It rotates by an angle of position") == pytest.approx(2 / 3)


def test_loops_are_seen():
    assert loops([1, 2, 3, 4] * 3)
    assert not loops([1, 2, 3, 4] * 2)


@given(st.integers(0, 99), st.integers(0, 99), st.sampled_from("+-*"))
def test_sums_are_right(a, b, sign):
    *steps, result = games.sum_answer(a, sign, b).rstrip(".").split(" = ")
    assert steps[0] == f"{a} {sign} {b}"
    assert {eval(step) for step in steps} == {int(result)}


@given(st.text("abcdefgh", min_size=1, max_size=8))
def test_letter_games_are_right(word):
    assert games.letter_answer("spell", word)[0].rstrip(".").split("-") == list(word)
    assert games.letter_answer("reverse", word)[0].endswith(f": {word[::-1]}.")
    assert f"{len(word)} letters" in games.letter_answer("count", word)[0]
    assert games.letter_answer("first", word)[0].endswith(f" {word[0]}.")
    assert games.letter_answer("last", word)[0].endswith(f" {word[-1]}.")


def test_no_held_out_sum_is_drawn_for_training():
    rng = random.Random(0)
    for _ in range(500):
        answers = f"{games.draw_sum(rng)[1][:-1]}, {games.draw_sums(rng)[1][:-1]}".split(", ")
        for sum_, result in (answer.split(" = ") for answer in answers):
            a, _, b = sum_.split(" ")
            assert eval(sum_) == int(result) >= 0
            assert not games.is_held_sum(int(a), int(b))


def test_held_out_sums_are_of_known_pairs_or_of_new_ones():
    rows = held_out()
    for group, new in (("arithmetic", False), ("arithmetic/new", True)):
        pairs = [row["answer"].split(" ")[0:3:2] for row in rows if row["group"] == group]
        assert len(pairs) == 60
        assert all(games.is_held_sum(int(a), int(b)) == new for a, b in pairs)


def test_no_held_out_name_is_made_up():
    rng = random.Random(0)
    names = [conversations.draw_name(rng) for _ in range(3000)]
    made_up = set(names) - set(words_of("first_names"))
    assert 0.3 < sum(name in made_up for name in names) / 3000 < 0.5
    assert not made_up & set(words_of("held_names"))


@given(st.integers(0, 1000))
def test_choose_draws_from_every(seed):
    text = "(a|b (c|d)|) e(f|g)"
    assert every(text) and choose(text, random.Random(seed)) in every(text)
    assert len(set(every(text))) == 8


def test_a_typo_changes_little():
    rng = random.Random(0)
    for _ in range(50):
        assert abs(len(typo("quantization", rng)) - len("quantization")) <= 1


def test_styles_mark_their_own_answers(items):
    taught = next(item for item in items if item.id == "rope")
    for name, style in STYLES.items():
        assert style.mark(style.answer(taught), taught), name
        assert not style.mark(taught.say, taught), name


def test_questions_ask_for_their_item(items):
    rng = random.Random(0)
    rope = next(item for item in items if item.id == "rope")
    hits = [any(n.lower()[:4] in ask(rope, rng).lower() for n in rope.names) for _ in range(100)]
    assert sum(hits) > 85  # the rest have a typo there

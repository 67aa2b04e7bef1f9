"""Reading training data, naming bad lines, and marking what the loss counts."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxtx.errors import MlxtxError
from mlxtx.text.tokenizer import Tokenizer
from mlxtx.tiny_model import write_tiny_model
from mlxtx.tuning.data import Records, problem, read_data, read_file
from mlxtx.tuning.encode import Encoder, pieces
from mlxtx.tuning.packing import bucket, make_batch
from mlxtx.tuning.samples import sample

CHAT = {
    "messages": [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "good day"},
        {"role": "user", "content": "and now?"},
        {"role": "assistant", "content": "rain"},
    ]
}
GOOD = [CHAT, {"prompt": "one plus one", "completion": "two"}, {"text": "The cat sleeps."}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer.load(write_tiny_model(tmp_path_factory.mktemp("tiny")))


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))


def test_every_kind_of_file_gives_the_same_records(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", GOOD)
    (tmp_path / "a.json").write_text(json.dumps({"data": GOOD}))
    assert read_file(tmp_path / "a.jsonl").good == GOOD == read_file(tmp_path / "a.json").good
    with open(tmp_path / "a.csv", "w", newline="") as file:
        rows = csv.DictWriter(file, ["prompt", "completion"])
        rows.writeheader()
        rows.writerow({"prompt": 'with "quotes", commas\nand lines', "completion": "two"})
    assert read_file(tmp_path / "a.csv").good == [
        {"prompt": 'with "quotes", commas\nand lines', "completion": "two"}
    ]
    with open(tmp_path / "chat.csv", "w", newline="") as file:
        rows = csv.DictWriter(file, ["messages"])
        rows.writeheader()
        rows.writerow({"messages": json.dumps(CHAT["messages"])})
    assert read_file(tmp_path / "chat.csv").good == [CHAT]


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist([CHAT, CHAT]), tmp_path / "train.parquet")
    assert read_data(tmp_path).train.good == [CHAT, CHAT]


def test_bad_lines_are_named_with_their_number_and_reason(tmp_path):
    lines = [
        json.dumps(GOOD[0]),
        "{broken",
        "",
        "[1, 2]",
        '{"messages": []}',
        '{"messages": [{"role": "user", "content": "hi"}]}',
        '{"messages": [{"role": "user"}, {"role": "assistant", "content": "x"}]}',
        '{"prompt": "a"}',
        '{"prompt": "a", "completion": ""}',
        '{"text": 5}',
        '{"txt": "a"}',
        json.dumps(GOOD[2]),
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    records = read_data(tmp_path).train
    assert records.good == [GOOD[0], GOOD[2]]
    assert [(bad.line, bad.reason.split(":")[0]) for bad in records.bad] == [
        (2, "not valid JSON"),
        (4, "not a JSON object but list"),
        (5, "'messages' is not a list with at least one message"),
        (6, "no message is the assistant's, so there is nothing to learn"),
        (7, "message 1 has neither 'content' nor 'tool_calls'"),
        (8, "'completion' is missing or not a string"),
        (9, "'completion' is empty"),
        (10, "'text' is not a string"),
        (11, "has neither 'messages' nor 'prompt' and 'completion' nor 'text' (keys"),
    ]
    assert str(records.bad[0]).startswith("train.jsonl:2: not valid JSON")


def test_folders_are_split_by_name(tmp_path):
    write_jsonl(tmp_path / "train-00000-of-00002.jsonl", GOOD[:1])
    write_jsonl(tmp_path / "train-00001-of-00002.jsonl", GOOD[1:2])
    write_jsonl(tmp_path / "validation-00000-of-00001.jsonl", GOOD[2:])
    write_jsonl(tmp_path / "test.jsonl", GOOD)
    data = read_data(tmp_path)
    assert (data.train.good, data.validation.good) == (GOOD[:2], GOOD[2:])
    alone = tmp_path / "alone"
    alone.mkdir()
    write_jsonl(alone / "examples.jsonl", GOOD * 4)
    data = read_data(alone, validation_part=0.25)
    assert (len(data.train.good), len(data.validation.good)) == (9, 3)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has no training file .* files found: none"),
        ({"notes.txt": "a"}, "has no training file"),
        ({"train.jsonl": ""}, "nothing to train on in .*: there are no records"),
        ({"train.jsonl": "{}\n{"}, r"no record can be used: train.jsonl:1: has neither"),
        ({"train.json": "["}, "train.json is not valid JSON"),
    ],
)
def test_nothing_to_train_on(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(MlxtxError, match=message):
        read_data(tmp_path)


def test_neither_a_folder_nor_a_dataset(tmp_path):
    with pytest.raises(MlxtxError, match="neither a file, a folder nor a dataset"):
        read_data(tmp_path / "missing")


def marked(tokenizer, record, **how):
    tokens, marks = Encoder(tokenizer, **how).one(record)
    return "".join(t for t, m in pieces(tokenizer, sample(tokens, marks)) if m)


def test_the_loss_counts_what_it_is_told_to(tokenizer):
    whole = "<|system|>be kind<|end|><|user|>hello<|end|><|assistant|>good day<|end|>"
    whole += "<|user|>and now?<|end|><|assistant|>rain<|end|>"
    assert marked(tokenizer, CHAT, loss_on="all") == whole.removeprefix("<|system|>")
    assert marked(tokenizer, CHAT) == "good day<|end|>rain<|end|>"
    assert marked(tokenizer, CHAT, loss_on="last") == "rain<|end|>"
    assert marked(tokenizer, GOOD[1]) == "two<|end|>"
    assert marked(tokenizer, GOOD[2]) == " cat sleeps.<|end|>"


def test_tools_reach_the_template(tokenizer):
    seen = []

    class Spy:
        chat_template = tokenizer.chat_template

        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def render_chat(self, messages, *, tools, add_generation_prompt):
            seen.append(tools)
            return tokenizer.render_chat(messages, add_generation_prompt=add_generation_prompt)

        def encode_chat(self, messages, *, tools, add_generation_prompt):
            text = self.render_chat(
                messages, tools=tools, add_generation_prompt=add_generation_prompt
            )
            return tokenizer.encode(text, add_special=False)

    tools = [{"type": "function", "function": {"name": "clock"}}]
    assert marked(Spy(), {**CHAT, "tools": tools}) == "good day<|end|>rain<|end|>"
    assert seen and all(given == tools for given in seen)


def records(*items):
    made = Records()
    for n, item in enumerate(items, 1):
        made.add("f", n, item)
    return made


def test_long_samples_are_cut_left_out_or_an_error(tokenizer):
    long = {"text": "rain " * 200}
    both = records(GOOD[2], long)
    cut = Encoder(tokenizer, max_length=50).encode(both)
    assert [len(s) for s in cut.samples] == [len(cut.samples[0]), 50] and cut.cut == 1
    dropped = Encoder(tokenizer, max_length=50, too_long="drop").encode(both)
    assert len(dropped.samples) == 1 and "are more than max_length 50" in dropped.bad[0].reason
    with pytest.raises(MlxtxError, match=r"f:2: .* are more than max_length 50"):
        Encoder(tokenizer, max_length=50, too_long="error").encode(both)
    nothing = Encoder(tokenizer, max_length=4).encode(records(CHAT))
    assert "no token counts in the loss within max_length 4" in nothing.bad[0].reason


@settings(max_examples=60, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.text(max_size=5) | st.integers(),
        lambda c: (
            st.lists(c, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    ["messages", "role", "content", "prompt", "completion", "text", "tools"]
                ),
                c,
                max_size=4,
            )
        ),
    )
)
def test_any_json_is_a_good_record_or_has_a_reason(record):
    reason = problem(record)
    assert isinstance(reason, str)
    if not reason:
        assert isinstance(record, dict)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.booleans(), min_size=2, max_size=40), min_size=1, max_size=6),
    st.booleans(),
    st.integers(0, 2),
)
def test_a_batch_holds_every_token_and_target_once(marks, packing, ahead):
    rows = [sample(np.arange(1, len(m) + 1) + 50 * n, m) for n, m in enumerate(marks)]
    batch = make_batch(rows, packing=packing, ahead=ahead)
    tokens = np.array(batch.tokens).ravel()
    for depth in range(ahead + 1):
        targets = np.array(batch.targets[depth]).ravel()[batch.scored[depth]]
        wanted = [t for r in rows for t in r.tokens[depth + 1 :][r.in_loss[depth + 1 :]]]
        assert sorted(targets) == sorted(wanted)
        # A target stands depth + 1 places behind its token, in the same sample.
        assert all(targets - tokens[batch.scored[depth]] == depth + 1)
    assert sum(n * length for n, length in batch.groups) == batch.tokens.size
    assert batch.real_tokens == sum(len(m) - 1 for m in marks)


def test_buckets_are_few_and_close():
    sizes = {bucket(n) for n in range(1, 4097)}
    assert len(sizes) <= 60
    assert all(n <= bucket(n) <= max(8, n * 1.125 + 8) for n in range(1, 4097))


@pytest.mark.parametrize("name", ["train", "training", "dev", "eval", "test"])
def test_the_folder_of_the_data_may_be_called_anything(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", GOOD[:2])
    write_jsonl(folder / "valid.jsonl", GOOD[2:3])
    write_jsonl(folder / "test.jsonl", GOOD)
    data = read_data(folder)
    assert data.train.good == GOOD[:2] and data.validation.good == GOOD[2:3]


def test_a_file_that_names_two_splits_is_in_one(tmp_path):
    write_jsonl(tmp_path / "dev_train.jsonl", GOOD[:2])
    write_jsonl(tmp_path / "train-dev.jsonl", GOOD[2:3])
    data = read_data(tmp_path)
    assert data.train.good == GOOD[:2] and data.validation.good == GOOD[2:3]


def test_folders_inside_tell_of_the_split(tmp_path):
    for name, records in {"train": GOOD[:2], "validation": GOOD[2:3], "test": GOOD}.items():
        (tmp_path / "dev" / "data" / name).mkdir(parents=True)
        write_jsonl(tmp_path / "dev" / "data" / name / "0.jsonl", records)
    data = read_data(tmp_path / "dev")
    assert data.train.good == GOOD[:2] and data.validation.good == GOOD[2:3]


@pytest.mark.parametrize("part", [-0.1, 1.0, float("nan")])
def test_a_part_for_validation_that_is_none_is_refused(tmp_path, part):
    write_jsonl(tmp_path / "train.jsonl", GOOD)
    with pytest.raises(MlxtxError, match="validation_part must be from 0 up to 1"):
        read_data(tmp_path, validation_part=part)


@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_records_nested_without_end_are_told_in_one_line(tmp_path, ending):
    (tmp_path / f"train.{ending}").write_text("[" * 100_000 + "\n")
    with pytest.raises(MlxtxError, match="not valid JSON"):
        read_data(tmp_path)

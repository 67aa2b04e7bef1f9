"""Generation with a real tiny model against the plainest loop there is."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlxtx.decoder.model import DecoderModel
from mlxtx.errors import MlxtxError
from mlxtx.events import Delta, Done, Prefill
from mlxtx.generation.generate import Generation, Options
from mlxtx.language_model import LanguageModel
from tests.tiny_model import tiny_language_model

PROMPT = "The lamp on the table is warm"
RAGGED = ["The lamp", PROMPT, "x", "Rain falls on the roof; the cat sleeps"]


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return tiny_language_model()


def plain_greedy(model: LanguageModel, ids: list[int], count: int) -> tuple[list[int], np.ndarray]:
    """No cache, no chunks: every token from a full forward pass. Also log-probabilities [n, V]."""
    ids, rows = list(ids), []
    for _ in range(count):
        logits = np.array(model.model(mx.array([ids]))[0, -1], dtype=np.float64)
        rows.append(logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max())
        ids.append(int(logits.argmax()))
    return ids[-count:], np.array(rows)


def test_greedy_tokens_are_those_of_full_forward_passes(model):
    ids = model.encode(PROMPT)
    completion = model.generate(PROMPT, max_tokens=20)
    assert completion.tokens == plain_greedy(model, ids, 20)[0]
    assert completion.finish_reason == "length"
    assert completion.text == model.tokenizer.decode(completion.tokens) == str(completion)


@pytest.mark.parametrize("chunk", [1, 3, 7, 1024])
def test_chunks_change_nothing_but_the_progress(model, chunk):
    ids = model.encode(PROMPT)
    events = list(model.stream(ids, max_tokens=6, prefill_chunk=chunk))
    assert [e.token for e in events if isinstance(e, Delta)] == plain_greedy(model, ids, 6)[0]
    progress = [event for event in events if isinstance(event, Prefill)]
    assert [event.done for event in progress] == [*range(0, len(ids), chunk), len(ids)]
    assert {event.total for event in progress} == {len(ids)}


def test_log_probabilities_are_the_model_s_own(model):
    ids = model.encode(PROMPT)
    wanted_tokens, wanted = plain_greedy(model, ids, 5)
    # Penalties, bias and temperature change what is chosen, not what is reported.
    completion = model.generate(ids, max_tokens=5, logprobs=3)
    assert [entry.token for entry in completion.logprobs] == wanted_tokens
    for entry, row in zip(completion.logprobs, wanted, strict=True):
        best = np.argsort(-row)[:3]
        assert entry.logprob == pytest.approx(row[entry.token], abs=1e-5)
        assert [token for token, _ in entry.top] == best.tolist()
        np.testing.assert_allclose([value for _, value in entry.top], row[best], atol=1e-5)
    forced = model.generate(ids, max_tokens=1, logprobs=0, logit_bias={9: 1e4})
    assert forced.tokens == [9] and forced.logprobs[0].top == ()
    assert forced.logprobs[0].logprob == pytest.approx(wanted[0][9], abs=1e-5)
    assert model.generate(ids, max_tokens=1).logprobs is None


# --- batches --------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"temperature": 0.8, "top_p": 0.9, "seed": 3}])
def test_ragged_batch_equals_one_by_one(model, options):
    options |= {"max_tokens": 12, "repetition_penalty": 1.1, "stop": ["s"]}
    together = model.generate_batch(RAGGED, **options)
    alone = [model.generate(prompt, **options) for prompt in RAGGED]
    assert [c.tokens for c in together] == [c.tokens for c in alone]
    assert [c.text for c in together] == [c.text for c in alone]
    assert [c.finish_reason for c in together] == [c.finish_reason for c in alone]
    assert len({len(c.tokens) for c in alone}) > 1  # rows really end at different times


def test_batch_chunks_and_seeds(model):
    wanted = [c.tokens for c in model.generate_batch(RAGGED, max_tokens=5)]
    assert [c.tokens for c in model.generate_batch(RAGGED, max_tokens=5, prefill_chunk=4)] == wanted
    same = [PROMPT] * 3
    drawn = model.generate_batch(same, max_tokens=8, temperature=2.0, seed=[1, 2, 1])
    assert drawn[0].tokens == drawn[2].tokens != drawn[1].tokens
    assert model.generate_batch([]) == []
    with pytest.raises(MlxtxError, match="2 seeds were given for 3 prompts"):
        model.generate_batch(same, seed=[1, 2])


# --- endings --------------------------------------------------------------------------------


def with_end(model: LanguageModel, token: int) -> LanguageModel:
    """The same model, for which ``token`` ends the answer."""
    import copy

    tokenizer = copy.copy(model.tokenizer)
    tokenizer.eos_ids = frozenset({token})
    return LanguageModel(model.model, tokenizer, model.config)


def test_an_end_token_stops_and_is_not_text(model):
    tokens = model.generate(PROMPT, max_tokens=10).tokens
    end = tokens[4]
    first = tokens.index(end)
    completion = with_end(model, end).generate(PROMPT, max_tokens=10)
    assert completion.tokens == tokens[: first + 1]
    assert completion.text == model.tokenizer.decode(tokens[:first])
    assert completion.finish_reason == "stop"
    ignoring = with_end(model, end).generate(PROMPT, max_tokens=10, ignore_end=True)
    assert ignoring.tokens == tokens and ignoring.finish_reason == "length"


@pytest.mark.parametrize("length", [1, 2, 5, 9])
def test_a_stop_string_across_tokens_is_cut_out(model, length):
    text = model.generate(PROMPT, max_tokens=12).text
    stop = text[6 : 6 + length]
    events = list(model.stream(PROMPT, max_tokens=12, stop=stop))
    shown = [event.text for event in events if isinstance(event, Delta)]
    assert "".join(shown) == text[: text.index(stop)]
    assert not any(stop in "".join(shown[:count]) for count in range(len(shown) + 1))
    assert events[-1].reason == "stop_string"


def test_a_stop_string_that_spells_a_special_token_stops(model):
    user = model.tokenizer.id_of("<|user|>")
    options = {"max_tokens": 6, "logit_bias": {user: 100.0}}
    completion = model.generate(PROMPT, stop=["x", "<|user|>"], **options)
    assert (completion.tokens, completion.text) == ([user], "")
    assert completion.finish_reason == "stop_string"
    end = min(model.tokenizer.eos_ids)
    ended = model.generate(PROMPT, stop=model.tokenizer.pieces.piece(end), logit_bias={end: 100.0})
    assert ended.finish_reason == "stop"


def test_deltas_join_to_the_text_and_come_one_a_token(model):
    events = list(model.stream(PROMPT, max_tokens=9, temperature=3.0, seed=5))
    deltas = [event for event in events if isinstance(event, Delta)]
    completion = model.generate(PROMPT, max_tokens=9, temperature=3.0, seed=5)
    assert "".join(delta.text for delta in deltas) == completion.text
    assert [d.token for d in deltas if d.token is not None] == completion.tokens
    assert isinstance(events[-1], Done) and events[-1].reason == "length"


def test_a_stop_flag_keeps_what_is_there(model):
    seen: list[str] = []
    completion = model.generate(PROMPT, max_tokens=50, should_stop=lambda: len(seen) >= 1)
    assert completion.finish_reason == "length" and len(completion.tokens) == 50
    events = model.stream(PROMPT, max_tokens=50, should_stop=lambda: len(seen) >= 4)
    for event in events:
        if isinstance(event, Delta):
            seen.append(event.text)
    assert isinstance(event, Done) and event.reason == "stopped"
    assert event.stats.generated_tokens == len(seen) == 4
    assert completion.text.startswith("".join(seen))


def test_a_stop_flag_is_asked_between_chunks_of_the_prompt(model):
    fed: list[int] = []
    events = model.stream(PROMPT, max_tokens=5, prefill_chunk=2, should_stop=lambda: len(fed) >= 3)
    for event in events:
        if isinstance(event, Prefill):
            fed.append(event.done)
    assert fed == [0, 2, 4] and event.reason == "stopped"


def test_text_stays_within_the_context():
    model = tiny_language_model(max_position_embeddings=16)
    completion = model.generate([5] * 10, max_tokens=100)
    assert len(completion.tokens) == 7 and completion.finish_reason == "length"
    assert len(model.generate([5] * 16).tokens) == 1
    with pytest.raises(MlxtxError, match="17 tokens, more than the model's context of 16"):
        model.generate([5] * 17)


@pytest.mark.parametrize("table", [0, 16])  # rows of learned positions
def test_each_row_of_a_batch_has_its_own_room_in_the_context(table):
    model = tiny_language_model(max_position_embeddings=16)
    config = model.model.config
    embedding = replace(config.embedding, positions=table)
    mx.random.seed(0)
    model = LanguageModel(DecoderModel(replace(config, embedding=embedding)), model.tokenizer)
    prompts = [[5] * 12, [6, 7, 8], [9]]
    batch = model.generate_batch(prompts, max_tokens=10, ignore_end=True)
    assert [len(completion.tokens) for completion in batch] == [5, 10, 10]
    for prompt, completion in zip(prompts, batch, strict=True):
        alone = model.generate(prompt, max_tokens=10, ignore_end=True)
        assert (completion.tokens, completion.finish_reason) == (alone.tokens, "length")


# --- bad input ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "prompt is empty"),
        ([], "prompt is empty"),
        ([3, 99999], "token 99999, but the model knows 0 to"),
        ([-1], "token -1"),
        ([None], "a prompt is a text"),
        ([{"role": "user"}], "no 'content'"),
        (None, "a prompt is a text"),
        (5, "a prompt is a text"),
        (b"text", "a prompt is a text"),
        ([1.5], "a prompt is a text"),
    ],
)
def test_bad_prompts_are_one_line(model, prompt, message):
    with pytest.raises(MlxtxError, match=message) as caught:
        model.generate(prompt)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be 1 or more"),
        ({"prefill_chunk": 0}, "prefill_chunk"),
        ({"begun": -1}, "begun must be 0 or more"),
        ({"beams": 0}, "beams"),
        ({"max_tokens": "5"}, "max_tokens must be a whole number, not '5'"),
        ({"max_tokens": 2.5}, "max_tokens must be a whole number, not 2.5"),
        ({"logprobs": True}, "logprobs must be a whole number, not True"),
        ({"temperature": "1"}, "temperature must be a number, not '1'"),
        ({"stop": [5]}, "stop must be a text or several"),
        ({"logit_bias": {5: "x"}}, "value of another kind"),
        ({"logit_bias": [5]}, "value of another kind"),
        ({"kv": 5}, "kv must be a text, not 5"),
        ({"beams": 1001}, "beams must be from 1 to 1000"),
        ({"beams": 2, "length_penalty": float("nan")}, "length_penalty must be a number"),
        ({"beams": 2, "length_penalty": 1000.0}, "length_penalty must be a number from -30 to 30"),
        ({"beams": 2, "length_penalty": -1000.0}, "length_penalty must be a number from -30 to 30"),
        ({"logprobs": -1}, "logprobs must be 0 or more"),
        ({"beams": 2, "temperature": 1.0}, "beam search takes no temperature"),
        ({"tempreature": 1.0}, "unknown option 'tempreature'"),
    ],
)
def test_bad_options_are_one_line(model, options, message):
    with pytest.raises(MlxtxError, match=message):
        model.generate(PROMPT, **options)


def test_none_stands_for_the_default_and_numpy_counts(model):
    unset = dict.fromkeys(("stop", "logit_bias", "temperature", "top_k", "seed", "kv"))
    wanted = model.generate(PROMPT, max_tokens=4, logit_bias={9: -50.0}).tokens
    given = {"max_tokens": np.int64(4), "logit_bias": {"9": np.float32(-50)}}
    assert model.generate(PROMPT, **{**unset, **given}).tokens == wanted
    one = model.generate_batch([PROMPT], seed=7, temperature=1.0, max_tokens=3)[0].tokens
    batch = (prompt for prompt in (PROMPT, PROMPT))
    for given in model.generate_batch(batch, seed=np.int64(7), temperature=1.0, max_tokens=3):
        assert given.tokens == one
    with pytest.raises(MlxtxError, match="seed must be a whole number"):
        model.generate_batch([PROMPT], seed=7.5)
    ids = model.encode(PROMPT)
    for prompt in (np.array(ids), mx.array(ids), tuple(ids)):
        assert model.generate(prompt, max_tokens=4, logit_bias={9: -50.0}).tokens == wanted


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("options", [{}, {"beams": 2}, {"temperature": 1.0}])
def test_logits_that_are_no_numbers_are_an_error(value, options):
    shared = tiny_language_model()
    head = shared.model.lm_head.weight
    try:
        shared.model.lm_head.weight = head * value
        with pytest.raises(MlxtxError, match="logits are not numbers"):
            shared.generate(PROMPT, max_tokens=4, **options)
    finally:
        shared.model.lm_head.weight = head


# --- how the work is done -------------------------------------------------------------------


class Watched:
    """Passes calls to the model on and notes them."""

    def __init__(self, model) -> None:
        self.model = model
        self.config = model.config
        self.make_cache, self.outgrows = model.make_cache, model.outgrows
        self.calls: list[tuple[str, int, int | None]] = []

    def __call__(self, tokens, cache=None, **options):
        self.calls.append(("logits", tokens.shape[1], options.get("last")))
        return self.model(tokens, cache, **options)

    def hidden(self, tokens, cache=None, **options):
        self.calls.append(("hidden", tokens.shape[1], options.get("last")))
        return self.model.hidden(tokens, cache, **options)


def test_logits_of_the_last_position_only(model):
    watched = Watched(model.model)
    watching = LanguageModel(watched, model.tokenizer)
    watching.generate([7] * 10, max_tokens=3, prefill_chunk=4)
    prompt = [("hidden", 4, 1), ("hidden", 4, 1), ("logits", 2, 1)]
    assert watched.calls == [*prompt, ("logits", 1, 1), ("logits", 1, 1)]


def test_the_next_step_is_issued_before_a_token_is_handed_out(model):
    watched = Watched(model.model)
    handed_out = 0
    for event in LanguageModel(watched, model.tokenizer).stream([7] * 4, max_tokens=6):
        if isinstance(event, Delta):
            handed_out += 1
            steps = len(watched.calls) - 1  # the first call is the prompt
            assert steps == min(handed_out, 5)  # and none is issued in vain at the end


def test_stats_count_tokens_and_time(model):
    stats = model.generate([7] * 10, max_tokens=6).stats
    assert (stats.prompt_tokens, stats.generated_tokens, stats.reused_tokens) == (10, 6, 0)
    assert stats.time_to_first_token > 0 and stats.decode_tokens_per_second > 0
    assert stats.prefill_tokens_per_second == pytest.approx(10 / stats.time_to_first_token)
    layers, keys_and_values, heads, dim, rows = 2, 2, 2, 16, 256
    assert stats.cache_bytes == layers * keys_and_values * heads * dim * rows * 4
    assert stats.peak_memory_bytes >= stats.memory_bytes > stats.cache_bytes


def test_stats_of_beams_count_the_search_and_all_caches(model):
    prompt, beams, steps = [7] * 10, 3, 6
    stats = model.generate(prompt, max_tokens=steps, beams=beams).stats
    alone = model.generate(prompt, max_tokens=steps).stats
    assert stats.cache_bytes == beams * alone.cache_bytes
    # The clock counts the steps of the search, not the tokens handed out at its end.
    generation = model._generation([prompt], max_tokens=steps, beams=beams)
    counts = [generation._clock.steps for _ in generation.events()]
    assert counts == [steps] * (steps + 1)  # the deltas and the end


# --- thinking -------------------------------------------------------------------------------


def kinds(model: LanguageModel, prompt: list[int], answer: list[int]) -> list[str]:
    """The kinds of the deltas when the model says just this."""
    generation = Generation(model.model, model.tokenizer, [prompt], Options())
    row = generation.rows[0]
    return [row.push(token, None).kind for token in answer]


@pytest.mark.parametrize("kind", ["byte_fallback", "metaspace", "byte_level", "words", "wordpiece"])
def test_the_text_of_an_answer_goes_on_from_its_beginning(tmp_path, model, kind):
    """A first word gives up the space before it, which belongs between this and the beginning."""
    from mlxtx.text.tokenizer import Tokenizer
    from tests.text import vocabularies

    getattr(vocabularies, kind)().save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    words = tokenizer.encode("The lamp 👍", add_special=False)
    more = tokenizer.encode("The lamp on", add_special=False)[-1]
    prompt = [5, *words]
    row = Generation(model.model, tokenizer, [prompt], Options(begun=len(words))).rows[0]
    row.push(more, None)
    row.finish("length")
    whole = tokenizer.decode([*words, more])
    assert tokenizer.decode(words) + "".join(row.parts) == whole


def test_thinking_is_told_apart_by_its_marks(tmp_path, model):
    from mlxtx.text.tokenizer import Tokenizer
    from mlxtx.tiny_model import tiny_tokenizer

    inner = tiny_tokenizer()
    inner.add_tokens(["<think>", "</think>"])
    inner.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    start, end = tokenizer.thinking_ids
    wide = tiny_language_model(vocab_size=len(tokenizer))
    thinker = LanguageModel(wide.model, tokenizer)
    assert kinds(thinker, [9], [start, 8, end, 8]) == ["thinking"] * 3 + ["text"]
    assert kinds(thinker, [9, start], [8, end, 8]) == ["thinking"] * 2 + ["text"]
    assert kinds(thinker, [9, start, 7, 6], [8, end, 8]) == ["thinking"] * 2 + ["text"]
    assert kinds(thinker, [start, 9, end], [8]) == ["text"]
    # A user who writes of the mark, and the end of his turn.
    asked = [{"role": "user", "content": "What is <think> for?"}]
    turned = wide.tokenizer.chat_template.render(asked)
    assert kinds(thinker, tokenizer.encode(turned), [8]) == ["text"]
    assert kinds(model, [9], [8]) == ["text"]

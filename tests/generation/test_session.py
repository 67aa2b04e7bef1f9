"""A kept cache: never another answer, only less work."""

from __future__ import annotations

import copy

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxtx.errors import MlxtxError
from mlxtx.events import Delta, Done
from mlxtx.generation.session import context_limit, rope_regime
from mlxtx.language_model import LanguageModel
from tests.tiny_model import tiny_language_model


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return tiny_language_model()


def test_a_second_turn_feeds_only_what_is_new(model):
    session = model.session()
    first = model.generate([5, 6, 7, 8], max_tokens=5, session=session)
    assert first.stats.reused_tokens == 0
    longer = [5, 6, 7, 8, *first.tokens, 9, 10]
    second = model.generate(longer, max_tokens=5, session=session)
    # The first answer's last token was chosen but never fed.
    assert second.stats.reused_tokens == 4 + 5 - 1
    assert second.tokens == model.generate(longer, max_tokens=5).tokens


def test_the_same_prompt_again_feeds_one_token(model):
    session = model.session()
    first = model.generate([5, 6, 7, 8], max_tokens=3, session=session)
    again = model.generate([5, 6, 7, 8], max_tokens=3, session=session)
    assert again.tokens == first.tokens and again.stats.reused_tokens == 3


@settings(max_examples=40, deadline=None)
@given(
    turns=st.lists(
        st.tuples(
            st.lists(st.integers(3, 5), min_size=1, max_size=8),  # few ids: common beginnings
            st.integers(1, 4),
            st.booleans(),  # leave in the middle of the answer
        ),
        min_size=2,
        max_size=5,
    )
)
def test_any_sequence_of_prompts_gives_the_answers_of_fresh_caches(turns):
    model = tiny_language_model()
    session = model.session()
    for prompt, count, leave in turns:
        wanted = model.generate(prompt, max_tokens=count).tokens
        tokens = []
        for event in model.stream(prompt, max_tokens=count, session=session):
            if isinstance(event, Delta) and event.token is not None:
                tokens.append(event.token)
                if leave:
                    break
        assert tokens == (wanted[:1] if leave else wanted)


def test_an_error_in_a_turn_leaves_no_half_step(model):
    session = model.session()
    model.generate([5, 6, 7], max_tokens=2, session=session)
    asked = 0

    def interrupt() -> bool:
        nonlocal asked
        asked += 1
        if asked > 3:
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        model.generate([5, 6, 7, 8, 9], max_tokens=20, session=session, should_stop=interrupt)
    assert session.cache.offset == 0 and session.tokens == []
    after = model.generate([5, 6, 7, 8], max_tokens=4, session=session)
    assert after.tokens == model.generate([5, 6, 7, 8], max_tokens=4).tokens


def test_a_session_is_for_one_conversation(model):
    with pytest.raises(MlxtxError, match="one conversation"):
        model._generation([[1], [2]], session=model.session())


def test_a_session_of_another_kind_is_refused(model):
    session = model.session()
    other = tiny_language_model(max_position_embeddings=64)
    with pytest.raises(MlxtxError, match="another model's cache"):
        other.generate([5, 6], session=session)
    with pytest.raises(MlxtxError, match=r"must be what model\.session"):
        model.generate([5, 6], session=model.chat())
    with pytest.raises(MlxtxError, match="cache is plain, not k8v4g64"):
        model.generate([5, 6], session=session, kv="k8v4g64")
    assert session.turn == 0
    # The same setting, spelled in another way.
    for kv, held in (("plain", session), ("k8v4", model.session("k8v4g64"))):
        assert len(model.generate([5, 6], session=held, kv=kv, max_tokens=2).tokens) == 2


def test_an_answer_that_was_left_cannot_go_on_in_its_session(model):
    """Its tokens would go into the rows of the prompt that came after it."""
    session = model.session()
    left = model.stream([5, 6, 7, 8], session=session, max_tokens=10)
    for _ in range(4):
        next(left)
    later = [5, 6, 7, 8, 9, 10]
    model.generate(later, session=session, max_tokens=5)
    with pytest.raises(MlxtxError, match="another prompt"):
        next(left)
    assert len(session.tokens) == 11
    more = [*session.tokens, 3]
    again = model.generate(more, session=session, max_tokens=8)
    assert again.stats.reused_tokens == 10
    assert again.tokens == model.generate(more, max_tokens=8).tokens


def test_another_adapter_makes_a_kept_cache_stale(tmp_path):
    from mlxtx.decoder.model import DecoderModel
    from mlxtx.families import family_for
    from mlxtx.tuning import Adapters
    from mlxtx.tuning.adapters import adapter_of, save_adapter
    from mlxtx.tuning.lora import LowRank
    from mlxtx.tuning.targets import add_adapters, remove_adapters
    from mlxtx.tuning.trees import named, nested

    plain = tiny_language_model()
    inner = DecoderModel(family_for(plain.config).decoder_config(plain.config))
    inner.update(plain.model.parameters())
    model = LanguageModel(inner, plain.tokenizer, plain.config)
    add_adapters(inner, {"model.layers.0.mlp.down_proj": LowRank(rank=2, scale=8.0)})
    mx.random.seed(0)
    weights = named(inner.trainable_parameters())
    random = {n: mx.random.normal(a.shape) for n, a in weights.items() if "lora" in n}
    inner.update(nested(random))
    save_adapter(adapter_of(inner), tmp_path, 2)
    remove_adapters(inner)
    adapters = Adapters(inner, plain.config)
    adapters.load(tmp_path, "other")
    session = model.session()
    prompt = list(range(5, 25))
    model.generate(prompt, session=session, max_tokens=2)
    adapters.use("other")
    after = model.generate([*prompt, 3], session=session, max_tokens=8)
    assert after.stats.reused_tokens == 0
    assert after.tokens == model.generate([*prompt, 3], max_tokens=8).tokens
    kept = model.generate([*prompt, 3, 4], session=session, max_tokens=2)
    assert kept.stats.reused_tokens == 21


SCALED = {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 16}


def test_keys_of_another_rotary_regime_are_not_reused():
    """Beyond the trained context dynamic scaling turns all keys by new angles."""
    model = tiny_language_model_scaled()
    config = model.model.config
    assert [rope_regime(config, length) for length in (1, 16, 17, 20)] == [0, 0, 17, 20]
    assert context_limit(config) == 32
    session = model.session()
    model.generate([5] * 10, max_tokens=2, session=session)
    within = model.generate([5] * 14, max_tokens=2, session=session)
    assert within.stats.reused_tokens > 0
    beyond = model.generate([5] * 20, max_tokens=4, session=session)
    assert beyond.stats.reused_tokens == 0
    assert beyond.tokens == model.generate([5] * 20, max_tokens=4).tokens


def tiny_language_model_scaled() -> LanguageModel:
    import json

    from mlxtx.decoder.model import DecoderModel
    from mlxtx.families import family_for

    plain = tiny_language_model()
    config = json.loads(json.dumps(plain.config)) | SCALED
    model = DecoderModel(family_for(config).decoder_config(config))
    model.update(plain.model.parameters())
    return LanguageModel(model, plain.tokenizer, config)


# --- conversations --------------------------------------------------------------------------


def test_a_conversation_remembers_and_reuses(model):
    chat = model.chat("Be kind.")
    events = list(chat.stream("Hello", max_tokens=6))
    text = "".join(event.text for event in events if isinstance(event, Delta))
    assert chat.messages == [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": text},
    ]
    second = list(chat.stream("More", max_tokens=6))[-1]
    assert isinstance(second, Done)
    # At least the system message and the first question are still in the cache.
    shared = model.encode([{"role": "system", "content": "Be kind."}, chat.messages[0]])
    assert second.stats.reused_tokens >= len(shared) - 1
    fresh = model.generate(
        [{"role": "system", "content": "Be kind."}, *chat.messages[:3]], max_tokens=6
    )
    assert chat.messages[3]["content"] == fresh.text


def test_leaving_a_turn_keeps_its_text(model):
    chat = model.chat()
    for event in chat.stream("Hello", max_tokens=20):
        if isinstance(event, Delta) and event.text:
            break
    del event
    import gc

    gc.collect()  # the generator is closed, as when a caller walks away
    assert [message["role"] for message in chat.messages] == ["user", "assistant"]


def test_an_answer_left_and_still_held_ends_with_the_next_message(model):
    chat = model.chat()
    left = chat.stream("Hello", max_tokens=20)
    for _ in range(5):
        next(left)
    list(chat.stream("More", max_tokens=4))
    assert list(left) == []
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 2
    fresh = model.generate(chat.messages[:3], max_tokens=4)
    assert chat.messages[3]["content"] == fresh.text


def test_answers_asked_for_ahead_are_given_one_after_the_other(model):
    chat = model.chat()
    for answer in [chat.stream(text, max_tokens=3) for text in ("Hello", "More")]:
        assert isinstance(list(answer)[-1], Done)
    assert [message["content"] for message in chat.messages[::2]] == ["Hello", "More"]


def test_a_message_may_have_its_own_template_values(model):
    from mlxtx.text.chat_template import ChatTemplate

    tokenizer = copy.copy(model.tokenizer)
    source = "{{ messages[-1].content }}{{ tone }}{{ depth }}"
    tokenizer.chat_template = ChatTemplate({"default": source})
    chat = LanguageModel(model.model, tokenizer).chat(template={"tone": "low", "depth": "7"})
    list(chat.stream("lamp", max_tokens=1, template={"tone": "loud"}))
    assert tokenizer.decode(chat.session.tokens[:-1]) == "lamploud7"
    list(chat.stream("lamp", max_tokens=1, template=None))
    assert tokenizer.decode(chat.session.tokens[:-1]) == "lamplow7"


def test_messages_taken_away_in_the_middle_of_an_answer(model):
    chat = model.chat()
    for _ in chat.stream("Hello", max_tokens=3):
        chat.reset()
    assert chat.messages == []
    left = chat.stream("Hello", max_tokens=3)
    next(left)
    chat.reset()
    left.close()
    assert chat.messages == []


def test_a_turn_that_fails_is_forgotten(model):
    chat = model.chat()
    with pytest.raises(MlxtxError):
        list(chat.stream("Hello", max_tokens=0))
    assert chat.messages == []
    list(chat.stream("Hello", max_tokens=2))
    chat.reset()
    assert chat.messages == [] and chat.session.cache.offset == 0

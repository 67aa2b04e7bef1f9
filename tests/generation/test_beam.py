"""Beam search against the enumeration of every possible answer."""

from __future__ import annotations

import itertools

import mlx.core as mx
import numpy as np
import pytest

from mlxtx.decoder.config import (
    AttentionConfig,
    BlockConfig,
    DecoderConfig,
    FeedForwardConfig,
    RopeConfig,
)
from mlxtx.decoder.model import DecoderModel
from mlxtx.generation.beam import beam_search
from tests.tiny_model import tiny_language_model

VOCABULARY, END = 4, 0


@pytest.fixture(scope="module", params=[0, 1, 2])
def small(request) -> DecoderModel:
    """Four tokens, one layer, weights large enough for uneven probabilities. Without positions
    the same tokens in another order would tie, and rounding would rank them."""
    attention = AttentionConfig(heads=2, kv_heads=1, head_dim=4, rope=RopeConfig(dims=4))
    block = BlockConfig(attention=attention, feed_forward=FeedForwardConfig(width=8))
    mx.random.seed(request.param)
    model = DecoderModel(DecoderConfig(vocabulary=VOCABULARY, width=8, blocks=(block,), context=64))
    model.lm_head.weight = model.lm_head.weight * 6
    mx.eval(model.parameters())
    return model


def logprobs(model: DecoderModel, tokens: list[int]) -> np.ndarray:  # [T, V]
    logits = np.array(model(mx.array([tokens]))[0], dtype=np.float64)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def every_answer(model, prompt, longest, penalty) -> list[tuple[float, tuple[int, ...]]]:
    answers = []
    for count in range(1, longest + 1):
        for tokens in itertools.product(range(VOCABULARY), repeat=count):
            whole = END not in tokens[:-1] and (tokens[-1] == END or count == longest)
            if whole:
                rows = logprobs(model, [*prompt, *tokens])[len(prompt) - 1 : -1]
                score = float(sum(rows[i][token] for i, token in enumerate(tokens)))
                answers.append((score / count**penalty, tokens))
    return sorted(answers, reverse=True)


@pytest.mark.parametrize("penalty", [0.0, 1.0, -1.0])
def test_beams_that_hold_everything_find_the_best_answers(small, penalty):
    """With a beam for every prefix nothing is pruned, so the ranking is the true one."""
    prompt, longest = [1, 2, 3], 3
    wide = VOCABULARY**longest
    wanted = every_answer(small, prompt, longest, penalty)
    found = beam_search(
        small, prompt, beams=wide, max_tokens=longest, length_penalty=penalty, ends={END}
    )
    assert [beam.tokens for beam in found[:10]] == [tokens for _, tokens in wanted[:10]]
    np.testing.assert_allclose(
        [beam.score for beam in found], [score for score, _ in wanted], atol=1e-5
    )


def reference(model, prompt, beams, longest, penalty) -> list[tuple[int, ...]]:
    """The algorithm once more, with full forward passes and lists."""
    going: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    done: list[tuple[float, tuple[int, ...]]] = []
    for length in range(1, longest + 1):
        candidates = []
        for score, tokens in going:
            row = logprobs(model, [*prompt, *tokens])[-1]
            candidates += [(score + row[t], (*tokens, t)) for t in range(VOCABULARY)]
        candidates.sort(reverse=True)
        for score, tokens in candidates[:beams]:
            if tokens[-1] == END or length == longest:
                done.append((score / length**penalty, tokens))
        done = sorted(done, reverse=True)[:beams]
        going = [entry for entry in candidates if entry[1][-1] != END][:beams]
        if len(done) == beams and going[0][0] / length**penalty <= done[-1][0]:
            break
    return [tokens for _, tokens in done]


@pytest.mark.parametrize("beams", [1, 2, 3])
@pytest.mark.parametrize("penalty", [0.5, 1.0, 2.0])
def test_narrow_beams_prune_as_the_algorithm_says(small, beams, penalty):
    for prompt in ([1], [2, 3], [3, 1, 2, 2]):
        found = beam_search(
            small, prompt, beams=beams, max_tokens=8, length_penalty=penalty, ends={END}
        )
        assert [beam.tokens for beam in found] == reference(small, prompt, beams, 8, penalty)


def greedy(model: DecoderModel, prompt: list[int], longest: int) -> list[int]:
    tokens: list[int] = []
    while len(tokens) < longest and END not in tokens:
        tokens.append(int(logprobs(model, [*prompt, *tokens])[-1].argmax()))
    return tokens


def test_width_one_is_greedy(small):
    for prompt in itertools.product(range(1, VOCABULARY), repeat=3):
        found = beam_search(small, prompt, beams=1, max_tokens=10, ends={END})
        assert [list(beam.tokens) for beam in found] == [greedy(small, list(prompt), 10)]


def test_through_the_language_model():
    model = tiny_language_model()
    prompt = model.encode("The lamp on the table")
    beams = beam_search(model.model, prompt, beams=3, max_tokens=6, prefill_chunk=4)
    completion = model.generate(prompt, beams=3, max_tokens=6)
    assert tuple(completion.tokens) == beams[0].tokens
    assert completion.text == model.tokenizer.decode(completion.tokens)
    assert completion.finish_reason == "length"
    # The best of three is at least as likely as the greedy answer.
    greedy_logprob = sum(
        entry.logprob for entry in model.generate(prompt, max_tokens=6, logprobs=0).logprobs
    )
    assert beams[0].logprob >= greedy_logprob - 1e-5


def test_stopping_gives_what_is_there():
    model = tiny_language_model()
    asked = iter([False, False, False, True])
    found = beam_search(
        model.model, [5, 6], beams=2, max_tokens=9, should_stop=lambda: next(asked, True)
    )
    assert [len(beam.tokens) for beam in found] == [1, 1] or all(
        1 <= len(beam.tokens) < 9 for beam in found
    )

"""An 8-bit cache says the same: greedy tokens are equal, or part where the model is undecided."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlxtx.errors import MlxtxError
from mlxtx.language_model import LanguageModel, load
from tests.tiny_model import tiny_folder

PROMPTS = [
    "What do you think about it?",
    "Tell me about the lamp on the table, the window and the cat.",
    "Rain falls on the roof; the cat sleeps under the chair. Then",
]


@pytest.fixture(scope="module", params=["tiny", "bundled"])
def model(request) -> LanguageModel:
    if request.param == "tiny":
        return load(tiny_folder())
    try:
        return load("bundled")
    except MlxtxError as error:
        pytest.skip(f"no bundled model: {error}")


def forced(model: LanguageModel, prompt: list[int], answer: list[int], kv: str) -> np.ndarray:
    """Logits [T, V] before each token of ``answer`` when it is fed token by token."""
    cache = model.model.make_cache(kv)
    logits = [model.model(mx.array([prompt]), cache, last=1)]
    logits += [model.model(mx.array([[token]]), cache) for token in answer[:-1]]
    return np.array(mx.concatenate(logits, axis=1)[0], np.float32)


@pytest.mark.parametrize("kv", ["k8v8g64", "k8v8g32r"])
def test_eight_bits_part_only_where_the_margin_is_below_the_error(model, kv):
    same = total = 0
    for text in PROMPTS:
        prompt = model.encode([{"role": "user", "content": text}])
        answer = list(model.generate(prompt, max_tokens=32, kv="plain").tokens)
        plain, kept = (forced(model, prompt, answer, which) for which in ("plain", kv))
        assert plain.argmax(-1).tolist() == answer
        best = np.sort(plain, axis=-1)
        margin, error = best[:, -1] - best[:, -2], np.abs(kept - plain).max(-1)
        parted = kept.argmax(-1) != plain.argmax(-1)
        assert (margin[parted] <= 2 * error[parted]).all()
        assert error.max() < 0.02 * np.abs(plain).max()
        same, total = same + int((~parted).sum()), total + len(answer)
    assert same >= 0.97 * total

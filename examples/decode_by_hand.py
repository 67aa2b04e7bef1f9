"""Greedy decoding with nothing but the model and its cache, for two prompts at once.

    python examples/decode_by_hand.py [path/or/hub-id]

The shorter prompt is padded on the left, which the cache is told when it is made.
"""

import sys

import mlx.core as mx

import mlxtx
from mlxtx.default_model import default_model
from mlxtx.text.inert import inert
from mlxtx.text.tokenizer import Tokenizer

path = sys.argv[1] if len(sys.argv) > 1 else default_model()[0]
model, config = mlxtx.load_model(path)
tokenizer = Tokenizer.load(path)

prompts = [tokenizer.encode(text) for text in ("The lamp on the table", "Rain")]
longest = max(map(len, prompts))
padding = [longest - len(prompt) for prompt in prompts]
tokens = mx.array([[0] * pad + prompt for pad, prompt in zip(padding, prompts, strict=True)])

cache = model.make_cache(left_padding=padding)
answer = []
for _ in range(16):
    logits = model(tokens, cache, last=1)  # [2, 1, V]
    tokens = mx.argmax(logits, axis=-1)  # [2, 1]
    answer.append(tokens)
for row in mx.concatenate(answer, axis=1).tolist():
    print(inert(tokenizer.decode(row)))

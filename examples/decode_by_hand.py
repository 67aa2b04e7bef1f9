"""Greedy decoding with nothing but the model and its cache, for two prompts at once.

    python examples/decode_by_hand.py [path/or/hub-id]

The shorter prompt is padded on the left, which the cache is told when it is made.
"""

import sys

import mlx.core as mx

import mlxtx
from mlxtx.checkpoint import resolve
from mlxtx.text.inert import inert
from mlxtx.text.tokenizer import Tokenizer

folder = resolve(sys.argv[1] if len(sys.argv) > 1 else "bundled")
model, config = mlxtx.load_model(folder)
tokenizer = Tokenizer.load(folder)

questions = ("What is a decoder made of?", "What is mlxtx?")
prompts = [tokenizer.encode_chat([{"role": "user", "content": text}]) for text in questions]
longest = max(map(len, prompts))
padding = [longest - len(prompt) for prompt in prompts]
tokens = mx.array([[0] * pad + prompt for pad, prompt in zip(padding, prompts, strict=True)])

cache = model.make_cache(left_padding=padding)
answer = []
for _ in range(40):
    logits = model(tokens, cache, last=1)  # [2, 1, V]
    tokens = mx.argmax(logits, axis=-1)  # [2, 1]
    answer.append(tokens)
for row in mx.concatenate(answer, axis=1).tolist():
    ends = [index for index, token in enumerate(row) if token in tokenizer.eos_ids]
    print(inert(tokenizer.decode(row[: ends[0]] if ends else row)))

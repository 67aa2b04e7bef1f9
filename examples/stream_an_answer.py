"""Streams an answer and prints what it cost.

python examples/stream_an_answer.py [path/or/hub-id] ["a prompt"]
"""

import sys

import mlxtx
from mlxtx.events import Delta, Done
from mlxtx.text.inert import inert

path = sys.argv[1] if len(sys.argv) > 1 else "bundled"
prompt = sys.argv[2] if len(sys.argv) > 2 else "What is a token?"

model = mlxtx.load(path)
messages = [{"role": "user", "content": prompt}]
for event in model.stream(messages, max_tokens=60, temperature=0.7, seed=0):
    match event:
        case Delta(text=text):
            print(inert(text), end="", flush=True)
        case Done(reason=reason, stats=stats):
            print(f"\n[{reason}; {stats.decode_tokens_per_second:.0f} tokens/s]")

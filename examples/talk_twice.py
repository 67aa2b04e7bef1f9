"""A conversation of two turns: the second reuses what the first left in the cache.

python examples/talk_twice.py [path/or/hub-id]
"""

import sys

import mlxtx
from mlxtx.events import Delta, Done
from mlxtx.text.inert import inert

model = mlxtx.load(sys.argv[1] if len(sys.argv) > 1 else "bundled")
chat = model.chat()
for question in ("What is a key/value cache?", "How do I make it smaller?"):
    print(f"> {question}")
    for event in chat.stream(question, max_tokens=40):
        if isinstance(event, Delta):
            print(inert(event.text), end="", flush=True)
        elif isinstance(event, Done) and event.stats:
            stats = event.stats
            print(f"\n[{stats.reused_tokens} of {stats.prompt_tokens} prompt tokens were reused]")

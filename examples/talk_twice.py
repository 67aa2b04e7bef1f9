"""A conversation of two turns: the second reuses what the first left in the cache.

python examples/talk_twice.py [path/or/hub-id]
"""

import sys

import mlxtx
from mlxtx.default_model import default_model
from mlxtx.events import Delta, Done
from mlxtx.text.inert import inert

model = mlxtx.load(sys.argv[1] if len(sys.argv) > 1 else default_model()[0])
chat = model.chat(system="Answer in one sentence.")
for question in ("What is a prime number?", "Which is the smallest?"):
    print(f"> {question}")
    for event in chat.stream(question, max_tokens=40):
        if isinstance(event, Delta):
            print(inert(event.text), end="", flush=True)
        elif isinstance(event, Done) and event.stats:
            stats = event.stats
            print(f"\n[{stats.reused_tokens} of {stats.prompt_tokens} prompt tokens were reused]")

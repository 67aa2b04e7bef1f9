"""One round of ``mlxtx bench`` in a process of its own: loads a model, runs the cases, prints JSON.

Runs under any interpreter that has the engine, for it imports nothing else of mlxtx:

    python scripts/bench_worker.py '{"engine": "mlxtx", "model": "...", "cases": [...]}'

Both engines are driven token by token and timed by the same function, and the clock for loading
starts when the interpreter is at rest. A case is {"prompt": tokens, "new": tokens, "kv": name or null}.
"""

from __future__ import annotations

import json
import random
import resource
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

# (prompt ids, new tokens, kv) -> something that yields once a token
Run = Callable[[list[int], int, Any], Iterable[object]]


def settle() -> None:
    """Waits until no thread of this process is busy. Those of a BLAS spin for some 50 ms after they
    start: an engine that is imported in less time would have to load beside them."""
    for _ in range(50):
        before = time.process_time()
        time.sleep(0.02)
        if time.process_time() - before < 0.002:
            return


def mlxtx_engine(job: dict[str, Any]) -> tuple[Run, int, float]:
    from mlxtx.checkpoint.loading import load_model
    from mlxtx.generation.loop import TokenStep, token_steps
    from mlxtx.generation.sampling import Sampler, Sampling

    settle()
    start = time.perf_counter()
    model, _ = load_model(job["model"], job.get("dtype"))
    seconds = time.perf_counter() - start
    vocabulary = model.config.vocabulary

    def run(prompt: list[int], new: int, kv: Any) -> Iterable[object]:
        steps = token_steps(
            model,
            [prompt],
            cache=model.make_cache(kv=kv),
            sampler=Sampler(Sampling(), [prompt], vocabulary),
            max_tokens=new,
        )
        return (step for step in steps if isinstance(step, TokenStep))

    return run, vocabulary, seconds


def mlx_lm_engine(job: dict[str, Any]) -> tuple[Run, int, float]:
    from pathlib import Path

    import mlx.core as mx
    from mlx_lm.generate import generate_step
    from mlx_lm.utils import load_model

    settle()
    start = time.perf_counter()
    model, config = load_model(Path(job["model"]))
    seconds = time.perf_counter() - start

    def run(prompt: list[int], new: int, kv: Any) -> Iterable[object]:
        quantized = {"kv_bits": kv["bits"], "kv_group_size": kv["group"]} if kv else {}
        return generate_step(mx.array(prompt), model, max_tokens=new, **quantized)

    return run, config["vocab_size"], seconds


ENGINES = {"mlxtx": mlxtx_engine, "mlx-lm": mlx_lm_engine}


def measure(run: Run, vocabulary: int, case: dict[str, Any]) -> dict[str, float]:
    """Seconds to the first token, tokens a second before and after it, and peak bytes."""
    import mlx.core as mx

    numbers = random.Random(0)
    prompt = [numbers.randrange(3, vocabulary) for _ in range(case["prompt"])]
    mx.clear_cache()
    mx.reset_peak_memory()
    start = first = time.perf_counter()
    for count, _ in enumerate(run(prompt, case["new"], case["kv"])):
        if count == 0:
            first = time.perf_counter()
    end = time.perf_counter()
    return {
        "first_token_seconds": first - start,
        "prefill_tokens_per_second": case["prompt"] / (first - start),
        "decode_tokens_per_second": (case["new"] - 1) / (end - first),
        "peak_bytes": mx.get_peak_memory(),
    }


def main() -> None:
    import mlx.core as mx

    job = json.loads(sys.argv[1])
    run, vocabulary, loaded = ENGINES[job["engine"]](job)
    weights = mx.get_active_memory()
    measure(run, vocabulary, {"prompt": 16, "new": 4, "kv": None})  # warm-up
    rows = [measure(run, vocabulary, case) for case in job["cases"]]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = {
        "load_seconds": loaded,
        "weight_bytes": weights,
        "process_peak_bytes": peak * (1 if sys.platform == "darwin" else 1024),
        "cases": rows,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()

"""One engine in a process of its own, asked over standard input and output, a JSON object a line.

    {"ids": [...], "count": 128} → {"ids": [...], "seconds": [...]}: the new tokens, and when each was there

    python serve.py PEER MODEL VARIANT SPECULATE(0|1) THREADS

PEER is a folder beside this file whose `engine.py` has ``load(model, variant, speculate, threads)``: it
returns a function of the prompt's ids, the number of tokens wanted, and a function to hand over tokens as
they come.
"""

import json
import os
import sys
from importlib import import_module
from time import perf_counter


def main() -> None:
    peer, model, variant, speculate, threads = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries that print do not get in between
    generate = import_module(f"{peer}.engine").load(model, variant, speculate == "1", int(threads))
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        ids: list[int] = []
        seconds: list[float] = []
        started = perf_counter()

        def emit(tokens: list[int], started: float = started, ids=ids, seconds=seconds) -> None:
            now = perf_counter() - started
            ids.extend(tokens)
            seconds.extend([now] * len(tokens))

        generate(request["ids"], request["count"], emit)
        print(json.dumps({"ids": ids, "seconds": seconds}), file=answers, flush=True)


main()

"""Record what the target says and what each drafter would have said along it: the data of tuning and of
agreement figures.
"""

from collections.abc import Sequence

import numpy as np

from ..speculate.bundle import Bundle
from ..speculate.engine import GuestEngine
from .replay import LIKELY, Recording


def record(bundle: Bundle, prompt: Sequence[int], drafters: Sequence[str], max_new_tokens: int) -> Recording:
    """Decode `prompt` with the target alone, then force that text through every drafter."""
    prompt = list(prompt)
    output = bundle.generate(prompt, max_new_tokens=max_new_tokens, speculate="none", ignore_eos=True)
    choices, leads = {}, {}
    rows = bundle.logits([*prompt, *output.token_ids[:-1]])[len(prompt) - 1 :]
    likely = np.argsort(-rows, axis=-1, kind="stable")[:, :LIKELY]
    for name in drafters:
        choices[name], leads[name] = _read_along(bundle, name, prompt, output.token_ids)
    guests = frozenset(name for name in drafters if isinstance(bundle.engine(name), GuestEngine))
    return Recording(prompt, np.asarray(output.token_ids), choices, leads, likely, guests)


def measure_agreement(
    bundle: Bundle, prompts: Sequence[list[int]], outputs: Sequence[list[int]]
) -> dict[str, float]:
    """The share of the target's own greedy `outputs` for `prompts` that each drafter would choose too, as the
    bundle was packed: nothing found while decoding counts."""
    bundle.forget()
    shares: dict[str, float] = {}
    for name in bundle.drafters:
        agreed = [
            _read_along(bundle, name, prompt, output)[0] == output
            for prompt, output in zip(prompts, outputs, strict=True)
        ]
        shares[name] = float(np.concatenate(agreed).mean())
    return shares


def _read_along(
    bundle: Bundle, name: str, prompt: Sequence[int], output: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """At each position of `output` [T], what an engine would choose there, int [T], and by how much its logit
    leads the next best one, float [T]."""
    logits = bundle.logits([*prompt, *output[:-1]], engine=name, drafting=True)[len(prompt) - 1 :]
    second, first = np.partition(logits, -2, axis=-1)[:, -2:].T
    return logits.argmax(axis=-1), first - second

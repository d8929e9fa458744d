"""Record what the target says and what each drafter would have said along it: the data of tuning and of
agreement figures.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..speculate.bundle import Bundle
from ..speculate.suffix import SuffixDrafter
from .replay import Trace, next_misses

MAX_SUFFIX_DRAFT = 32


@dataclass(frozen=True)
class Recording:
    """The target's own greedy output for one prompt and every drafter's greedy choice at each of its
    positions.
    """

    prompt: list[int]
    tokens: np.ndarray  # int [T]
    choices: dict[str, np.ndarray]  # drafter -> int [T], given the prompt and the target's tokens before

    def agreement(self, drafter: str) -> float:
        return float(np.mean(self.choices[drafter] == self.tokens))


def record(bundle: Bundle, prompt: Sequence[int], drafters: Sequence[str], max_new_tokens: int) -> Recording:
    """Decode `prompt` with the target alone, then force that text through every drafter."""
    prompt = list(prompt)
    output = bundle.generate(prompt, max_new_tokens=max_new_tokens, speculate="none", ignore_eos=True)
    tokens = np.asarray(output.token_ids)
    context = [*prompt, *output.token_ids[:-1]]
    choices = {
        name: bundle.logits(context, engine=name)[len(prompt) - 1 :].argmax(axis=-1) for name in drafters
    }
    return Recording(prompt, tokens, choices)


def measure_agreement(
    bundle: Bundle, prompts: Sequence[list[int]], outputs: Sequence[list[int]]
) -> dict[str, float]:
    """The share of the target's own greedy `outputs` for `prompts` that each drafter would choose too."""
    shares: dict[str, float] = {}
    for name in bundle.drafters:
        agreed = [
            bundle.logits([*prompt, *output[:-1]], engine=name)[len(prompt) - 1 :].argmax(axis=-1) == output
            for prompt, output in zip(prompts, outputs, strict=True)
        ]
        shares[name] = float(np.concatenate(agreed).mean())
    return shares


def trace(recording: Recording) -> Trace:
    """What the replay needs of a recording."""
    misses = {name: next_misses(choice == recording.tokens) for name, choice in recording.choices.items()}
    drafted, matched = _replay_suffix(recording.prompt, recording.tokens.tolist())
    return Trace(misses, drafted, matched)


def _replay_suffix(prompt: list[int], tokens: list[int]) -> tuple[np.ndarray, np.ndarray]:
    drafter = SuffixDrafter()
    drafter.append(prompt)
    drafted, matched = [], []
    for position, token in enumerate(tokens):
        draft = drafter.draft([], MAX_SUFFIX_DRAFT)
        rest = tokens[position:]
        agree = 0
        while agree < min(len(draft), len(rest)) and draft[agree] == rest[agree]:
            agree += 1
        drafted.append(len(draft))
        matched.append(agree)
        drafter.append([token])
    return np.array(drafted), np.array(matched)

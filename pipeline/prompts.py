"""Read prompts: JSONL in the forms that the field uses, or plain text with one prompt a line. Those that a
bundle cannot decode are passed over, with the reason.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..speculate.bundle import Bundle
from ..speculate.errors import BundleError

Message = dict[str, str]
Item = TypeVar("Item")


@dataclass(frozen=True)
class Prompt:
    """`content` is what `Bundle.generate` takes: a string, messages for the chat template, or token ids."""

    content: str | list[Message] | list[int]
    category: str
    line: int


def read_prompts(path: Path, limit: int | None = None) -> tuple[list[Prompt], list[str]]:
    """Prompts of a file and what was wrong with the lines that were passed over, one sentence each.

    A JSONL line is ``{"turns": [...]}`` (Spec-Bench; the first turn is asked as a user), ``{"messages":
    [...]}`` or ``{"prompt": "..."}``, each with an optional ``category``. With `limit`, prompts are taken
    evenly over the file.
    """
    if not path.is_file():
        raise BundleError(f"prompts file {path} not found; --prompts takes a .jsonl or .txt file")
    prompts, problems = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        if not line.strip():
            continue
        try:
            prompts.append(_read_line(line, number, path.suffix == ".txt"))
        except (ValueError, TypeError, AttributeError) as error:
            problems.append(f"line {number}: {error}; passed over")
    if not prompts:
        raise BundleError(f"{path} holds no usable prompt" + (f" ({problems[0]})" if problems else ""))
    return pick_evenly(prompts, limit), problems


def pick_evenly(items: Sequence[Item], limit: int | None) -> list[Item]:
    """At most `limit` of them, spread over all."""
    if limit is None or not 0 < limit < len(items):
        return list(items)
    return [items[index * len(items) // limit] for index in range(limit)]


def encode_prompts(
    bundle: Bundle, prompts: Sequence[Prompt], modes: Sequence[Mapping[str, Any]], **settings: Any
) -> tuple[list[tuple[Prompt, list[int]]], list[str]]:
    """The prompts, with their token ids, that `bundle` decodes in each of `modes`, with `settings`; and why
    it refuses the others, one sentence each. Raises BundleError if it refuses all.
    """

    def try_decoding(ids: list[int]) -> None:
        for mode in modes:
            bundle.stream(ids, **mode, **settings).close()  # checks all, decodes nothing

    try_decoding([0])  # what is refused even here is not the fault of a prompt
    encoded, problems = [], []
    for prompt in prompts:
        try:
            ids = bundle.encode(prompt.content)
            try_decoding(ids)
        except BundleError as error:
            problems.append(f"line {prompt.line}: {error}; passed over")
        else:
            encoded.append((prompt, ids))
    if not encoded:
        raise BundleError(f"no prompt is left that this bundle can decode ({problems[0]})")
    return encoded, problems


def _read_line(line: str, number: int, plain: bool) -> Prompt:
    if plain:
        return Prompt(line.strip(), "text", number)
    record = json.loads(line)
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    category = str(record.get("category", "all"))
    match record:
        case {"messages": [*messages]} if messages:
            return Prompt(messages, category, number)
        case {"turns": [str(first), *_]} if first.strip():
            return Prompt([{"role": "user", "content": first}], category, number)
        case {"prompt": str(text)} if text.strip():
            return Prompt(text, category, number)
    raise ValueError('no non-empty "turns", "messages" or "prompt"')

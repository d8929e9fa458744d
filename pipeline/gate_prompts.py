"""Prompts for measuring that has none of its own: a file's, or eight that are packaged."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..speculate.bundle import Bundle
from ..speculate.manifest import CHAT_TEMPLATE
from .prompts import Prompt, encode_prompts, pick_evenly, read_prompts
from .recipe_file import RECIPES
from .trial import LADDERS

DEFAULT_PROMPTS = RECIPES / "demo_prompts.jsonl"


def choose_prompts(
    bundles: Sequence[Bundle], prompts: Path | None, limit: int, max_new_tokens: int
) -> list[tuple[Prompt, list[int]]]:
    """Prompts that every bundle decodes, at most `limit`, with token ids. Raises BundleError for none."""
    chosen, _ = read_prompts(prompts or DEFAULT_PROMPTS)
    if prompts is None and not all(CHAT_TEMPLATE in bundle.manifest.files for bundle in bundles):
        chosen = [replace(prompt, content=_as_text(prompt)) for prompt in chosen]
    modes = [{"speculate": ladder} for ladder in LADDERS.values()]
    encoded: list[tuple[Prompt, list[int]]] = []
    for bundle in bundles:  # the first one's tokens are what the others have to decode
        encoded, _ = encode_prompts(bundle, chosen, modes, max_new_tokens=max_new_tokens)
        chosen = [replace(prompt, content=ids) for prompt, ids in encoded]
    return pick_evenly(encoded, limit)


def _as_text(prompt: Prompt) -> str:
    last = prompt.content[-1]
    return last["content"] if isinstance(last, dict) else str(prompt.content)

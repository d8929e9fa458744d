"""Prompts for measuring that has none of its own: a file's, or eight that are packaged."""

from collections.abc import Sequence
from pathlib import Path

from ..speculate.bundle import Bundle
from ..speculate.manifest import CHAT_TEMPLATE
from .prompts import Prompt, encode_prompts, pick_evenly, read_prompts
from .recipe_file import RECIPES

LADDERS = ({"speculate": "none"}, {"speculate": "auto"})
DEFAULT_PROMPTS = RECIPES / "demo_prompts.jsonl"


def read_ids(
    bundles: Sequence[Bundle], prompts: Path | None, limit: int, max_new_tokens: int
) -> list[list[int]]:
    """Token ids of prompts that every bundle decodes, at most `limit`. Raises BundleError for none."""
    chosen, _ = read_prompts(prompts or DEFAULT_PROMPTS)
    if prompts is None and not all(CHAT_TEMPLATE in bundle.manifest.files for bundle in bundles):
        chosen = [Prompt(_as_text(prompt), prompt.category, prompt.line) for prompt in chosen]
    ids: list[list[int]] = []
    for index, bundle in enumerate(bundles):
        if index:
            chosen = [Prompt(tokens, "", line) for line, tokens in enumerate(ids, 1)]
        encoded, _ = encode_prompts(bundle, chosen, LADDERS, max_new_tokens=max_new_tokens)
        ids = [tokens for _, tokens in encoded]
    return pick_evenly(ids, limit)


def _as_text(prompt: Prompt) -> str:
    last = prompt.content[-1]
    return last["content"] if isinstance(last, dict) else str(prompt.content)

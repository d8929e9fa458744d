"""What may be given as a prompt, and the token ids that it becomes."""

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, TypeGuard

from tokenizers import Tokenizer

from .chat import Messages, render_chat
from .errors import BundleError

Prompt = str | Sequence[int] | Messages


def load_tokenizer(path: Path) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more precise
        raise BundleError(f"{path} is not a tokenizer: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def is_chat(prompt: Prompt) -> TypeGuard[Messages]:
    return not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], Mapping)


def encode_text(tokenizer: Tokenizer, text: str, add_special_tokens: bool = True) -> list[int]:
    """Token ids of a text, special tokens in it recognised, with those that this tokenizer itself adds."""
    try:
        return tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
    except (TypeError, UnicodeError) as error:
        raise BundleError(f"the prompt cannot be tokenised: {error}") from error


def encode_chat(
    tokenizer: Tokenizer, template: str, messages: Messages, special_ids: Mapping[str, int | None]
) -> list[int]:
    """Token ids of a conversation; the template writes every special token that is wanted."""
    special_tokens = {
        name: token
        for name, token_id in special_ids.items()
        if token_id is not None and (token := tokenizer.id_to_token(token_id)) is not None
    }
    return encode_text(tokenizer, render_chat(template, messages, special_tokens), add_special_tokens=False)


def check_ids(token_ids: Iterable[Any], vocab_size: int, name: str = "the prompt") -> list[int]:
    """The ids as plain ints; refused if there are none or one is not of this vocabulary."""
    ids = list(token_ids)
    if not ids:
        raise BundleError(f"{name} has no tokens: wanted at least one (the tokenizer adds none by itself)")
    for i, token in enumerate(ids):
        if not isinstance(token, Integral) or isinstance(token, bool):
            raise BundleError(f"item {i} of {name} is {token!r:.80}: wanted a token id")
        if not 0 <= int(token) < vocab_size:
            raise BundleError(
                f"token id {token} at position {i} of {name}: this vocabulary ends at {vocab_size - 1}"
            )
    return list(map(int, ids))

"""How a model's texts begin and how their turns change: what sampling needs to let a model talk to itself."""

import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from .config import DecoderConfig
from .errors import ModelError

# Templates may ask for today's date, and calibration has to give the same tokens tomorrow.
DATE = datetime(2025, 1, 1)
TRAINING_TAG = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")  # marks answers in training; no part of Jinja
ROLES = ("user", "assistant", "user", "assistant")
MARKERS = ("firstrequest", "firstanswer", "secondrequest", "secondanswer")


@dataclass(frozen=True)
class Turns:
    """Token ids. A text is `opening`, what the model says until one of `ends`, ``changes[0]``, what it says,
    and so on round `changes`. Without an opening it begins with any token."""

    opening: tuple[int, ...]
    changes: tuple[tuple[int, ...], ...]
    ends: frozenset[int]


def read_turns(checkpoint: Path, config: DecoderConfig, tokenizer: Tokenizer) -> Turns:
    """Turns of a user and an assistant if the model has a chat template, else documents one after the other.

    Raises ModelError for a template that cannot be rendered."""
    template = checkpoint / "chat_template.jinja"
    if not template.exists():
        bos = () if config.bos_token_id is None else (config.bos_token_id,)
        changes = tuple(bos if (end,) == bos else (end, *bos) for end in config.eos_token_ids[:1])
        return Turns(bos, changes, frozenset(config.eos_token_ids))

    pieces = split_turns(template, config, tokenizer)
    opening, *changes = (tuple(tokenizer.encode(text, add_special_tokens=False).ids) for text in pieces)
    changes = [change for change in changes if change]
    # A turn may end in a special token that is not among the model's end tokens.
    special = {index for index, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    ends = special.intersection(change[0] for change in changes).union(config.eos_token_ids)
    return Turns(opening, tuple(changes), frozenset(ends))


def split_turns(template: Path, config: DecoderConfig, tokenizer: Tokenizer) -> list[str]:
    """What a chat has before the first request, between request and answer, between answer and request."""
    messages = [{"role": role, "content": text} for role, text in zip(ROLES, MARKERS, strict=True)]
    try:
        text = render(template.read_text(encoding="utf-8"), messages, config, tokenizer)
        pieces = []
        for marker in MARKERS[:3]:
            piece, text = text.split(marker)
            pieces.append(piece)
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        raise ModelError(
            f"{template} does not render a chat of two turns ({error}); "
            "give files in calibration.text instead of self"
        ) from None
    return pieces


def render(template: str, messages: list[dict[str, str]], config: DecoderConfig, tokenizer: Tokenizer) -> str:
    """In a sandbox, since a chat template is code that came with a model."""

    def refuse(message: str) -> NoReturn:
        raise TemplateError(message)

    def token(index: int | None) -> str:
        return (tokenizer.id_to_token(index) or "") if index is not None else ""

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    return environment.from_string(TRAINING_TAG.sub("", template)).render(
        messages=messages,
        bos_token=token(config.bos_token_id),
        eos_token=token(next(iter(config.eos_token_ids), None)),
        raise_exception=refuse,
        strftime_now=DATE.strftime,
    )

"""Chat templates, rendered as transformers renders them: sandboxed Jinja with the same few additions."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from .errors import BundleError

Messages = Sequence[Mapping[str, Any]]


def render_chat(template: str, messages: Messages, special_tokens: Mapping[str, str]) -> str:
    """The text of a conversation, with the header of the answer to come.

    special_tokens: what the template may name, such as ``bos_token``. The result holds special tokens as
    text; encode it without adding any.
    """
    from jinja2 import TemplateError

    _check_messages(messages)
    try:
        compiled = _environment().from_string(template)
        return compiled.render(
            messages=list(messages), tools=None, documents=None, add_generation_prompt=True, **special_tokens
        )
    except (TemplateError, TypeError) as error:  # such as content that is a list, where text is wanted
        raise BundleError(f"chat template: {error}") from error


def _check_messages(messages: Messages) -> None:
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise BundleError(f'message {i} of the prompt is {message!r}: wanted {{"role": …, "content": …}}')


def _environment() -> Any:
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}`` marks what the assistant says for training masks; here it only passes it
        on."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # Jinja's own filter escapes HTML, which a prompt must not.
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment

"""From tokens to text while they arrive: characters split over tokens, and stop strings."""

from collections.abc import Sequence

from tokenizers import Tokenizer

_CONTEXT_TOKENS = 8  # of the prompt: what a decoder looks at to tell a word's leading space


class TextStream:
    """Decodes tokens as they come. The pieces concatenate to the text of all tokens after the prompt's.

    A token may end in the middle of a UTF-8 sequence; the decoder shows that as U+FFFD at the end of the
    text, and the piece is held back until the character is whole.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._window = list(prompt[-_CONTEXT_TOKENS:])  # tokens still needed to decode what follows
        self._fresh = len(self._window)  # of which these were shown already
        self._shown = self._decode(self._window).rstrip(
            "\ufffd"
        )  # the output may complete the prompt's last character

    def push(self, token_ids: Sequence[int]) -> str:
        """Add tokens; the text that became certain by them."""
        self._window += token_ids
        text = self._decode(self._window)
        if text.endswith("\ufffd") or len(text) <= len(self._shown):
            return ""
        piece = text[len(self._shown) :]
        self._window = self._window[self._fresh :]
        self._fresh = len(self._window)
        self._shown = self._decode(self._window)
        return piece

    def flush(self) -> str:
        """The rest, with U+FFFD in place of a character that was never completed."""
        return self._decode(self._window)[len(self._shown) :]

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)


class StopStrings:
    """Lets text through until one of the stop strings appears; neither it nor what follows comes out.

    Text that may still turn out to be the beginning of a stop string is held back.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        if self.stopped:
            return ""
        self._held += text
        found = [at for at in map(self._held.find, self._stops) if at >= 0]
        if found:
            self.stopped = True
            return self._release(min(found))
        return self._release(len(self._held) - self._ambiguous())

    def flush(self) -> str:
        return "" if self.stopped else self._release(len(self._held))

    def _release(self, count: int) -> str:
        text, self._held = self._held[:count], self._held[count:]
        return text

    def _ambiguous(self) -> int:
        """Length of the longest end of the held text with which a stop string begins."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for count in range(min(longest, len(self._held)), 0, -1):
            end = self._held[-count:]
            if any(stop.startswith(end) for stop in self._stops):
                return count
        return 0

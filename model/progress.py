"""How long work tells how far it is."""

from collections.abc import Callable

Progress = Callable[[int, int, str], None]  # done, total, label


def no_progress(done: int, total: int, label: str) -> None:
    pass

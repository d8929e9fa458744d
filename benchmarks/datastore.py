"""A datastore of a given size: what building it takes, how soon it is open and how soon it answers.

The texts are made up, but are to a suffix array what language is: ids follow Zipf's law, each is followed by
few others most of the time, and every second paragraph was said before, with a word changed here and there.
Or one token for ever, the worst case for sorting.
"""

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Thread
from typing import Annotated

import numpy as np
import typer
from decode_once import read_status
from draftsmith.speculate.binding import check, ffi
from draftsmith.speculate.datastore import Datastore, write_datastore
from draftsmith.speculate.drafters import Drafter, Sources
from measure import print_table
from numpy.typing import NDArray

VOCAB = 49_152
WAYS = 32  # tokens that may follow one
SPEAKERS, PARAGRAPH = 512, 512  # texts that are made side by side; tokens
REMEMBERED = 4096  # paragraphs that may be said again
CONTEXT, DRAFT = 32, 16
OPENINGS = 25
MiB = 1 << 20


class Language:
    """Made-up text: paragraphs int32 [PARAGRAPH] of a chain of order 1, of which half were said before."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        grammar = np.random.default_rng(0)
        self.ways = _draw_zipf(grammar, (VOCAB, WAYS), VOCAB)
        self.said = np.empty((0, PARAGRAPH), np.int32)

    def say_paragraphs(self) -> NDArray[np.int32]:
        """int32 [SPEAKERS, PARAGRAPH]."""
        text = np.empty((SPEAKERS, PARAGRAPH), np.int32)
        text[:, 0] = _draw_zipf(self.rng, (SPEAKERS,), VOCAB)
        turns = _draw_zipf(self.rng, (PARAGRAPH, SPEAKERS), WAYS)
        for i in range(1, PARAGRAPH):
            text[:, i] = self.ways[text[:, i - 1], turns[i]]
        if len(self.said):
            again = self.rng.integers(len(self.said), size=SPEAKERS // 2)
            changed = self.rng.random((len(again), PARAGRAPH)) < 1 / 64
            text[::2] = np.where(changed, text[::2], self.said[again])
        self.said = np.concatenate([text[1::2], self.said])[:REMEMBERED]
        return text


def _draw_zipf(rng: np.random.Generator, shape: tuple[int, ...], n: int) -> NDArray[np.int32]:
    """Ids in [0, n) with chances as 1, 1/2, 1/3, ... (the continuous law of that shape, rounded down)."""
    return (np.power(n + 1.0, rng.random(shape)) - 1).astype(np.int32)


def say_language(num_tokens: int) -> Iterator[NDArray[np.int32]]:
    language, left = Language(1), num_tokens
    while left > 0:
        for text in language.say_paragraphs():
            yield text[: max(0, min(PARAGRAPH, left) - 1)]  # the end of a text is a token too
            left -= PARAGRAPH
            if left <= 0:
                return


def say_one_token(num_tokens: int) -> Iterator[NDArray[np.int32]]:
    """Texts of a million of it."""
    for first in range(0, num_tokens, MiB):
        yield np.full(min(MiB, num_tokens - first) - 1, 7, np.int32)


TEXTS: dict[str, Callable[[int], Iterator[NDArray[np.int32]]]] = {
    "language": say_language,
    "one token": say_one_token,
}


def main(
    size: Annotated[float, typer.Option(min=1e-4, help="of the file in GB; it holds 8 bytes a token")] = 1.0,
    folder: Annotated[Path | None, typer.Option(help="on disk; 1.5 times the size must be free")] = None,
    queries: Annotated[int, typer.Option(min=1)] = 10_000,
) -> None:
    """Print time and memory of building, and times of opening and of answers."""
    num_tokens = int(size * 1e9) // 8
    with TemporaryDirectory(dir=folder) as place:
        builds, openings, answers = [], [], []
        for name in TEXTS:
            path = Path(place) / f"{name}.rest"
            builds.append([name, *build(name, path, num_tokens)])
            openings.append([name, *time_opening(path)])
            contexts = read_contexts(path, queries) if name == "language" else repeat_token(queries)
            answers += [[name, kind, *times] for kind, times in time_answers(path, contexts)]
            path.unlink()
    print(f"{num_tokens} tokens\n")
    print_table(
        ["text", "file, MB", "build, s", "peak, MiB", "anonymous, MiB", "anonymous before, MiB"], builds
    )
    print(f"\nms to open, best and worst of {OPENINGS}\n")
    print_table(["text", "from disk", "from memory"], openings)
    print(f"\nus for an answer of {DRAFT} tokens\n")
    print_table(["text", "question", "answered", "median", "p99", "worst"], answers)


# ---- Building ----------------------------------------------------------------------------------------------


def build(name: str, path: Path, num_tokens: int) -> list[str]:
    """In a process of its own, whose memory is watched."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        seconds, before, anonymous, peak = process.submit(build_here, name, path, num_tokens).result()
    sizes = [f"{number / MiB:.0f}" for number in (peak, anonymous, before)]
    return [f"{path.stat().st_size / 1e6:.0f}", f"{seconds:.0f}", *sizes]


def build_here(name: str, path: Path, num_tokens: int) -> tuple[float, int, int, int]:
    """(seconds without those to make up the text, bytes of anonymous memory before and at most, all bytes at
    most: those include pages of the files, which the system may take back)."""
    spoken = 0.0

    def timed() -> Iterator[NDArray[np.int32]]:
        nonlocal spoken
        texts = TEXTS[name](num_tokens)
        while True:
            began = time.perf_counter()
            text = next(texts, None)
            spoken += time.perf_counter() - began
            if text is None:
                return
            yield text

    sizes, done = [read_status("RssAnon")], Event()

    def watch() -> None:
        while not done.wait(0.02):
            sizes.append(read_status("RssAnon"))

    watcher = Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    write_datastore(path, timed())
    seconds = time.perf_counter() - began - spoken
    done.set()
    watcher.join()
    return seconds, sizes[0], max(sizes), read_status("VmHWM")


# ---- Opening -----------------------------------------------------------------------------------------------


def drop_from_memory(path: Path) -> None:
    """What no process has mapped."""
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)


def read_into_memory(path: Path) -> None:
    with path.open("rb") as file:
        while file.read(MiB):
            pass


def time_opening(path: Path) -> list[str]:
    columns = []
    for prepare in (drop_from_memory, read_into_memory):
        times = []
        for _ in range(OPENINGS):
            prepare(path)
            began = time.perf_counter()
            Datastore(path, VOCAB)
            times.append(1e3 * (time.perf_counter() - began))
        columns.append(f"{min(times):.2f}-{max(times):.2f}")
    return columns


# ---- Answers -----------------------------------------------------------------------------------------------


def read_contexts(path: Path, count: int) -> dict[str, NDArray[np.int32]]:
    """Questions to a datastore of language, by kind: int32 [count, CONTEXT]."""
    rng = np.random.default_rng(2)
    header, num_tokens = 64, len(Datastore(path, VOCAB))
    tokens = np.memmap(path, np.int32, "r", header, (num_tokens,))
    stretch = np.arange(CONTEXT)
    quoted = tokens[rng.integers(num_tokens - CONTEXT, size=count)[:, None] + stretch]
    fresh = np.concatenate([Language(seed).say_paragraphs() for seed in range(3, 4 + count // SPEAKERS)])
    some = rng.integers(PARAGRAPH - CONTEXT, size=len(fresh))
    new = np.take_along_axis(fresh, some[:, None] + stretch, 1)[:count]
    common = quoted.copy()
    common[:, -2:] = [0, 0]  # the likeliest pair, in a place where nothing else matches
    common[:, :-2] = VOCAB - 1
    return {
        "quoted": quoted,
        "new text": new,
        "commonest pair": common,
        "no match": rng.integers(VOCAB - VOCAB // 8, VOCAB, size=(count, CONTEXT), dtype=np.int32),
    }


def repeat_token(count: int) -> dict[str, NDArray[np.int32]]:
    return {"the token": np.full((count, CONTEXT), 7, np.int32)}


def time_answers(path: Path, contexts: dict[str, NDArray[np.int32]]) -> Iterator[tuple[str, list[str]]]:
    """By kind and by where what is read lies: on disk, opened anew for each answer; in memory; and the same
    question once more."""
    for kind, rows in contexts.items():
        cold = []
        for row in rows[:OPENINGS]:
            drop_from_memory(path)
            cold += [ask(open_drafter(path), row)]
        yield f"{kind}, from disk", describe(cold)
        read_into_memory(path)
        drafter = open_drafter(path)
        twice = [(ask(drafter, row), ask(drafter, row)) for row in rows]
        yield f"{kind}, from memory", describe([first for first, _ in twice])
        yield f"{kind}, again", describe([second for _, second in twice])
        del drafter  # what is mapped cannot be dropped from memory


def open_drafter(path: Path) -> Drafter:
    return Sources(datastore=Datastore(path, VOCAB)).open("rest", VOCAB)


def ask(drafter: Drafter, context: NDArray[np.int32]) -> tuple[float, int]:
    """(microseconds, tokens drafted) of what the loop would call."""
    drafter.begin(CONTEXT)
    drafter.append(context.tolist())
    draft, support = ffi.new("int32_t[]", DRAFT), ffi.new("int32_t[]", DRAFT)
    call, handle = drafter.handle.draft, drafter.handle
    began = time.perf_counter_ns()
    count = call(handle, ffi.NULL, 0, DRAFT, draft, support)
    return (time.perf_counter_ns() - began) / 1e3, check(count)


def describe(answers: list[tuple[float, int]]) -> list[str]:
    times = [microseconds for microseconds, _ in answers]
    share = np.mean([count > 0 for _, count in answers])
    median, p99 = np.percentile(times, [50, 99])
    return [f"{share:.2f}", f"{median:.1f}", f"{p99:.1f}", f"{max(times):.1f}"]


if __name__ == "__main__":
    typer.run(main)

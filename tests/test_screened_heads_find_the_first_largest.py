"""A head with a screen computes few outputs exactly: which is the first largest never depends on it."""

import os
from itertools import pairwise
from pathlib import Path

import draftsmith
import numpy as np
import pytest
import torch
from draftsmith.export import packed
from draftsmith.export.packed import screen
from draftsmith.speculate import kernels
from draftsmith.speculate.binding import lib
from draftsmith.speculate.errors import BundleError
from peaks import find_peaks
from test_kernels_match_float64 import POOLS, each_pool, make_pools
from tiny_bundle import CONFIG, write_tiny_bundle

FORMATS = ("float32", "bfloat16")
SHAPES = [(1, 1), (7, 11), (16, 4), (53, 257), (113, 1031), (1000, 96)]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20261129)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of a bundle to be."""
    (tmp_path / "bundle").mkdir()
    return tmp_path / "bundle"


class Head:
    """A float linear of these weights, rounded to its format, and its screen."""

    def __init__(self, weight: np.ndarray, format: kernels.Format, errors: float = 1.0):
        stored = weight.astype(np.float32)
        if format == "bfloat16":
            bits = kernels.to_bfloat16(stored)
            stored = (bits.astype(np.uint32) << 16).view(np.float32)
        self.weight = stored
        self.linear = kernels.make_linear(bits if format == "bfloat16" else stored, format)
        self.copy, self.scale, self.error = screen(stored)
        self.screen = kernels.make_screen(self.copy, self.scale, self.error * np.float32(errors))

    def run(self, pool: kernels.Pool, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All outputs, those by the screen, and their peaks."""
        peaks = np.empty((len(x), -(-self.linear.n // lib.DS_PEAK_WIDTH)), np.float32)
        screened = kernels.linear_screened(pool, self.linear, self.screen, x, peaks)
        return kernels.linear(pool, self.linear, x), screened, peaks


def near_ties(rng: np.random.Generator, n: int, k: int) -> np.ndarray:
    """Weights whose outputs an int8 copy cannot tell apart: one row with noise below the copy's steps."""
    return rng.standard_normal(k) * (1 + 2e-3 * rng.standard_normal((n, k)))


def rows_of_all_kinds(rng: np.random.Generator, k: int) -> np.ndarray:
    """Of ordinary size; with a few large channels; all but zero, zero, tiny, huge."""
    x = rng.standard_normal((12, k)).astype(np.float32)
    x[1, :: max(1, k // 3)] *= 300
    x[2] *= 1e-9
    x[3] = 0
    x[4] *= np.float32(1e-30)
    x[5] *= np.float32(1e30)
    x[6, 1:] = 0
    return x


@each_pool
@pytest.mark.parametrize("format", FORMATS)
def test_the_first_largest_is_exact(pool, format, rng):
    for n, k in SHAPES:
        for weight in (rng.standard_normal((n, k)), near_ties(rng, n, k)):
            x = rows_of_all_kinds(rng, k)
            head = Head(weight, format)
            exact, screened, peaks = head.run(pool, x)
            best = exact.argmax(axis=1)
            np.testing.assert_array_equal(screened.argmax(axis=1), best, err_msg=f"{n}x{k}")
            row = np.arange(len(x))
            np.testing.assert_array_equal(
                screened[row, best].view(np.uint32), exact[row, best].view(np.uint32)
            )
            np.testing.assert_array_equal(peaks, find_peaks(screened))


@pytest.mark.parametrize("format", FORMATS)
def test_the_others_are_as_near_as_the_errors_say(format, rng):
    for n, k in SHAPES:
        head, x = Head(rng.standard_normal((n, k)), format), rows_of_all_kinds(rng, k)
        exact, screened, _ = head.run(POOLS[0], x)
        wanted = x.astype(np.float64) @ head.weight.T.astype(np.float64)
        room = np.linalg.norm(x.astype(np.float64), axis=1)[:, None] * head.error
        assert (np.abs(screened - wanted) <= room).all() and (np.abs(exact - wanted) <= room).all()


def test_a_screen_leaves_most_outputs_alone(rng):
    """Otherwise it would be exact for the wrong reason, and gain nothing."""
    head, x = (
        Head(rng.standard_normal((4800, 512)), "float32"),
        rng.standard_normal((8, 512)).astype(np.float32),
    )
    exact, screened, _ = head.run(POOLS[0], x)
    assert 0 < (exact == screened).mean() < 0.2


def test_without_its_errors_a_screen_is_wrong(rng):
    """So near ties are where the errors count."""
    head, x = Head(near_ties(rng, 1000, 96), "float32", errors=0.0), rng.standard_normal((32, 96))
    exact, screened, _ = head.run(POOLS[0], x.astype(np.float32))
    assert (exact.argmax(axis=1) != screened.argmax(axis=1)).any()


@pytest.mark.parametrize("format", FORMATS)
def test_of_equals_the_first_is_found(format, rng):
    weight = np.tile(rng.standard_normal((50, 64)), (20, 1))
    x = rng.standard_normal((9, 64)).astype(np.float32)
    exact, screened, _ = Head(weight, format).run(POOLS[0], x)
    assert (exact.argmax(axis=1) < 50).all()
    np.testing.assert_array_equal(screened.argmax(axis=1), exact.argmax(axis=1))


@each_pool
def test_rows_that_are_not_finite_are_computed_as_ever(pool, rng):
    x = rng.standard_normal((4, 96)).astype(np.float32)
    x[0, 5], x[1, 7], x[2, 9] = np.nan, np.inf, -np.inf
    exact, screened, _ = Head(rng.standard_normal((200, 96)), "float32").run(pool, x)
    np.testing.assert_array_equal(screened[:3], exact[:3])
    assert screened[3].argmax() == exact[3].argmax()


def test_a_row_does_not_depend_on_its_company(rng):
    """Nor on the threads or the instruction set, to the last bit."""
    x = rows_of_all_kinds(rng, 257)
    head = Head(rng.standard_normal((1000, 257)), "bfloat16")
    _, wanted, _ = head.run(POOLS[0], np.tile(x, (3, 1)))
    for pool in POOLS + make_pools(num_threads=3):
        _, together, _ = head.run(pool, x)
        np.testing.assert_array_equal(together, wanted[: len(x)], err_msg=pool.isa)
        for i in range(len(x)):
            np.testing.assert_array_equal(head.run(pool, x[i : i + 1])[1][0], wanted[i], err_msg=pool.isa)


def test_what_does_not_fit_is_refused(rng):
    pool, x = POOLS[0], np.zeros((1, 8), np.float32)
    head, other = Head(rng.standard_normal((20, 8)), "float32"), Head(rng.standard_normal((21, 8)), "float32")
    with pytest.raises(BundleError, match="a screen of 21 outputs"):
        kernels.linear_screened(pool, head.linear, other.screen, x)
    biased = kernels.make_linear(head.weight, "float32", bias=np.ones(20))
    with pytest.raises(BundleError, match="no bias"):
        kernels.linear_screened(pool, biased, head.screen, x)


def test_weights_are_copied_to_within_their_errors(rng):
    weight = rng.standard_normal((300, 100)).astype(np.float32)
    weight[7] = 0
    copy, scale, error = screen(weight)
    off = np.linalg.norm(weight - copy.astype(np.float64) * scale[:, None], axis=1)
    assert (off < error).all() and np.abs(copy).max() == 127 and (error < 0.2).all()


def test_greedy_decoding_says_what_all_logits_do(folder):
    """Of a bundle with such a head, which the graph of its target names."""
    torch.manual_seed(5)
    write_tiny_bundle(folder)
    assert b"screen_error" in (folder / "target/cpu.onnx").read_bytes()
    bundle = draftsmith.load(folder)
    for seed in range(6):
        prompt = list(np.random.default_rng(seed).integers(3, 200, 9))
        out = bundle.generate([int(i) for i in prompt], max_new_tokens=40, speculate="none", ignore_eos=True)
        tokens = [int(i) for i in prompt] + list(out.token_ids)
        logits = bundle.logits(tokens[:-1])[len(prompt) - 1 :]
        assert list(logits.argmax(axis=1)) == list(out.token_ids)


def test_a_head_whose_logits_are_capped_has_none(folder):
    """The first largest of what float tanh makes of them may be another: it makes equals of large ones."""
    write_tiny_bundle(folder, CONFIG.model_copy(update={"logit_softcap": 20.0}))
    assert b"screen" not in (folder / "target/cpu.onnx").read_bytes()


@pytest.mark.parametrize("spoil", [np.nan, -1.0])
def test_errors_that_can_be_no_bound_are_refused(folder, monkeypatch, spoil):
    def screen_wrongly(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        copy, scale, error = screen(weight)
        error[5] = spoil
        return copy, scale, error

    monkeypatch.setattr(packed, "screen", screen_wrongly)
    write_tiny_bundle(folder)
    with pytest.raises(BundleError, match="no bound can be made"):
        draftsmith.load(folder).generate([5, 6, 7], max_new_tokens=4, speculate="none")


def test_a_process_lets_go_of_what_it_read_of_a_head(folder):
    """Each token reads a few blocks of outputs that may be its largest; the system maps more around them."""
    if not gives_huge_pages():
        pytest.skip("no huge pages here: all weights are read from the file")
    wide = {"vocab_size": 24000, "hidden_size": 256}
    write_tiny_bundle(folder, CONFIG.model_copy(update=wide))
    bundle = draftsmith.load(folder, threads=1)
    run = bundle.stream([5, 6, 7], max_new_tokens=200, speculate="none", ignore_eos=True)
    sizes = [resident(folder / "target/cpu.data") for _ in run]
    assert any(later < size / 2 for size, later in pairwise(sizes[1:]))


def gives_huge_pages() -> bool:
    words = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    given = words.is_file() and "[never]" not in words.read_text()
    return given and os.environ.get("DRAFTSMITH_HUGE_PAGES") != "0"


def resident(file: Path) -> int:
    """Bytes of a file that this process has."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *rest = line.split()
        if not name.endswith(":"):
            inside = rest[-1] == str(file)
        elif inside and name == "Rss:":
            total += int(rest[0]) << 10
    return total

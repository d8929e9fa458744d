"""A row's result depends, bit for bit, on that row alone: not on its company, its slots, the threads or the
instruction set."""

import math
import threading

import numpy as np
import pytest
from draftsmith.speculate import kernels
from draftsmith.speculate.errors import BundleError

FORMATS = ("float32", "bfloat16", "int8", "int8_bitmask", "int8_2_4", "int4")


def make_pools() -> list[kernels.Pool]:
    """The best kernels with 1, 2 and 3 threads, then every other set with 2."""
    pools = [kernels.Pool(count) for count in (1, 2, 3)]
    for isa in kernels.ISAS:
        try:
            pools.append(kernels.Pool(2, isa))
        except BundleError:
            continue
    return pools


POOLS = make_pools()


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(11)


def make_weight(rng: np.random.Generator, n: int, k: int, format: str, **options) -> kernels.Linear:
    weight = rng.standard_normal((n, k), dtype=np.float32) / np.float32(math.sqrt(k))
    if format == "float32":
        return kernels.make_linear(weight, format, **options)
    if format == "bfloat16":
        return kernels.make_linear(kernels.to_bfloat16(weight), format, **options)
    if format == "int4":
        grid = rng.uniform(-0.2, 0.2, (n, -(-k // 32), 2)).astype(np.float32)
        drawn = rng.integers(0, 16, (n, k)).astype(np.uint8)
        return kernels.make_linear(drawn, format, grid=kernels.to_bfloat16(grid), **options)
    scale = np.abs(weight).max(axis=1) / np.float32(127)
    q = np.clip(np.rint(weight / scale[:, None]), -127, 127).astype(np.int8)
    if format != "int8":
        q.reshape(n, -1, 4)[:, :, rng.permutation(4)[:2]] = 0
    return kernels.make_linear(q, format, scale, **options)


def apply(pool: kernels.Pool, weight: kernels.Linear, x: np.ndarray, *args) -> np.ndarray:
    return kernels.linear(pool, weight, kernels.quantize_rows(pool, x) if weight.is_quantized else x, *args)


@pytest.mark.parametrize("format", FORMATS)
def test_linears(format, rng):
    for n, k in ((33, 72), (200, 300), (7, 1032)):
        weight = make_weight(rng, n, k, format, bias=rng.standard_normal(n), activation="gelu")
        x = rng.standard_normal((33, k), dtype=np.float32)
        residual = rng.standard_normal((33, n), dtype=np.float32)
        expected = np.concatenate(
            [apply(POOLS[0], weight, x[i : i + 1], residual[i : i + 1]) for i in range(33)]
        )
        for pool in POOLS:
            for num_rows in range(1, 34):
                chosen = rng.integers(0, 33, num_rows)  # any subset, in any order, with repeats
                y = apply(pool, weight, x[chosen], residual[chosen])
                np.testing.assert_array_equal(
                    y, expected[chosen], err_msg=f"{pool.isa} {n}x{k}, {num_rows} rows"
                )


def test_norms_and_quantization(rng):
    x = rng.standard_normal((33, 301), dtype=np.float32)
    weight, bias = rng.standard_normal((2, 301), dtype=np.float32)
    for norm in ("rms", "layer"):
        expected = kernels.norm_rows(POOLS[0], x, weight, bias, norm=norm)
        for pool in POOLS:
            for num_rows in (1, 2, 5, 32, 33):
                chosen = rng.integers(0, 33, num_rows)
                for whole, part in zip(
                    expected, kernels.norm_rows(pool, x[chosen], weight, bias, norm=norm), strict=True
                ):
                    np.testing.assert_array_equal(part, whole[chosen])


def make_heads(shape: tuple[int, int, int], slots: int, dtype: str) -> kernels.Heads:
    """For a cache of at least so many slots."""
    slots += -slots % kernels.PANEL_SLOTS if dtype == "bfloat16" else 0
    return kernels.Heads(*shape, slots, 0.125, cache_dtype=dtype)


def lay_out(heads: kernels.Heads, cache: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values [2, kv heads, slots, channels] as attention reads them, with others behind them."""
    more = np.full((*cache.shape[:2], heads.max_slots - cache.shape[2], cache.shape[3]), 3.0, np.float32)
    return kernels.lay_out(*np.concatenate([cache, more], axis=2), dtype)


def pad(heads: kernels.Heads, mask: np.ndarray) -> np.ndarray:
    """Of which nobody sees anything."""
    return np.pad(mask, ((0, 0), (0, heads.max_slots - mask.shape[1])))


def each_cache(*shapes: tuple[int, int, int]) -> pytest.MarkDecorator:
    """By shape and dtype; a bfloat16 cache wants heads of a multiple of 16 channels."""
    fit = [shape for shape in shapes if shape[2] % kernels.PANEL_SLOTS == 0]
    cases = [*((shape, "float32") for shape in shapes), *((shape, "bfloat16") for shape in fit)]
    return pytest.mark.parametrize(("shape", "dtype"), cases, ids=str)


@each_cache((9, 3, 64), (4, 1, 80), (2, 2, 7), (16, 2, 128))
def test_attention_sees_a_path_and_not_its_slots(shape, dtype, rng):
    """The same path, laid out over other slots of a larger cache, beside rows that see something else."""
    num_heads, num_kv_heads, size = shape
    for length in (1, 2, 63, 64, 65, 150):
        path = rng.standard_normal((2, num_kv_heads, length, size), dtype=np.float32)
        row = rng.standard_normal((1, (num_heads + 2 * num_kv_heads) * size), dtype=np.float32)
        exact = make_heads(shape, length, dtype)
        mask = pad(exact, np.ones((1, length), bool))
        expected = kernels.attend(
            POOLS[0], exact, row, *kernels.list_slots(mask), *lay_out(exact, path, dtype)
        )
        for pool in POOLS:
            num_rows, max_slots = int(rng.integers(1, 33)), length + int(rng.integers(0, 90))
            heads = make_heads(shape, max_slots, dtype)
            cache = rng.standard_normal((2, num_kv_heads, max_slots, size), dtype=np.float32)
            slots = np.sort(rng.permutation(max_slots)[:length])
            cache[:, :, slots] = path
            rows = rng.standard_normal((num_rows, row.shape[1]), dtype=np.float32)
            mask = rng.random((num_rows, max_slots)) < rng.random()
            mine = rng.random(num_rows) < 0.5
            mine[rng.integers(num_rows)] = True
            rows[mine], mask[mine] = row, False
            mask[np.ix_(mine, slots)] = True
            seen = kernels.list_slots(pad(heads, mask))
            out = kernels.attend(pool, heads, rows, *seen, *lay_out(heads, cache, dtype))
            np.testing.assert_array_equal(out[mine], np.broadcast_to(expected, out[mine].shape))


@each_cache((9, 3, 64), (4, 1, 80), (2, 2, 7), (16, 2, 128))
def test_attention_in_a_chain_takes_nothing_of_later_slots(shape, dtype, rng):
    """Each row sees one slot more than the row before it. Rows share what they have in common; NaN and
    infinity behind the last slot of a row leave it as it is."""
    num_heads, num_kv_heads, size = shape
    for start, num_rows in ((0, 9), (1, 8), (60, 8), (64, 16), (127, 5), (130, 32)):
        heads = make_heads(shape, start + num_rows, dtype)
        cache = rng.standard_normal((2, num_kv_heads, start + num_rows, size), dtype=np.float32)
        rows = rng.standard_normal((num_rows, (num_heads + 2 * num_kv_heads) * size), dtype=np.float32)
        mask = pad(heads, np.tri(num_rows, start + num_rows, start, dtype=bool))
        slots, counts = kernels.list_slots(mask)
        last = rng.integers(num_rows)
        poisoned = cache.copy()
        later = poisoned[:, :, start + last + 1 :]
        later[:] = rng.choice([np.nan, np.inf, -np.inf], later.shape)
        laid, beside = lay_out(heads, cache, dtype), lay_out(heads, poisoned, dtype)
        each = [slice(row, row + 1) for row in range(num_rows)]
        alone = [kernels.attend(POOLS[0], heads, rows[one], slots[one], counts[one], *laid) for one in each]
        for pool in POOLS:
            out = kernels.attend(pool, heads, rows, slots, counts, *laid)
            np.testing.assert_array_equal(out, np.concatenate(alone))
            out = kernels.attend(pool, heads, rows, slots, counts, *beside)
            np.testing.assert_array_equal(out[: last + 1], np.concatenate(alone)[: last + 1])


@each_cache((9, 3, 64), (2, 1, 40), (8, 4, 32))
def test_long_attention_parted_over_threads(shape, dtype, rng):
    """More threads than key heads share out the blocks of a row; one thread does all of them in order."""
    num_heads, num_kv_heads, size = shape
    for length in (65, 300, 1500):
        heads = make_heads(shape, length, dtype)
        cache = lay_out(heads, rng.standard_normal((2, num_kv_heads, length, size), dtype=np.float32), dtype)
        for num_rows in (1, 2, 3):
            rows = rng.standard_normal((num_rows, (num_heads + 2 * num_kv_heads) * size), dtype=np.float32)
            mask = np.arange(length) < length - rng.integers(0, min(length, 200), (num_rows, 1))
            seen = kernels.list_slots(pad(heads, mask))
            expected = kernels.attend(POOLS[0], heads, rows, *seen, *cache)
            for pool in (*POOLS, kernels.Pool(8)):
                out = kernels.attend(pool, heads, rows, *seen, *cache)
                np.testing.assert_array_equal(out, expected)


# ---- A whole decoder ---------------------------------------------------------------------------------------


class TinyDecoder:
    """Two Llama layers made of the kernels, with their caches."""

    hidden, num_heads, num_kv_heads, size, inner, vocab, slots = 72, 6, 2, 16, 100, 61, 96

    def __init__(self, format: str, pool: kernels.Pool, cache_dtype: kernels.CacheDtype):
        rng = np.random.default_rng(5)
        self.pool = pool
        unwritten = np.full((2, self.num_kv_heads, self.slots, self.size), np.nan, np.float32)
        angles = np.arange(self.slots)[:, None] * 0.3 ** np.arange(self.size // 2)
        self.heads = kernels.Heads(
            self.num_heads, self.num_kv_heads, self.size, self.slots, 1 / math.sqrt(self.size),
            np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32), cache_dtype=cache_dtype,
        )  # fmt: skip
        self.embed = rng.standard_normal((self.vocab, self.hidden), dtype=np.float32)
        wide = (self.num_heads + 2 * self.num_kv_heads) * self.size
        inner = self.inner + -self.inner % 16
        self.layers = []
        for _ in range(2):
            self.layers.append(
                {
                    "norms": rng.uniform(0.5, 2, (2, self.hidden)).astype(np.float32),
                    "qkv": make_weight(rng, wide, self.hidden, format),
                    "o": make_weight(rng, self.hidden, self.num_heads * self.size, format),
                    "gate_up": make_weight(
                        rng, 2 * inner, self.hidden, format, activation="silu", gated_outputs=self.inner
                    ),
                    "down": make_weight(rng, self.hidden, self.inner, format),
                    "cache": kernels.lay_out(*unwritten, cache_dtype),
                }
            )
        self.head = make_weight(rng, self.vocab, self.hidden, format)

    def _norm(self, x, weight, linear):
        y, rows = kernels.norm_rows(self.pool, x, weight)
        return rows if linear.is_quantized else y

    def forward(self, tokens, positions, first_slot: int, mask) -> np.ndarray:
        x = self.embed[tokens]
        slots = kernels.list_slots(mask)
        for layer in self.layers:
            qkv = kernels.linear(
                self.pool, layer["qkv"], self._norm(x, layer["norms"][0], layer["qkv"]), next=layer["o"]
            )
            kernels.write_heads(
                self.pool, self.heads, qkv, np.asarray(positions, np.int64), first_slot, *layer["cache"]
            )
            mixed = kernels.attend(self.pool, self.heads, qkv, *slots, *layer["cache"])
            x = apply(self.pool, layer["o"], mixed, x)
            inner = kernels.linear(
                self.pool, layer["gate_up"], self._norm(x, layer["norms"][1], layer["gate_up"])
            )
            x = apply(self.pool, layer["down"], inner, x)
        return apply(self.pool, self.head, x)

    def forward_chain(self, tokens, start: int) -> np.ndarray:
        positions = start + np.arange(len(tokens))
        return self.forward(tokens, positions, start, np.arange(self.slots) <= positions[:, None])

    def keep(self, path, first_slot: int) -> None:
        for layer in self.layers:
            kernels.keep_path(self.heads, np.asarray(path, np.int32), first_slot, *layer["cache"])


def grow_tree(rng: np.random.Generator, num_nodes: int) -> np.ndarray:
    """Parents, each before its children; -1 for the root's children."""
    return np.array([rng.integers(-1, i) if i else -1 for i in range(num_nodes)])


def trace_path(parents: np.ndarray, node: int) -> list[int]:
    path = []
    while node >= 0:
        path.append(node)
        node = parents[node]
    return path[::-1]


@pytest.mark.parametrize("cache_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("format", FORMATS)
def test_logits_are_those_of_one_token_at_a_time(format, cache_dtype, rng):
    def decode_singly(tokens) -> np.ndarray:
        decoder = TinyDecoder(format, POOLS[0], cache_dtype)
        return np.concatenate([decoder.forward_chain(tokens[i : i + 1], i) for i in range(len(tokens))])

    tokens = rng.integers(0, TinyDecoder.vocab, 70)
    expected = decode_singly(tokens)
    assert np.isfinite(expected).all()
    for pool in POOLS:
        # A prefill in chunks of any size.
        decoder, done = TinyDecoder(format, pool, cache_dtype), 0
        while done < len(tokens):
            size = int(rng.integers(1, 40))
            logits = decoder.forward_chain(tokens[done : done + size], done)
            np.testing.assert_array_equal(
                logits, expected[done : done + size], err_msg=f"{pool.isa} at {done}"
            )
            done += size
        # Roll back, decode something else, roll back again, and go on as if nothing had been.
        decoder.forward_chain(rng.integers(0, TinyDecoder.vocab, 30), 40)
        np.testing.assert_array_equal(decoder.forward_chain(tokens[40:70], 40), expected[40:70])

        # A random tree: a node's logits are those of its path as a plain sequence; its longest path is kept.
        start, num_nodes = 40, int(rng.integers(2, 33))
        parents, drafted = grow_tree(rng, num_nodes), rng.integers(0, TinyDecoder.vocab, num_nodes)
        paths = [trace_path(parents, node) for node in range(num_nodes)]
        mask = np.zeros((num_nodes, TinyDecoder.slots), bool)
        mask[:, :start] = True
        for node, path in enumerate(paths):
            mask[node, start + np.array(path)] = True
        positions = start - 1 + np.array([len(path) for path in paths])
        logits = decoder.forward(drafted, positions, start, mask)
        longest = max(paths, key=len)
        checked = {longest[-1], int(rng.integers(num_nodes))}
        for node in checked:
            plain = decode_singly(np.concatenate([tokens[:start], drafted[paths[node]]]))
            np.testing.assert_array_equal(
                logits[paths[node]], plain[start:], err_msg=f"{pool.isa}, node {node}"
            )
        decoder.keep(start + np.array(longest), start)
        after = start + len(longest)
        more = rng.integers(0, TinyDecoder.vocab, 5)
        plain = decode_singly(np.concatenate([tokens[:start], drafted[longest], more]))
        np.testing.assert_array_equal(decoder.forward_chain(more, after), plain[after:])


def test_a_pool_may_be_shared_by_threads(rng):
    """Calls from several threads run one after another, and each gets its own result."""
    pool = kernels.Pool(2)
    weight = make_weight(rng, 200, 96, "int8")
    inputs = rng.standard_normal((4, 5, 96), dtype=np.float32)
    expected = [apply(POOLS[0], weight, x) for x in inputs]
    wrong = []

    def work(index: int) -> None:
        for _ in range(200):
            if not np.array_equal(apply(pool, weight, inputs[index]), expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_arithmetic_is_ieee_whatever_mode_the_caller_is_in(rng):
    """Subnormals are kept though the calling thread flushes them to zero, as some frameworks make it."""
    torch = pytest.importorskip("torch")
    weight = kernels.make_linear(np.full((40, 1), 0.5, np.float32), "float32")
    x = np.full((2, 1), 1e-39, np.float32)
    expected = kernels.linear(kernels.Pool(1), weight, x)
    assert expected.all()
    if not torch.set_flush_denormal(True):
        pytest.skip("this machine cannot flush subnormals")
    try:
        results = [kernels.linear(kernels.Pool(count), weight, x).copy() for count in (1, 2)]
    finally:
        torch.set_flush_denormal(False)
    for y in results:
        np.testing.assert_array_equal(y, expected)

"""Every kernel, on every instruction set that this machine runs, against plain numpy: bit for bit where the
law is one of exact sums and single roundings, elsewhere within the rounding error of its order of
summation."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from draftsmith.speculate import kernels
from draftsmith.speculate.binding import ffi, lib
from draftsmith.speculate.errors import BundleError
from peaks import find_peaks

SHAPES = [
    (1, 1),
    (2, 3),
    (3, 5),
    (5, 2),
    (7, 11),
    (16, 4),
    (17, 64),
    (37, 129),
    (48, 256),
    (53, 257),
    (97, 576),
    (113, 1031),
]
ROWS = (1, 2, 3, 5, 7, 8, 9, 13, 16, 31, 32, 33)


def make_pools(num_threads: int = 1) -> list[kernels.Pool]:
    pools = []
    for isa in kernels.ISAS:
        try:
            pools.append(kernels.Pool(num_threads, isa))
        except BundleError:
            continue
    return pools


POOLS = make_pools()
each_pool = pytest.mark.parametrize("pool", POOLS, ids=lambda pool: pool.isa)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20240607)


def quantize_by_law(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scale = np.abs(x).max(axis=1) / np.float32(127)
    scale[scale == 0] = 1
    return np.clip(np.rint(x / scale[:, None]), -127, 127).astype(np.int8), scale


def multiply_by_law(q, row_scale, weight, scale, bias, residual):
    sums = (q.astype(np.int64) @ weight.T.astype(np.int64)).astype(np.float32)
    return sums * (row_scale[:, None] * scale) + bias + residual


def prune(rng: np.random.Generator, weight: np.ndarray, format: str) -> np.ndarray:
    """A copy with the zeros that the format is for: two of each four, or an arbitrary part."""
    weight = weight.copy()
    n, k = weight.shape
    if format == "int8_2_4":
        groups = np.pad(weight, ((0, 0), (0, -k % 4))).reshape(n, -1, 4)
        np.put_along_axis(groups, np.argsort(rng.random(groups.shape), axis=-1)[..., :2], 0, axis=-1)
        weight = np.ascontiguousarray(groups.reshape(n, -1)[:, :k])
    if format == "int8_bitmask":
        weight[rng.random((n, k)) < rng.choice([0, 0.5, 0.7, 1])] = 0
    return weight


def test_the_machine_runs_more_than_the_portable_kernels_or_is_not_x86():
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text() if cpuinfo.exists() else ""
    assert len(POOLS) > 1 or " avx2 " not in flags
    if "amx_int8" in flags and "avx512_bf16" in flags:  # the best of them, where the kernel lets us
        assert kernels.Pool().isa in ("amx_int8", "avx512_bf16")
    elif "avx512_bf16" in flags and "avx512_vbmi2" in flags:
        assert kernels.Pool().isa == "avx512_bf16"
    elif "avx512_vbmi2" in flags and "avx512_vnni" in flags:
        assert kernels.Pool().isa == "avx512_vbmi2"
    elif "avx512_vnni" in flags:
        assert kernels.Pool().isa == "avx512_vnni"


# ---- int8 --------------------------------------------------------------------------------------------------


@each_pool
def test_rows_are_quantized_as_the_law_says(pool, rng):
    for k in (1, 2, 3, 5, 7, 15, 16, 17, 55, 56, 57, 120, 121, 576, 1031):
        x = rng.standard_normal((9, k), dtype=np.float32)
        x[1] = 0
        x[2] *= np.float32(1e-42)  # subnormal; the scale, 127 times less, may round to zero
        x[3] *= np.float32(3e37)
        x[4] = np.float32(-1e-45)
        x[5] = 0.5 * np.sign(x[5])  # ties, if 127 of them make the scale
        x[6] = np.arange(k, dtype=np.float32) * 0.5
        x[7] = -np.abs(x[7])
        rows = kernels.quantize_rows(pool, x)
        q, scale, sums = kernels.split_rows(rows, k)
        expected_q, expected_scale = quantize_by_law(x)
        np.testing.assert_array_equal(scale, expected_scale)
        np.testing.assert_array_equal(q, expected_q)
        np.testing.assert_array_equal(sums, expected_q.sum(axis=1, dtype=np.int32))
        groups = -(-k // 32)
        assert not rows[:, k : -8 - 4 * groups].any() and rows.shape[1] >= 36 * groups + 8
        padded = np.pad(expected_q, ((0, 0), (0, -k % 32))).reshape(len(x), groups, 32)
        group_sums = rows[:, -8 - 4 * groups : -8].copy().view(np.float32)
        np.testing.assert_array_equal(group_sums, padded.sum(axis=-1, dtype=np.int32))


@each_pool
def test_a_static_scale_clamps_and_rounds_ties_to_even(pool):
    x = np.array([[0.25, 0.75, 1.25, -0.25, -0.75, 63.4, 63.5, 64, 1e30, -1e30, 0, -0.0]], np.float32)
    q, scale, _ = kernels.split_rows(kernels.quantize_rows(pool, x, 0.5), x.shape[1])
    assert scale[0] == 0.5
    assert q.tolist() == [[0, 2, 2, 0, -2, 127, 127, 127, 127, -127, 0, 0]]


@each_pool
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_visible(pool, bad):
    x = np.ones((3, 40), np.float32)
    x[1, 17] = bad
    weight = kernels.make_linear(np.ones((20, 40), np.int8), "int8", np.ones(20))
    y = kernels.linear(pool, weight, kernels.quantize_rows(pool, x))
    assert not np.isfinite(y[1]).any() and np.isfinite(y[[0, 2]]).all()


@each_pool
@pytest.mark.parametrize("format", ["int8", "int8_bitmask", "int8_2_4"])
def test_int8_linears_give_the_bits_of_the_law(pool, format, rng):
    for n, k in SHAPES:
        weight = prune(rng, rng.integers(-127, 128, (n, k)).astype(np.int8), format)
        scale, bias = rng.random(n, np.float32), rng.standard_normal(n, np.float32)
        packed = kernels.make_linear(weight, format, scale, bias)
        for num_rows in ROWS if pool.isa != "portable" else (1, 3, 8):
            x = rng.standard_normal((num_rows, k), dtype=np.float32)
            residual = rng.standard_normal((num_rows, n), dtype=np.float32)
            y = kernels.linear(pool, packed, kernels.quantize_rows(pool, x), residual)
            expected = multiply_by_law(*quantize_by_law(x), weight, scale, bias, residual)
            np.testing.assert_array_equal(y, expected, err_msg=f"{n}x{k}, {num_rows} rows")


@each_pool
@pytest.mark.parametrize("format", ["int8", "int8_bitmask"])
def test_int8_sums_do_not_saturate(pool, format):
    """The largest products of one sign, where 16-bit pairs overflow and the longest sums come near 2^31."""
    for k in (2, 64, 1024, 65536):
        weight = np.full((3, k), 127, np.int8)
        weight[1], weight[2, ::2] = -127, -127
        x = np.ones((2, k), np.float32)
        x[1, 1::2] = -1
        packed = kernels.make_linear(weight, format, np.ones(3))
        y = kernels.linear(pool, packed, kernels.quantize_rows(pool, x))
        ones = np.float32(1) / np.float32(127)
        exact = np.array([[k, -k, 0], [0, 0, -k]]) * 127.0 * 127.0
        np.testing.assert_array_equal(y, exact.astype(np.float32) * ones)


# ---- Peaks -------------------------------------------------------------------------------------------------


@each_pool
@pytest.mark.parametrize("format", ["float32", "bfloat16", "int8", "int8_bitmask", "int8_2_4", "int4"])
def test_peaks_are_the_largest_of_their_outputs(pool, format, rng):
    """Below zero too, where what pads the last block would be the largest; NaN is none."""
    for n, k in [(1, 7), (16, 64), (48, 32), (49, 32), (95, 40), (113, 1031)]:
        grid = None
        if format == "int4":
            weight, grid = draw_int4(rng, n, k)
        elif format in ("float32", "bfloat16"):
            weight = rng.standard_normal((n, k), dtype=np.float32)
            weight = kernels.to_bfloat16(weight) if format == "bfloat16" else weight
        else:
            weight = prune(rng, rng.integers(-127, 128, (n, k)).astype(np.int8), format)
        scale = rng.random(n, np.float32) if format.startswith("int8") else None
        bias = rng.standard_normal(n, np.float32)
        bias[rng.random(n) < 0.1] = np.nan
        for offset in (0, -1e6):
            packed = kernels.make_linear(weight, format, scale, bias + np.float32(offset), grid=grid)
            for num_rows in ROWS if pool.isa != "portable" else (1, 3, 8):
                x = rng.standard_normal((num_rows, k), dtype=np.float32)
                rows = kernels.quantize_rows(pool, x) if packed.is_quantized else x
                peaks = np.empty((num_rows, -(-n // lib.DS_PEAK_WIDTH)), np.float32)
                y = kernels.linear(pool, packed, rows, peaks=peaks)
                np.testing.assert_array_equal(peaks, find_peaks(y), err_msg=f"{n}x{k}, {num_rows} rows")


@pytest.mark.parametrize("num_threads", [1, 2])
def test_peaks_are_of_what_a_linear_gives_in_the_end(rng, num_threads):
    """Behind gate and residual; in whichever thread."""
    for pool in make_pools(num_threads):
        for n, k in [(40, 16), (48, 64), (211, 96)]:
            weight = rng.standard_normal((2 * n, k), dtype=np.float32)
            packed = kernels.make_linear(
                kernels.interleave(weight[:n], weight[n:]), "float32", activation="silu", gated_outputs=n
            )
            x, residual = (rng.standard_normal((9, size), dtype=np.float32) for size in (k, n))
            peaks = np.empty((9, -(-n // lib.DS_PEAK_WIDTH)), np.float32)
            y = kernels.linear(pool, packed, x, residual, peaks=peaks)
            np.testing.assert_array_equal(peaks, find_peaks(y))


# ---- int4 --------------------------------------------------------------------------------------------------


def draw_int4(rng: np.random.Generator, n: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights uint8 [n, k] and the bits of their grids, [n, ceil(k / 32), 2]."""
    grid = rng.standard_normal((n, -(-k // 32), 2), dtype=np.float32) * [0.01, 0.1]
    return rng.integers(0, 16, (n, k)).astype(np.uint8), kernels.to_bfloat16(grid)


@each_pool
def test_int4_linears_follow_their_law(pool, rng):
    """The chain of each row is emulated in float64, where step · sum is exact, and rounded after each step:
    right but for double rounding. In another order most bits would differ."""
    for n, k in [*SHAPES, (5, 32), (33, 31), (17, 120), (49, 1544)]:
        weight, bits = draw_int4(rng, n, k)
        grid, bias = widen(bits).astype(np.float64), rng.standard_normal(n, np.float32)
        packed = kernels.make_linear(weight, "int4", bias=bias, grid=bits)
        values = weight * np.repeat(grid[..., 0], 32, 1)[:, :k] + np.repeat(grid[..., 1], 32, 1)[:, :k]
        for num_rows in ROWS if pool.isa != "portable" else (1, 3, 8):
            x = rng.standard_normal((num_rows, k), dtype=np.float32)
            x[0] = 0 if num_rows > 2 else x[0]
            residual = rng.standard_normal((num_rows, n), dtype=np.float32)
            y = kernels.linear(pool, packed, kernels.quantize_rows(pool, x), residual)

            q, scale = quantize_by_law(x)
            q, scale = q.astype(np.float64), scale[:, None]
            exact = (q @ values.T) * scale + bias + residual
            magnitude = (np.abs(q) @ np.abs(values).T + 15 * np.abs(q).sum(1)[:, None]) * scale
            bound = (2 * grid.shape[1] + 4) * 2.0**-24 * (magnitude + np.abs(bias) + np.abs(residual))
            assert (np.abs(y - exact) <= bound).all(), (n, k, num_rows)
            chain = np.zeros((num_rows, n), np.float32)
            for group in range(grid.shape[1]):
                part = slice(32 * group, 32 * group + 32)
                sums = q[:, part] @ weight[:, part].T.astype(np.float64)
                chain = (grid[:, group, 0] * sums + chain).astype(np.float32)
                chain = (grid[:, group, 1] * q[:, part].sum(1)[:, None] + chain).astype(np.float32)
            assert (y == chain * scale + bias + residual).mean() > 0.99, (n, k, num_rows)


@each_pool
def test_int4_sums_are_exact_at_full_scale(pool):
    for k in (1, 32, 63, 4096):
        bits = kernels.to_bfloat16(np.broadcast_to(np.float32([1, 0]), (3, -(-k // 32), 2)))
        weight = np.full((3, k), 15, np.uint8)
        weight[1] = 0
        x = np.ones((2, k), np.float32)
        x[1] = -1
        y = kernels.linear(
            pool, kernels.make_linear(weight, "int4", grid=bits), kernels.quantize_rows(pool, x)
        )
        exact = np.array([[1, 0, 1], [-1, 0, -1]]) * (15.0 * 127 * k)
        np.testing.assert_array_equal(y, exact.astype(np.float32) * (np.float32(1) / np.float32(127)))


def test_packing_refuses_what_it_cannot_hold():
    with pytest.raises(ValueError, match="0 to 15"):
        kernels.pack_int4(np.full((2, 4), 16, np.uint8), np.zeros((2, 1, 2), np.uint16))
    with pytest.raises(ValueError, match="grid"):
        kernels.make_linear(np.zeros((2, 4), np.uint8), "int4")
    with pytest.raises(ValueError, match="127"):
        kernels.pack_int8(np.full((2, 4), -128, np.int8))
    with pytest.raises(ValueError, match="two nonzero"):
        kernels.pack_2_4(np.ones((2, 4), np.int8))


# ---- float -------------------------------------------------------------------------------------------------


def widen(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


@each_pool
@pytest.mark.parametrize("format", ["float32", "bfloat16"])
def test_float_linears_are_as_near_as_their_chains_allow(pool, format, rng):
    for n, k in SHAPES:
        stored = rng.standard_normal((n, k), dtype=np.float32)
        if format == "bfloat16":
            stored = kernels.to_bfloat16(stored)
        weight = widen(stored) if format == "bfloat16" else stored
        bias = rng.standard_normal(n, np.float32)
        packed = kernels.make_linear(stored, format, bias=bias)
        for num_rows in (1, 4, 9):
            x = rng.standard_normal((num_rows, k), dtype=np.float32) * np.float32(10) ** rng.integers(
                -3, 3, (num_rows, k)
            )
            x = x.astype(np.float32)
            residual = rng.standard_normal((num_rows, n), dtype=np.float32)
            y = kernels.linear(pool, packed, x, residual)
            exact = x.astype(np.float64) @ weight.T.astype(np.float64) + bias + residual
            magnitude = np.abs(x).astype(np.float64) @ np.abs(weight).T + np.abs(bias) + np.abs(residual)
            steps = min(k, 256) + math.ceil(k / 256) + 2
            assert (np.abs(y - exact) <= steps * 2.0**-24 * magnitude).all(), (n, k, num_rows)


@each_pool
def test_float_linears_sum_in_the_documented_order(pool, rng):
    """One chain of fused multiply-adds over each 256 inputs, the chains' sums added in order: emulated in
    float64, where a product of floats is exact, and rounded after each step (right but for double rounding,
    so a few bits may differ; in any other order most would)."""
    n, k = 16, 700
    weight, x = rng.standard_normal((n, k), dtype=np.float32), rng.standard_normal((3, k), dtype=np.float32)
    total = np.zeros((3, n), np.float32)
    for first in range(0, k, 256):
        chain = np.zeros((3, n), np.float32)
        for i in range(first, min(k, first + 256)):
            chain = (x[:, i, None].astype(np.float64) * weight[:, i] + chain).astype(np.float32)
        total = chain if first == 0 else total + chain
    y = kernels.linear(pool, kernels.make_linear(weight, "float32"), x)
    assert (y == total).mean() > 0.9


ACTIVATIONS = {
    "identity": lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x / (1 + np.exp(np.minimum(-x, 700))),
    "gelu": lambda x: 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
}


@each_pool
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_accurate_everywhere(pool, name):
    x = np.concatenate(
        [np.linspace(-12, 12, 4001), np.geomspace(1e-40, 80, 500), -np.geomspace(1e-40, 80, 500), [0.0]]
    )
    x = x.astype(np.float32)[:, None]
    weight = kernels.make_linear(np.ones((1, 1), np.float32), "float32", activation=name)
    y = kernels.linear(pool, weight, x)[:, 0]
    exact = ACTIVATIONS[name](x[:, 0].astype(np.float64))
    assert np.abs(y - exact).max() <= 3e-7 * 12
    np.testing.assert_allclose(y, exact, rtol=4e-7, atol=2e-7 if "gelu" in name else 1e-33)


@each_pool
@pytest.mark.parametrize("format", ["bfloat16", "int8"])
def test_a_gated_linear_multiplies_the_activated_gate_with_up(pool, format, rng):
    for n in (1, 5, 16, 47, 48, 49, 100):
        k, num_rows = 40, 9
        weights = [rng.integers(-127, 128, (n, k)).astype(np.int8) for _ in range(2)]
        biases = [rng.standard_normal(n, dtype=np.float32) for _ in range(2)]
        scales = [rng.random(n, dtype=np.float32) / 1000 for _ in range(2)]
        x = rng.standard_normal((num_rows, k), dtype=np.float32)
        rows = kernels.quantize_rows(pool, x) if format == "int8" else x
        stored = weights if format == "int8" else [kernels.to_bfloat16(w.astype(np.float32)) for w in weights]
        if format != "int8":
            scales = [None, None]
        gate, up = (
            kernels.linear(pool, kernels.make_linear(w, format, s, b), rows)
            for w, s, b in zip(stored, scales, biases, strict=True)
        )
        together = kernels.make_linear(
            kernels.interleave(*stored),
            format,
            None if format != "int8" else kernels.interleave(*scales),
            kernels.interleave(*biases),
            "silu",
            gated_outputs=n,
        )
        y = kernels.linear(pool, together, rows)
        exact = ACTIVATIONS["silu"](gate.astype(np.float64)) * up
        np.testing.assert_allclose(y, exact, rtol=6e-7, atol=1e-30)


# ---- Norms -------------------------------------------------------------------------------------------------


@each_pool
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_norms_match_and_are_quantized_as_the_law_says(pool, norm, rng):
    for k in (1, 2, 3, 5, 7, 16, 17, 64, 576, 1031):
        x = (rng.standard_normal((7, k)) * 3 + 1).astype(np.float32)
        x[1] = 0
        weight, bias = rng.standard_normal(k, dtype=np.float32), rng.standard_normal(k, dtype=np.float32)
        y, rows = kernels.norm_rows(pool, x, weight, bias if norm == "layer" else None, 1e-5, norm)
        wide = x.astype(np.float64)
        if norm == "rms":
            exact = wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + 1e-5) * weight
        else:
            exact = (wide - wide.mean(axis=1, keepdims=True)) / np.sqrt(
                wide.var(axis=1, keepdims=True) + 1e-5
            )
            exact = exact * weight + bias
        # A mean that is off by a rounding shifts a row of nearly equal values by up to 1 / sqrt(eps) of that.
        np.testing.assert_allclose(y, exact, rtol=2e-6, atol=1e-6 if norm == "rms" else 1e-4)
        q, scale, sums = kernels.split_rows(rows, k)
        expected_q, expected_scale = quantize_by_law(y)
        np.testing.assert_array_equal(q, expected_q)
        np.testing.assert_array_equal(scale, expected_scale)
        np.testing.assert_array_equal(sums, expected_q.sum(axis=1, dtype=np.int32))


# ---- Attention ---------------------------------------------------------------------------------------------

HEADS = [(1, 1, 1), (2, 1, 5), (9, 3, 64), (4, 4, 16), (8, 1, 80), (6, 2, 128), (20, 2, 24), (2, 2, 256)]


CACHES = [("float32", shape) for shape in HEADS] + [
    ("bfloat16", shape) for shape in HEADS if shape[2] % 16 == 0
]


def round_to_bfloat16(x: np.ndarray) -> np.ndarray:
    """float32, to the nearest of bfloat16."""
    return torch.from_numpy(x).bfloat16().float().numpy()


@each_pool
@pytest.mark.parametrize(("dtype", "shape"), CACHES, ids=str)
def test_attention_matches_float64_over_any_mask(pool, dtype, shape, rng):
    num_heads, num_kv_heads, size = shape
    for num_rows, max_slots in ((1, 1), (1, 67), (5, 64), (17, 200)):
        if dtype == "bfloat16":
            max_slots += -max_slots % kernels.PANEL_SLOTS
        heads = kernels.Heads(
            num_heads, num_kv_heads, size, max_slots, 1 / math.sqrt(size), cache_dtype=dtype
        )
        qkv = rng.standard_normal((num_rows, (num_heads + 2 * num_kv_heads) * size), dtype=np.float32)
        keys, values = rng.standard_normal((2, num_kv_heads, max_slots, size), dtype=np.float32)
        keys[:, ::7] *= 30  # sharp maxima, so that the running maximum moves
        mask = rng.random((num_rows, max_slots)) < 0.6
        mask[0] = True
        if num_rows > 3:
            mask[3] = False
        cache = kernels.lay_out(keys, values, dtype)
        if dtype == "bfloat16":
            keys, values = round_to_bfloat16(keys), round_to_bfloat16(values)
        out = kernels.attend(pool, heads, qkv, *kernels.list_slots(mask), *cache)

        query = qkv[:, : num_heads * size].reshape(num_rows, num_heads, size)
        query = (query if dtype == "float32" else round_to_bfloat16(query)).astype(np.float64)
        group = num_heads // num_kv_heads
        scores = np.einsum("rhd,hsd->rhs", query, np.repeat(keys, group, axis=0)) / math.sqrt(size)
        scores = np.where(mask[:, None], scores, -np.inf)
        with np.errstate(invalid="ignore"):
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            weights /= weights.sum(axis=-1, keepdims=True)
        exact = np.einsum("rhs,hsd->rhd", np.nan_to_num(weights), np.repeat(values, group, axis=0))
        # A score is a sum of `size` rounded products, and its error shows as a factor of the weight.
        error = 2.0**-22 * (size + 8) * max(1, np.abs(np.where(mask[:, None], scores, 0)).max())
        # Rounded weights: half a unit of the eight bits of each, of values that go up to about 4.
        rounded = 0 if dtype == "float32" else 2.0**-9 * np.abs(values).max()
        np.testing.assert_allclose(out.reshape(exact.shape), exact, atol=min(error, 1e-3) + 2e-6 + rounded)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention_keeps_nan_and_passes_over_what_weighs_nothing(dtype, rng):
    """NaN in a query or in a key that a row sees is in its output, in whichever of its blocks; a slot whose
    score is minus infinity is as one that is not seen."""
    size, max_slots = 64, 208
    heads = kernels.Heads(2, 1, size, max_slots, 0.125, cache_dtype=dtype)
    keys, values = rng.standard_normal((2, 1, max_slots, size), dtype=np.float32)
    for num_slots in (1, 2, 16, 63, 64, 65, 127, 129, 200):
        qkv = rng.standard_normal((1, 4 * size), dtype=np.float32)
        qkv[0, [0, size]] = 1
        sees = np.arange(max_slots)[None] < num_slots
        for threads in (1, 8):  # the second parts blocks
            pool = kernels.Pool(threads)

            def attend(keys, sees=sees, qkv=qkv, pool=pool) -> np.ndarray:
                cache = kernels.lay_out(keys, values, dtype)
                return kernels.attend(pool, heads, qkv, *kernels.list_slots(sees), *cache)[0].reshape(2, size)

            whole = attend(keys)
            assert np.isfinite(whole).all()
            broken = qkv.copy()
            broken[0, 3] = np.nan
            first, second = attend(keys, qkv=broken)
            assert np.isnan(first).all()
            np.testing.assert_array_equal(second, whole[1])
            for slot in {0, num_slots // 2, num_slots - 1}:
                broken = keys.copy()
                broken[0, slot, 5] = np.nan
                assert np.isnan(attend(broken)).all()
            for hidden in (slice(0, 64), slice(64, 128), slice(num_slots // 2, None), slice(None)):
                distant = keys.copy()
                distant[0, hidden, 0] = -np.inf
                left = sees.copy()
                left[0, hidden] = False
                np.testing.assert_allclose(attend(distant), attend(keys, left), rtol=2e-2, atol=2e-2)


@each_pool
def test_heads_are_normed_turned_and_written_in_place(pool, rng):
    for num_heads, num_kv_heads, size, num_rotary in (
        (1, 1, 2, 2),
        (9, 3, 64, 64),
        (4, 2, 80, 32),
        (3, 1, 20, 20),
        (2, 2, 7, 0),
    ):
        for normed in (False, True):
            num_rows, max_slots, first_slot = 5, 11, 4
            positions = rng.integers(0, 50, num_rows)
            angles = rng.uniform(-3, 3, (50, num_rotary // 2)) if num_rotary else None
            tables = (
                [None, None] if angles is None else [f(angles).astype(np.float32) for f in (np.cos, np.sin)]
            )
            norms = [rng.standard_normal(size, dtype=np.float32) if normed else None for _ in range(2)]
            heads = kernels.Heads(
                num_heads, num_kv_heads, size, max_slots, 1.0, *tables, *norms, norm_eps=1e-6
            )
            qkv = rng.standard_normal((num_rows, num_heads + 2 * num_kv_heads, size), dtype=np.float32)
            keys, values = rng.standard_normal((2, num_kv_heads, max_slots, size), dtype=np.float32)
            panels, pairs = kernels.lay_out(keys, values)

            exact = qkv.astype(np.float64)
            turning = num_heads + num_kv_heads
            if normed:
                for part, weight in zip((slice(0, num_heads), slice(num_heads, turning)), norms, strict=True):
                    rms = np.sqrt((exact[:, part] ** 2).mean(axis=-1, keepdims=True) + 1e-6)
                    exact[:, part] = exact[:, part] / rms * weight
            if angles is not None:
                half = num_rotary // 2
                c, s = (table[positions][:, None].astype(np.float64) for table in tables)
                a, b = exact[:, :turning, :half].copy(), exact[:, :turning, half:num_rotary].copy()
                exact[:, :turning, :half], exact[:, :turning, half:num_rotary] = a * c - b * s, b * c + a * s

            flat = qkv.reshape(num_rows, -1)
            kernels.write_heads(pool, heads, flat, positions, first_slot, panels, pairs)
            np.testing.assert_allclose(qkv, exact, rtol=2e-6, atol=2e-6)
            new = slice(first_slot, first_slot + num_rows)
            keys[:, new] = qkv[:, num_heads:turning].transpose(1, 0, 2)
            values[:, new] = qkv[:, turning:].transpose(1, 0, 2)
            for found, expected in zip((panels, pairs), kernels.lay_out(keys, values), strict=True):
                np.testing.assert_array_equal(found, expected)


@each_pool
def test_a_bfloat16_cache_holds_what_is_nearest(pool, rng):
    num_heads, num_kv_heads, size, num_rows, max_slots, first_slot = 4, 2, 32, 5, 48, 13
    heads = kernels.Heads(num_heads, num_kv_heads, size, max_slots, 1.0, cache_dtype="bfloat16")
    qkv = rng.standard_normal((num_rows, num_heads + 2 * num_kv_heads, size), dtype=np.float32)
    qkv[0] *= 1e30
    qkv[1, :, ::2] = 1 + 2.0**-8  # halfway between two
    qkv[1, :, 1::2] = 1 + 3 * 2.0**-8
    qkv[2, :, :3] = np.nan, np.inf, -np.inf
    qkv[2, :, 3:5] = np.array([0x7F800001, 0xFFFFFFFF], np.uint32).view(np.float32)  # to round is no NaN
    qkv[3, :, :2] = np.finfo(np.float32).max, np.float32(1e-41)
    before = rng.standard_normal((2, num_kv_heads, max_slots, size), dtype=np.float32)
    keys, values = kernels.lay_out(*before, "bfloat16")
    kernels.write_heads(pool, heads, qkv.reshape(num_rows, -1), np.arange(num_rows), first_slot, keys, values)
    after = round_to_bfloat16(before)
    turning = num_heads + num_kv_heads
    for part, written in enumerate((qkv[:, num_heads:turning], qkv[:, turning:])):
        after[part, :, first_slot : first_slot + num_rows] = round_to_bfloat16(written.transpose(1, 0, 2))
    after[:, :, first_slot + 2, [0, 3, 4]] = 0  # of NaN the bits are its own
    expected = kernels.lay_out(*after, "bfloat16")
    for found, exact in zip((keys, values), expected, strict=True):
        bits = found.astype(np.uint32) << 16
        is_nan = np.isnan(bits.view(np.float32))
        assert is_nan.sum() == 3 * num_kv_heads and set(found[is_nan]) == {0x7FC0, 0xFFFF}
        np.testing.assert_array_equal(found[~is_nan], exact[~is_nan])


@pytest.mark.parametrize(
    ("dtype", "size", "slots", "path", "first"),
    [
        ("float32", 5, 20, [7, 8, 11, 15], 7),
        ("float32", 5, 35, [14, 15, 17, 33, 34], 13),
        ("bfloat16", 16, 32, [7, 8, 11, 15], 7),
        ("bfloat16", 48, 48, [14, 15, 17, 33, 46], 13),
    ],
)
def test_keeping_a_path_moves_its_slots_together(dtype, size, slots, path, first, rng):
    heads = kernels.Heads(4, 2, size, slots, 1.0, cache_dtype=dtype)
    before = rng.standard_normal((2, 2, slots, size), dtype=np.float32)
    expected = before.copy()
    expected[:, :, first : first + len(path)] = before[:, :, path]
    cache = kernels.lay_out(*before, dtype)
    kernels.keep_path(heads, np.array(path, np.int32), first, *cache)
    for found, exact in zip(cache, kernels.lay_out(*expected, dtype), strict=True):
        np.testing.assert_array_equal(found, exact)


# ---- Bad input ---------------------------------------------------------------------------------------------


def test_bad_input_is_an_error_with_words(rng):
    pool = kernels.Pool()
    x = rng.standard_normal((2, 8), dtype=np.float32)
    good = kernels.make_linear(rng.standard_normal((4, 8), dtype=np.float32), "float32")
    floats, out = kernels.view("float[]", x), kernels.view("float[]", np.empty((2, 4), np.float32))

    def fails(status: int, words: str) -> None:
        assert status == lib.DS_ERROR_ARGUMENT
        assert words in ffi.string(lib.ds_error_message()).decode()

    null = ffi.NULL
    fails(lib.ds_linear_float(null, good.handle, 2, floats, null, out, null, null), "pool")
    fails(lib.ds_linear_float(pool.handle, null, 2, floats, null, out, null, null), "NULL")
    fails(lib.ds_linear_float(pool.handle, good.handle, 2, null, null, out, null, null), "NULL")
    fails(lib.ds_linear_float(pool.handle, good.handle, -1, floats, null, out, null, null), "-1 rows")
    fails(lib.ds_linear_int8(pool.handle, good.handle, 2, floats, null, out, null, null), "quantized")
    assert lib.ds_linear_float(pool.handle, good.handle, 0, null, null, null, null, null) == lib.DS_OK
    for field, value, words in (
        ("n", 0, "0 outputs"),
        ("k", -5, "-5 inputs"),
        ("format", 9, "9 is not"),
        ("activation", 7, "7 is not"),
    ):
        bad = ffi.new("ds_linear *", good.handle[0])
        setattr(bad, field, value)
        fails(lib.ds_linear_float(pool.handle, bad, 2, floats, null, out, null, null), words)
        fails(lib.ds_linear_float(pool.handle, good.handle, 2, floats, null, out, null, bad), words)
    bad = ffi.new("ds_linear *", good.handle[0])
    bad.format = lib.DS_INT8
    fails(lib.ds_linear_int8(pool.handle, bad, 2, floats, null, out, null, null), "scale")

    heads = kernels.Heads(2, 1, 4, 6, 1.0, np.ones((3, 2), np.float32), np.ones((3, 2), np.float32))
    qkv, cache = np.ones((2, 16), np.float32), np.ones((1, 6, 4), np.float32)
    with pytest.raises(BundleError, match="position 3 of row 1; the tables have 3"):
        kernels.write_heads(pool, heads, qkv, np.array([0, 3]), 0, cache, cache)
    with pytest.raises(BundleError, match="6 slots; 2 rows from slot 5"):
        kernels.write_heads(pool, heads, qkv, np.array([0, 1]), 5, cache, cache)
    slots, counts = kernels.list_slots(np.ones((2, 6), bool))
    slots[1, 2] = 6
    with pytest.raises(BundleError, match="row 1 sees a slot"):
        kernels.attend(pool, heads, qkv, slots, counts, cache, cache)
    slots[1, 2] = 1
    with pytest.raises(BundleError, match="row 1 sees slots that do not rise"):
        kernels.attend(pool, heads, qkv, slots, counts, cache, cache)
    counts[0] = 7
    with pytest.raises(BundleError, match="row 0 sees 7 of 6"):
        kernels.attend(pool, heads, qkv, slots, counts, cache, cache)
    for channels, room in ((4, 16), (16, 6)):
        odd = kernels.Heads(2, 1, channels, room, 1.0, cache_dtype="bfloat16")
        with pytest.raises(
            BundleError, match=f"bfloat16 cache of {room} slots of {channels} channels; multiples of 16"
        ):
            kernels.keep_path(odd, np.array([1], np.int32), 0, cache, cache)
    with pytest.raises(BundleError, match="heads over"):
        kernels.attend(pool, kernels.Heads(3, 2, 4, 6, 1.0), qkv, slots, counts, cache, cache)
    with pytest.raises(BundleError, match="257 channels"):
        kernels.attend(pool, kernels.Heads(2, 2, 257, 6, 1.0), qkv, slots, counts, cache, cache)
    for path in ([3, 3], [2, 1], [1, 6], [0, 2]):
        with pytest.raises(BundleError, match="must rise"):
            kernels.keep_path(heads, np.array(path, np.int32), 1, cache, cache)
    for count in (0, -1, 65):
        with pytest.raises(BundleError, match="n_threads"):
            kernels.Pool(count)
    with pytest.raises(BundleError, match="no kernels named 'mmx'"):
        kernels.Pool(1, "mmx")


def test_the_environment_names_the_instruction_set(monkeypatch):
    monkeypatch.setenv("DRAFTSMITH_ISA", "portable")
    assert kernels.Pool().isa == "portable"
    monkeypatch.setenv("DRAFTSMITH_ISA", "abacus")
    with pytest.raises(BundleError, match="abacus"):
        kernels.Pool()

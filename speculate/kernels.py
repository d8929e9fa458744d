"""The native kernels over numpy arrays: for packing weights, for tests and for benchmarks.

`native/kernels.h` says what each function computes and how packed weights are laid out.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from .binding import check, ffi, lib, view

LANES = 16
INT4_GROUP = 32  # inputs that share a grid
PANEL_SLOTS: int = lib.DS_PANEL_SLOTS
MAX_INT8_INPUTS: int = lib.DS_MAX_INT8_INPUTS
# The best first.
ISAS = ("amx_int8", "avx512_bf16", "avx512_vbmi2", "avx512_vnni", "avx2_vnni", "avx2", "portable")
Activation = Literal["identity", "relu", "silu", "gelu", "gelu_tanh"]
Format = Literal["float32", "bfloat16", "int8", "int8_bitmask", "int8_2_4", "int4"]
CacheDtype = Literal["float32", "bfloat16"]
CACHE_TYPES: dict[CacheDtype, int] = {"float32": lib.DS_CACHE_FLOAT32, "bfloat16": lib.DS_CACHE_BFLOAT16}


class Pool:
    """Threads and an instruction set (of ISAS; default: the best here)."""

    def __init__(self, num_threads: int = 1, isa: str | None = None):
        handle = lib.ds_pool_create(num_threads)
        if handle == ffi.NULL:
            check(lib.DS_ERROR_ARGUMENT)
        self.handle = ffi.gc(handle, lib.ds_pool_free)
        if isa is not None:
            check(lib.ds_pool_use_isa(self.handle, isa.encode()))

    @property
    def isa(self) -> str:
        return ffi.string(lib.ds_pool_isa(self.handle)).decode()


# ---- Packing -----------------------------------------------------------------------------------------------


def to_bfloat16(weight: np.ndarray) -> np.ndarray:
    """float32 → the bits of the nearest bfloat16 (ties to even), uint16. Finite values only."""
    bits = np.ascontiguousarray(weight, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _split_blocks(weight: np.ndarray, group: int) -> np.ndarray:
    """[N, K] → [B, ceil(K / group), 16, group], padded with zeros."""
    n, k = weight.shape
    padded = np.pad(weight, ((0, -n % LANES), (0, -k % group)))
    return padded.reshape(-1, LANES, padded.shape[1] // group, group).transpose(0, 2, 1, 3)


def interleave(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """Rows of the gate and up projections in the order of a gated linear: 16 of one, 16 of the other, padded
    with zeros. For weights [N, K], scales [N] and biases [N]."""
    pad = [(0, -len(gate) % LANES)] + [(0, 0)] * (gate.ndim - 1)
    blocks = [np.pad(x, pad).reshape(-1, LANES, *x.shape[1:]) for x in (gate, up)]
    return np.stack(blocks, axis=1).reshape(-1, *gate.shape[1:])


def pack_float32(weight: np.ndarray) -> np.ndarray:
    """[N, K] float32 → [B, K, 16]."""
    return np.ascontiguousarray(_split_blocks(weight.astype(np.float32), 1)[..., 0])


def pack_bfloat16(bits: np.ndarray) -> np.ndarray:
    """[N, K] bfloat16 bits (uint16) → [B, ceil(K / 2), 16, 2]."""
    return np.ascontiguousarray(_split_blocks(bits, 2))


def pack_int8(weight: np.ndarray) -> np.ndarray:
    """[N, K] int8 → uint8 [B, ceil(K / 4), 16, 4]."""
    if weight.dtype != np.int8 or (weight == -128).any():
        raise ValueError("weights must be int8 in [-127, 127]")
    return np.ascontiguousarray(_split_blocks(weight, 4)).view(np.uint8) ^ np.uint8(128)


def pack_bitmask(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[N, K] int8 → bytes and the start of each block, int64 [B + 1]. Ends in 64 bytes of padding."""
    blocks = pack_int8(weight)
    blocks = blocks.reshape(len(blocks), -1, 64)
    parts = []
    for block in blocks:
        kept = block != 128
        parts.append(np.concatenate([np.packbits(kept, axis=1, bitorder="little").ravel(), block[kept]]))
    starts = np.cumsum([0] + [len(part) for part in parts])
    return np.concatenate([*parts, np.zeros(64, np.uint8)]), starts


def pack_2_4(weight: np.ndarray) -> np.ndarray:
    """[N, K] int8 with at most two nonzeros in each four inputs → uint8 [B, ceil(K / 4), 40]."""
    groups = pack_int8(weight)  # [B, G, 16, 4]
    kept = groups != 128
    if (kept.sum(axis=-1) > 2).any():
        raise ValueError("more than two nonzero weights in a group of four inputs")
    # A stable sort puts the kept places first; the two that come first, in order, are what is stored.
    places = np.sort(np.argsort(~kept, axis=-1, kind="stable")[..., :2], axis=-1)
    pairs = np.take_along_axis(groups, places, axis=-1)
    code_of = np.zeros((4, 4), np.uint64)
    code_of[[0, 0, 0, 1, 1, 2], [1, 2, 3, 2, 3, 3]] = range(6)
    codes = code_of[places[..., 0], places[..., 1]]
    output = np.arange(LANES, dtype=np.uint64)
    words = (codes << (4 * (output // 2) + 32 * (output % 2))).sum(axis=-1, dtype=np.uint64)
    return np.concatenate([pairs.reshape(*words.shape, 32), words[..., None].view(np.uint8)], axis=-1)


def pack_int4(weight: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """[N, K] uint8 of 0 to 15, and the bits (uint16) of the step and the base of each 32 of them, bfloat16
    [N, ceil(K / 32), 2] → uint8 [B, ceil(K / 32), 320]."""
    if weight.dtype != np.uint8 or (weight > 15).any():
        raise ValueError("weights must be uint8 of 0 to 15")
    blocks = _split_blocks(weight, INT4_GROUP)  # [B, G, 16, 32]
    quads = blocks.reshape(*blocks.shape[:2], LANES, 2, 4, 4).transpose(3, 0, 1, 4, 2, 5)
    pairs = quads[0] | quads[1] << 4  # [B, G, 4, 16, 4]
    grids = np.pad(grid, ((0, -len(grid) % LANES), (0, 0), (0, 0)))
    grids = grids.reshape(-1, LANES, *grid.shape[1:]).transpose(0, 2, 1, 3)  # [B, G, 16, 2]
    parts = (np.ascontiguousarray(grids).view(np.uint8), pairs)
    return np.concatenate([part.reshape(*blocks.shape[:2], -1) for part in parts], axis=-1)


def pack(
    weight: np.ndarray, format: Format, grid: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray | None]:
    """The weight [N, K] in a format, and for a bitmask the start of each block. `grid`: of int4 weights."""
    match format:
        case "float32":
            return pack_float32(weight), None
        case "bfloat16":
            return pack_bfloat16(weight), None
        case "int8":
            return pack_int8(weight), None
        case "int8_bitmask":
            return pack_bitmask(weight)
        case "int8_2_4":
            return pack_2_4(weight), None
        case "int4":
            if grid is None:
                raise ValueError("int4 weights need their grid")
            return pack_int4(weight, grid), None


# ---- Linear layers -----------------------------------------------------------------------------------------


@dataclass
class Linear:
    """Packed weights and what goes with them; `handle` is the C struct. A gated one takes rows that
    `interleave` ordered, and `n` counts its outputs, half of those."""

    handle: Any
    n: int
    k: int
    is_quantized: bool  # takes quantized rows
    num_bytes: int
    _keep: Sequence[object] = field(default=(), repr=False)


@dataclass(frozen=True)
class Screen:
    """What shows where a float linear is largest; `handle` is the C struct."""

    handle: Any
    _keep: Sequence[object] = field(default=(), repr=False)


def make_linear(
    weight: np.ndarray,
    format: Format,
    scale: np.ndarray | None = None,
    bias: np.ndarray | None = None,
    activation: Activation = "identity",
    gated_outputs: int | None = None,
    grid: np.ndarray | None = None,
) -> Linear:
    """weight [N, K]: int8 for the int8 formats, uint8 for int4, bits (uint16) for bfloat16, float32. scale
    and bias [N]; grid as in `pack_int4`."""
    packed, starts = pack(weight, format, grid)
    n, k = weight.shape

    def pad(row: np.ndarray | None) -> np.ndarray | None:
        return None if row is None else np.pad(np.asarray(row, np.float32), (0, -n % LANES))

    arrays = [align(packed), starts, pad(scale), pad(bias)]
    pointers = [
        ffi.NULL if a is None else ffi.cast(kind, ffi.from_buffer(a))
        for kind, a in zip(("void *", "int64_t *", "float *", "float *"), arrays, strict=True)
    ]
    handle = ffi.new("ds_linear *")
    handle.n, handle.k = n if gated_outputs is None else gated_outputs, k
    handle.format = getattr(lib, f"DS_{format.upper()}")
    handle.activation = getattr(lib, f"DS_{activation.upper()}") + (
        0 if gated_outputs is None else lib.DS_GATED
    )
    handle.weight, handle.starts, handle.scale, handle.bias = pointers
    return Linear(handle, handle.n, k, format.startswith("int"), packed.nbytes, arrays)


def align(array: np.ndarray) -> np.ndarray:
    """The same array, starting at a multiple of 64 bytes."""
    room = np.empty(array.nbytes + 64, np.uint8)
    start = -room.ctypes.data % 64
    aligned = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    aligned[...] = array
    return aligned


def linear(
    pool: Pool,
    linear: Linear,
    rows: np.ndarray,
    residual: np.ndarray | None = None,
    out: np.ndarray | None = None,
    next: Linear | None = None,
    peaks: np.ndarray | None = None,
) -> np.ndarray:
    """rows: float32 [S, K], or what `quantize_rows` gave for a quantized linear → float32 [S, N].
    peaks: float32 [S, ceil(N / DS_PEAK_WIDTH)], to be filled."""
    if out is None:
        out = np.empty((len(rows), linear.n), np.float32)
    num_peaks = -(-linear.n // lib.DS_PEAK_WIDTH)
    assert peaks is None or (peaks.dtype, peaks.shape) == (np.float32, (len(rows), num_peaks))
    run = lib.ds_linear_int8 if linear.is_quantized else lib.ds_linear_float
    check(
        run(
            pool.handle,
            linear.handle,
            len(rows),
            view("char[]", rows) if linear.is_quantized else view("float[]", rows),
            ffi.NULL if residual is None else view("float[]", residual),
            view("float[]", out),
            ffi.NULL if peaks is None else view("float[]", peaks),
            ffi.NULL if next is None else next.handle,
        )
    )
    return out


def make_screen(copy: np.ndarray, scale: np.ndarray, error: np.ndarray) -> Screen:
    """copy: int8 [N, K]; scale and error: float32 [N]. What `export.packed.screen` makes of float weights."""
    linear = make_linear(copy, "int8", scale)
    errors = np.pad(error, (0, -len(error) % LANES))
    handle = ffi.new("ds_screen *", {"copy": linear.handle[0], "error": view("float[]", errors)})
    return Screen(handle, (linear, errors))


def linear_screened(
    pool: Pool, linear: Linear, screen: Screen, rows: np.ndarray, peaks: np.ndarray | None = None
) -> np.ndarray:
    """float32 [S, K] → float32 [S, N], exact where a row is largest; peaks as of `linear`."""
    out = np.empty((len(rows), linear.n), np.float32)
    size = lib.ds_screen_bytes(linear.handle, len(rows))
    check(size)
    memory = align(np.empty(size, np.uint8))
    check(
        lib.ds_linear_screened(
            pool.handle,
            linear.handle,
            screen.handle,
            len(rows),
            view("float[]", rows),
            ffi.from_buffer(memory),
            view("float[]", out),
            ffi.NULL if peaks is None else view("float[]", peaks),
        )
    )
    return out


# ---- Rows --------------------------------------------------------------------------------------------------


def quantize_rows(pool: Pool, x: np.ndarray, static_scale: float = 0.0) -> np.ndarray:
    """float32 [S, K] → quantized rows, uint8 [S, stride]; `split_rows` takes them apart."""
    rows = np.empty((len(x), lib.ds_int8_stride(x.shape[1])), np.uint8)
    check(lib.ds_quantize_rows(pool.handle, *x.shape, view("float[]", x), static_scale, view("char[]", rows)))
    return rows


def split_rows(rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Quantized rows → int8 [S, K], scales float32 [S], sums int32 [S]."""
    return (
        rows[:, :k].view(np.int8),
        rows[:, -8:-4].copy().view(np.float32)[:, 0],
        rows[:, -4:].copy().view(np.int32)[:, 0],
    )


def norm_rows(
    pool: Pool,
    x: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | None = None,
    eps: float = 1e-5,
    norm: Literal["rms", "layer"] = "rms",
    static_scale: float = 0.0,
) -> tuple[np.ndarray, np.ndarray]:
    """float32 [S, K] → the normalized rows, and those quantized."""
    y = np.empty_like(x)
    rows = np.empty((len(x), lib.ds_int8_stride(x.shape[1])), np.uint8)
    check(
        lib.ds_norm_rows(
            pool.handle,
            lib.DS_RMS_NORM if norm == "rms" else lib.DS_LAYER_NORM,
            *x.shape,
            view("float[]", x),
            view("float[]", weight),
            ffi.NULL if bias is None else view("float[]", bias),
            eps,
            view("float[]", y),
            static_scale,
            view("char[]", rows),
        )
    )
    return y, rows


# ---- Attention ---------------------------------------------------------------------------------------------


class Heads:
    """The heads of an attention layer and its cache's size; cos and sin are [positions, num_rotary / 2]."""

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        max_slots: int,
        scale: float,
        cos: np.ndarray | None = None,
        sin: np.ndarray | None = None,
        q_norm: np.ndarray | None = None,
        k_norm: np.ndarray | None = None,
        norm_eps: float = 1e-6,
        cache_dtype: CacheDtype = "float32",
    ):
        handle = self.handle = ffi.new("ds_heads *")
        handle.n_heads, handle.n_kv_heads, handle.head_dim = num_heads, num_kv_heads, head_dim
        handle.max_slots, handle.scale, handle.norm_eps = max_slots, scale, norm_eps
        handle.cache_type = CACHE_TYPES[cache_dtype]
        self._keep = [cos, sin, q_norm, k_norm]
        if cos is not None:
            handle.n_positions, handle.n_rotary = len(cos), 2 * cos.shape[1]
        pointers = [ffi.NULL if a is None else ffi.cast("float *", ffi.from_buffer(a)) for a in self._keep]
        handle.cos, handle.sin, handle.q_norm, handle.k_norm = pointers
        self.num_heads, self.head_dim, self.max_slots = num_heads, head_dim, max_slots


def lay_out(
    keys: np.ndarray, values: np.ndarray, dtype: CacheDtype = "float32"
) -> tuple[np.ndarray, np.ndarray]:
    """float32 keys and values [kv heads, slots, channels] as a cache of `dtype` has them, in the same shape:
    float32, or the bits of bfloat16 as uint16."""
    heads, slots, channels = keys.shape
    if dtype == "bfloat16":
        panels = to_bfloat16(keys).reshape(heads, -1, PANEL_SLOTS, channels // 2, 2).swapaxes(2, 3)
        pairs = to_bfloat16(values).reshape(heads, -1, 2, channels).swapaxes(2, 3)
        return panels.reshape(keys.shape), pairs.reshape(values.shape)
    starts = range(0, slots, PANEL_SLOTS)
    panels = [keys[:, i : i + PANEL_SLOTS].swapaxes(1, 2).reshape(heads, -1) for i in starts]
    return np.ascontiguousarray(np.concatenate(panels, axis=1).reshape(keys.shape)), values.copy()


def write_heads(
    pool: Pool,
    heads: Heads,
    qkv: np.ndarray,
    positions: np.ndarray,
    first_slot: int,
    keys: np.ndarray,
    values: np.ndarray,
) -> None:
    """Changes `qkv` and the caches, as `lay_out` has them, in place."""
    check(
        lib.ds_write_heads(
            pool.handle,
            heads.handle,
            len(qkv),
            view("float[]", qkv),
            view("int64_t[]", positions),
            first_slot,
            view("char[]", keys),
            view("char[]", values),
        )
    )


def list_slots(mask: np.ndarray, window: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """bool [S, slots] → the visible slots of each row, int32 [S, slots], and their number, int32 [S]; of more
    than `window`, if that is positive, the last ones."""
    slots, counts = np.zeros(mask.shape, np.int32), np.empty(len(mask), np.int32)
    check(
        lib.ds_list_slots(
            *mask.shape,
            view("uint8_t[]", mask.view(np.uint8)),
            window,
            view("int32_t[]", slots),
            view("int32_t[]", counts),
        )
    )
    return slots, counts


def attend(
    pool: Pool,
    heads: Heads,
    qkv: np.ndarray,
    slots: np.ndarray,
    counts: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
) -> np.ndarray:
    """What `write_heads` left in `qkv` → float32 [S, num_heads * head_dim]."""
    out = np.empty((len(qkv), heads.num_heads * heads.head_dim), np.float32)
    check(
        lib.ds_attend(
            pool.handle,
            heads.handle,
            len(qkv),
            view("float[]", qkv),
            view("int32_t[]", slots),
            view("int32_t[]", counts),
            view("char[]", keys),
            view("char[]", values),
            view("float[]", out),
        )
    )
    return out


def keep_path(heads: Heads, path: np.ndarray, first_slot: int, keys: np.ndarray, values: np.ndarray) -> None:
    """Copies cache slots `path` to first_slot, first_slot + 1, … in place."""
    check(
        lib.ds_keep_path(
            heads.handle,
            len(path),
            view("int32_t[]", path),
            first_slot,
            view("char[]", keys),
            view("char[]", values),
        )
    )

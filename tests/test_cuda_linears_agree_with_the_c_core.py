"""Products of few rows on tensor cores, run on the CPU lane by lane, are those of numpy and of the C core.

The emulated instructions are written from the PTX ISA alone, the packed weights and the kernels from
`fragments.h`: a mistake of one does not hide a mistake of the other.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cuda_cases import check_linear, check_linears, draw_weight
from draftsmith.speculate import cuda, cuda_linear
from draftsmith.speculate.errors import BundleError
from emulated_cuda import SOURCES, Emulated, EmulatorError, compile_changed, compile_emulated, without_barrier

KERNELS = ("linear.cu", "pack_linear.cu")
SPARSE = ("int8_2_4", "float16_2_4")
INDICES = 4 * 32 * 4  # the first byte of a sparse tile's metadata


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    path = tmp_path_factory.mktemp("emulated") / "liblinear.so"
    compile_emulated(path, *(SOURCES / name for name in KERNELS))
    return path


@pytest.fixture
def emulated(library):
    emulated = Emulated(library)
    emulated.order(0)
    return emulated


def test_random_shapes_and_masks(emulated):
    check_linears(emulated, np.random.default_rng(0), 60)


@pytest.mark.parametrize("format", cuda_linear.FORMATS)
@pytest.mark.parametrize("num_rows", [1, 7, 8, 9, 16, 24, 25, 32])
def test_every_number_of_tiles(emulated, format, num_rows):
    check_linear(emulated, np.random.default_rng(num_rows), format, 16, 64, num_rows)


def test_integer_sums_beyond_24_bits(emulated):
    """Rounded once, from the whole sum."""
    weight = np.tile(np.array([127, 0, 0, 126], np.int8), (16, 640))
    x = np.full((1, 2560), 127, np.int8)
    ones = np.ones(16, np.float32)
    y = emulated.linear("int8_2_4", emulated.pack("int8_2_4", weight), 16, x, ones, ones)
    assert 127 * 253 * 640 > 2**24
    assert (y == np.float32(127 * 253 * 640)).all()


@pytest.mark.parametrize("format", SPARSE)
def test_wrong_metadata_is_noticed(emulated, format):
    """Each byte in turn: indices that the instruction does not take, and one that names another input."""
    rng = np.random.default_rng(1)
    dtype = np.int8 if format == "int8_2_4" else np.float16
    k = 64 if format == "int8_2_4" else 32
    weight = np.tile(np.array([3, 0, 5, 0], dtype), (16, k // 4))
    packed, x = emulated.pack(format, weight), rng.integers(1, 100, (1, k)).astype(dtype)
    scales = (np.ones(16, np.float32), np.ones(1, np.float32)) if format == "int8_2_4" else ()
    right = emulated.linear(format, packed, 16, x, *scales)
    assert (packed[INDICES:] == 0x88).all(), "inputs 0 and 2 of each group"
    for at in range(INDICES, len(packed)):
        for wrong in (0x87, 0x08):  # 3 before 1, and twice input 0
            changed = packed.copy()
            changed[at] = wrong
            with pytest.raises(EmulatorError, match="do not ascend"):
                emulated.linear(format, changed, 16, x, *scales)
        changed[at] = 0x8C  # inputs 0 and 3
        assert (emulated.linear(format, changed, 16, x, *scales) != right).sum() == 1


MISTAKES = {
    "the lanes of metadata": ("output / 8 + group / 8 * 2", "output / 8 * 2 + group / 8"),
    "the halves of metadata": ("group % 4 * 4 + output / 8 * 16", "group % 4 * 4 + (1 - output / 8) * 16"),
    "the inputs of weights": ("(lane % 4 + reg / 2 * 4) * width", "(lane % 4 * 2 + reg / 2) * width"),
    "the outputs of weights": ("lane / 4 + reg % 2 * 8", "lane / 4 + reg / 2 * 8"),
    "the inputs of activations": ("(lane % 4 + reg * 4) * f.elements", "(lane % 4 * 4 + reg) * f.elements"),
    "the outputs of sums": ("return lane / 4 + reg / 2 * 8", "return lane / 4 + reg % 2 * 8"),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if "metadata" in name else [pytest.mark.slow]) for name in MISTAKES],
)
def test_a_mistake_in_the_layout_is_noticed(tmp_path, name):
    wrong = compile_changed(tmp_path, KERNELS, "fragments.h", lambda text: text.replace(*MISTAKES[name]))
    with pytest.raises((AssertionError, EmulatorError)):
        check_linears(Emulated(wrong), np.random.default_rng(0), 8)


def test_a_missing_barrier_is_noticed(tmp_path):
    wrong = compile_changed(tmp_path, KERNELS, "linear.cu", without_barrier(0))
    code = (
        "import sys, numpy as np; from pathlib import Path;"
        "from cuda_cases import check_linears; from emulated_cuda import Emulated;"
        "check_linears(Emulated(Path(sys.argv[1])), np.random.default_rng(0), 12)"
    )
    here = Path(__file__).parent
    child = subprocess.run([sys.executable, "-c", code, wrong], cwd=here, capture_output=True, text=True)
    assert child.returncode != 0 and "AssertionError" in child.stderr, child.stderr


@pytest.mark.parametrize(
    ("shape", "dtype", "format", "message"),
    [
        ((16, 96), np.int8, "int8_2_4", "outputs in multiples of 16 and inputs of 64, not 16 x 96"),
        ((24, 64), np.int8, "int8", "outputs in multiples of 16 and inputs of 32, not 24 x 64"),
        ((16, 64), np.float32, "float16", "float16 weights must be float16, not float32"),
        ((16, 64), np.int8, "int8_2_4", "more than two nonzero weights in a group of four inputs"),
    ],
)
def test_weights_that_do_not_fit_are_refused(shape, dtype, format, message):
    with pytest.raises(ValueError, match=message):
        cuda_linear.pack(np.ones(shape, dtype), format)


def test_c_refuses_them_too(emulated):
    lib, ffi = emulated.lib, emulated.ffi
    full, packed = np.ones((16, 64), np.int8), np.zeros(1024, np.uint8)
    pointers = [ffi.cast("void *", array.ctypes.data) for array in (full, packed)]
    assert lib.ds_cuda_packed_size(0, 16, 64) == 16 * 64
    assert lib.ds_cuda_packed_size(1, 16, 64) == 16 * 64 // 2 + 16 * 16 // 2
    assert lib.ds_cuda_pack(1, 16, 64, *pointers) == 1, "more than two in a group"
    for format, n, k in (
        (0, 8, 64),
        (1, 16, 96),
        (2, 16, 8),
        (3, 16, 48),
        (4, 16, 64),
        (-1, 16, 64),
        (0, 16, 0),
    ):
        assert lib.ds_cuda_packed_size(format, n, k) == -1
        assert lib.ds_cuda_pack(format, n, k, *pointers) == 1
    for rows in (0, 33):
        nothing = [ffi.NULL] * 2
        assert lib.ds_cuda_linear(0, 16, 64, *nothing, rows, *nothing, ffi.NULL, ffi.NULL) == 1


def test_the_binding_packs_as_the_library_does(emulated, monkeypatch):
    monkeypatch.setattr(cuda, "open_library", lambda: (emulated.ffi, emulated.lib))
    for format in cuda_linear.FORMATS:
        weight = draw_weight(np.random.default_rng(5), format, 32, 128)
        assert (cuda_linear.pack(weight, format) == emulated.pack(format, weight)).all()
        assert (cuda_linear.pack(np.asfortranarray(weight), format) == emulated.pack(format, weight)).all()


def test_a_library_that_is_not_built_is_named(monkeypatch, tmp_path):
    cuda.open_library.cache_clear()
    monkeypatch.setattr(cuda, "find_library", lambda: tmp_path / "none.so")
    with pytest.raises(BundleError, match="the CUDA kernels are not built"):
        cuda_linear.pack(np.zeros((16, 64), np.int8), "int8")

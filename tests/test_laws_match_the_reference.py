"""Temperature, top-k and top-p give Hugging Face's laws, ties and all; uniforms are NumPy's Philox."""

import itertools
import math
import subprocess
from pathlib import Path

import numpy as np
import pytest
from draftsmith.speculate import sampling
from draftsmith.speculate.binding import ffi, lib, view
from draftsmith.speculate.errors import BundleError

NATIVE = Path(__file__).parents[1] / "speculate" / "native"


def reference(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """transformers' warpers, in the order in which its `generate` applies them, on float64 scores."""
    torch = pytest.importorskip("torch")
    warpers = pytest.importorskip("transformers.generation.logits_process")
    scores = torch.tensor(logits, dtype=torch.float64)
    if temperature != 1:
        scores = warpers.TemperatureLogitsWarper(temperature)(None, scores)
    if top_k:
        scores = warpers.TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = warpers.TopPLogitsWarper(top_p)(None, scores)
    return scores.softmax(dim=-1).numpy()


def assert_same_law(logits, temperature=1.0, top_k=0, top_p=1.0):
    ours = sampling.laws(logits, temperature, top_k, top_p)
    theirs = reference(logits, temperature, top_k, top_p)
    if logits.shape[1] > 16:
        # Which of the equals at top-p's cut stay is left to torch's sort, which is not stable on long rows.
        # Compare how many do.
        equals = logits + 0.0  # -0 is 0
        ours, theirs = (np.take_along_axis(x, np.lexsort((x, equals)), axis=1) for x in (ours, theirs))
    np.testing.assert_array_equal(ours > 0, theirs > 0)
    np.testing.assert_allclose(ours, theirs, rtol=1e-13, atol=0)


SIZES = [1, 2, 3, 5, 63, 64, 65, 127, 1000]
SETTINGS = list(itertools.product([1.0, 0.3, 0.7, 2.5], [0, 1, 2, 40, 999], [1.0, 0.95, 0.5, 0.05]))


@pytest.mark.parametrize("vocab", SIZES)
def test_every_mix_of_settings_is_hugging_faces(vocab):
    logits = np.random.default_rng(vocab).normal(size=(4, vocab)).astype(np.float32) * 4
    for temperature, top_k, top_p in SETTINGS:
        assert_same_law(logits, temperature, top_k, top_p)


@pytest.mark.parametrize("vocab", SIZES)
def test_ties_are_cut_as_hugging_face_cuts_them(vocab):
    """Logits of few values, so that every cut falls among equals, and signed zeros, which are equal too."""
    rng = np.random.default_rng(vocab + 1)
    for values in ([0.0, -0.0], [-1.0, 0.0, -0.0, 1.5], [-0.5, 0.5, 3.0]):
        logits = rng.choice(np.array(values, dtype=np.float32), size=(3, vocab))
        for top_k in (0, 1, 2, 3, 10, 64, 100):
            for top_p in (1.0, 0.9301, 0.6103, 0.1707):  # no whole number of a row's equals: no rounding
                assert_same_law(logits, 1.0, top_k, top_p)
                assert_same_law(logits, 0.5, top_k, top_p)


@pytest.mark.parametrize("top_p", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_mass_that_meets_top_p_exactly_is_enough(top_p):
    """Four equals of mass 1/4, so that sums are exact: what is dropped may weigh exactly 1 - top_p."""
    assert_same_law(np.zeros((1, 4), dtype=np.float32), top_p=top_p)
    assert_same_law(np.array([[0, -np.inf, 0, 0, -np.inf, 0]], dtype=np.float32), top_p=top_p)


@pytest.mark.parametrize("shape", ["peaked", "flat", "bell", "heavy", "constant"])
def test_a_real_vocabulary_of_any_shape_is_cut_right(shape):
    rng = np.random.default_rng(0)
    logits = {
        "peaked": rng.normal(size=49152) * 6,
        "flat": rng.normal(size=49152) * 1e-3,
        "bell": rng.normal(size=49152) * 2 - 7,
        "heavy": rng.standard_cauchy(size=49152),
        "constant": np.zeros(49152),
    }[shape].astype(np.float32)[None]
    for top_k, top_p in [(0, 1.0), (50, 1.0), (3000, 1.0), (0, 0.9), (0, 0.999), (50, 0.9), (3000, 0.6)]:
        assert_same_law(logits, 0.8, top_k, top_p)


def test_minus_infinity_has_no_mass_and_is_never_kept():
    logits = np.array([[-np.inf, 1.0, -np.inf, 0.5, -np.inf]], dtype=np.float32)
    for top_k, top_p in itertools.product([0, 1, 2, 3, 4, 5], [1.0, 0.99, 0.3]):
        law = sampling.laws(logits, 1.0, top_k, top_p)[0]
        assert not law[[0, 2, 4]].any() and law.sum() == pytest.approx(1, abs=1e-15)
        assert_same_law(logits, 1.0, top_k, top_p)


def test_temperature_0_is_one_hot_at_the_first_of_the_largest():
    rng = np.random.default_rng(1)
    for vocab in SIZES:
        logits = rng.integers(-2, 3, size=(20, vocab)).astype(np.float32)
        for top_k, top_p in [(0, 1.0), (1, 0.1), (7, 0.9)]:
            np.testing.assert_array_equal(
                sampling.laws(logits, 0.0, top_k, top_p), np.eye(vocab)[logits.argmax(axis=1)]
            )


def test_extreme_logits_and_temperatures_stay_laws():
    logits = np.array([[3e38, -3e38, 0, 1e-45], [700, 0, -700, -1e4]], dtype=np.float32)
    for temperature in (1e-300, 1e-3, 1.0, 1e300):
        law = sampling.laws(logits, temperature)
        assert np.isfinite(law).all() and (law >= 0).all()
        np.testing.assert_allclose(law.sum(axis=1), 1, atol=1e-15)
    np.testing.assert_array_equal(sampling.laws(logits, 1e-300), np.eye(4)[[0, 0]])
    np.testing.assert_allclose(sampling.laws(logits, 1e300), 0.25)


def test_exp_is_within_an_ulp():
    """A row [0, x] has the law 1 / (1 + e^x), e^x / (1 + e^x); their ratio is e^x in a few roundings."""
    x = -np.concatenate([np.linspace(0, 707.9, 40001), np.geomspace(1e-12, 1, 2001)]).astype(np.float32)
    law = sampling.laws(np.stack([np.zeros_like(x), x], axis=1))
    exact = np.exp(x.astype(np.longdouble))
    error = abs(law[:, 1] / law[:, 0] - exact) / exact
    assert error.max() < 4 * 2.0**-53
    assert sampling.laws(np.array([[0, -800]], dtype=np.float32))[0, 1] == 0


def test_any_float_input_is_read_as_float32_rows():
    logits = np.random.default_rng(2).normal(size=(6, 40)).astype(np.float32)
    wanted = sampling.laws(logits, 0.7, 5, 0.9)
    for same in (logits.astype(np.float64), np.asfortranarray(logits), np.repeat(logits, 2, axis=1)[:, ::2]):
        np.testing.assert_array_equal(sampling.laws(same, 0.7, 5, 0.9), wanted)
    for row in range(6):  # a law depends on its own row only
        np.testing.assert_array_equal(sampling.laws(logits[row : row + 1], 0.7, 5, 0.9)[0], wanted[row])
    assert sampling.laws(np.empty((0, 7))).shape == (0, 7)


@pytest.mark.parametrize(
    "logits, settings, message",
    [
        ([[0.0, np.nan]], {}, "row 0 of the logits holds NaN"),
        ([[0.0, 1.0], [-np.nan, 1.0]], {}, "row 1 of the logits holds NaN"),
        ([[0.0, np.nan]], {"temperature": 0}, "row 0 of the logits holds NaN"),
        ([[np.inf, 0.0]], {}, "the largest logit of row 0 is inf"),
        ([[-np.inf, -np.inf]], {}, "the largest logit of row 0 is -inf"),
        ([[0.0]], {"temperature": -1}, "temperature is -1"),
        ([[0.0]], {"temperature": np.nan}, "temperature is nan"),
        ([[0.0]], {"temperature": np.inf}, "temperature is inf"),
        ([[0.0]], {"top_k": -1}, "top_k is -1"),
        ([[0.0]], {"top_k": 1.5}, "top_k is 1.5"),
        ([[0.0]], {"top_p": 1.1}, "top_p is 1.1"),
        ([[0.0]], {"top_p": np.nan}, "top_p is nan"),
        ([0.0], {}, r"logits have shape \[1\]; \[S, V\]"),
        (np.empty((3, 0)), {}, r"logits have shape \[3, 0\]"),
        ([["a"]], {}, "logits cannot be read"),
    ],
)
def test_what_is_wrong_with_an_input_is_said(logits, settings, message):
    with pytest.raises(BundleError, match=message):
        sampling.laws(logits, **settings)


def test_argmax_is_the_first_largest():
    rng = np.random.default_rng(3)
    for vocab in SIZES:
        for _ in range(50):
            row = rng.choice(np.array([-np.inf, -1, -0.0, 0.0, 2.5, np.inf], dtype=np.float32), size=vocab)
            assert lib.ds_argmax(view("float[]", row), vocab) == row.argmax()
            row[rng.integers(vocab)] = np.nan
            assert lib.ds_argmax(view("float[]", row), vocab) == lib.DS_ERROR_ARGUMENT


# ---- One machine's bits are every machine's ----------------------------------------------------------------


def test_neither_optimization_nor_vector_width_changes_a_bit(tmp_path):
    """Laws and chains, compiled at -O0, and at -O3 for AVX2 and FMA, are those of the installed library."""
    logits = np.random.default_rng(4).normal(size=(3, 4099)).astype(np.float32) * 3
    p, q = sampling.laws(logits, 0.9), sampling.laws(logits[:2] * 0.8, 1.1, 0, 0.95)
    draft, uniforms = np.array([5, 7], np.int32), np.array([0.9, 0.8, 0.1, 0.4])
    builds = [["-O0", "-DDS_WIDE="]]
    if "avx2" in Path("/proc/cpuinfo").read_text():
        builds.append(["-O3", "-DDS_WIDE=", "-mavx2", "-mfma", "-fno-trapping-math"])
    sources = [NATIVE / f"{name}.c" for name in ("error", "sampling", "verify")]
    common = ["gcc", "-std=c11", "-shared", "-fPIC", "-ffp-contract=off", "-Wl,--no-undefined", *sources]
    for i, flags in enumerate(builds):
        library = tmp_path / f"{i}.so"
        subprocess.run([*common, *flags, "-o", library, "-lm"], check=True, timeout=300)
        other = ffi.dlopen(str(library))
        for settings in ((0.9, 0, 1.0), (0.7, 50, 1.0), (1.3, 0, 0.9), (1.0, 300, 0.5)):
            laws = np.empty((3, 4099))
            given, made = view("float[]", logits), view("double[]", laws)
            assert other.ds_laws_from_logits(given, 3, 4099, *settings, made) == 0
            np.testing.assert_array_equal(laws, sampling.laws(logits, *settings))
        for rule in (lib.DS_RULE_TOKEN, lib.DS_RULE_BLOCK, lib.DS_RULE_EXACT):
            out = [ffi.new("int32_t[2]") for _ in range(2)]
            for build, result in zip((lib, other), out, strict=True):
                build.ds_verify_chain(
                    rule, 2, 4099, view("double[]", p), view("double[]", q), view("int32_t[]", draft),
                    view("double[]", uniforms), result, result + 1,
                )  # fmt: skip
            assert list(out[0]) == list(out[1])


# ---- Uniforms ----------------------------------------------------------------------------------------------


def numpy_philox(seed: int, stream: int, n: int) -> np.ndarray:
    """NumPy's counter steps before it is used, so it starts one block before 0."""
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=[2**64 - 1] * 4)).random(n)


@pytest.mark.parametrize("seed, stream", [(0, 0), (1, 0), (0, 1), (2**64 - 1, 2**63), (12345, 678910)])
def test_uniforms_are_numpys_philox(seed, stream):
    np.testing.assert_array_equal(sampling.uniforms(seed, stream, 0, 1001), numpy_philox(seed, stream, 1001))


def test_golden_uniforms():
    """Philox4x64-10 of Random123's known answers, key 0 and counter 0: 16554d9eca36314c db20fe9d672d0fdc …"""
    words = [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]
    assert sampling.uniforms(0, 0, 0, 4).tolist() == [(word >> 11) / 2**53 for word in words]


def test_a_uniform_depends_on_its_counter_alone():
    whole = sampling.uniforms(7, 3, 0, 64)
    for start, n in itertools.product(range(10), range(10)):
        np.testing.assert_array_equal(sampling.uniforms(7, 3, start, n), whole[start : start + n])
    wrapped = sampling.uniforms(7, 3, 2**64 - 2, 4)
    np.testing.assert_array_equal(wrapped[2:], whole[:2])
    np.testing.assert_array_equal(sampling.uniforms(7 + 2**64, 3 - 2**64, 0, 64), whole)
    with pytest.raises(BundleError, match="-1 uniforms"):
        sampling.uniforms(0, 0, 0, -1)


def test_uniforms_are_even_and_streams_are_unrelated():
    """A chi-square test of 256 cells and of pairs, and correlations between neighbours, streams and seeds."""
    n = 1 << 18
    base = sampling.uniforms(1, 1, 0, n)
    assert base.min() >= 0 and base.max() < 1
    for sample, cells in ((base * 256, 256), ((base[::2] * 16).astype(int) * 16 + base[1::2] * 16, 256)):
        counts = np.bincount(sample.astype(int), minlength=cells)
        statistic = ((counts - len(sample) / cells) ** 2).sum() / (len(sample) / cells)
        assert abs(statistic - (cells - 1)) < 5 * math.sqrt(2 * cells)
    for other in (
        sampling.uniforms(1, 1, 1, n),
        sampling.uniforms(1, 2, 0, n),
        sampling.uniforms(2, 1, 0, n),
    ):
        assert abs(np.corrcoef(base, other)[0, 1]) < 5 / math.sqrt(n)

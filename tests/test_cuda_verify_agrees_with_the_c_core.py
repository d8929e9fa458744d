"""The CUDA kernels, run on the CPU thread by thread, accept and draw what the C core does.

The same source is compiled by nvcc for GPUs. Sums over the vocabulary have another order there than in C, so
laws are compared to rounding, and what follows from them exactly.
"""

import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from cuda_cases import check_chains, check_kseq, check_trees
from draftsmith.speculate import sampling, verify
from draftsmith.speculate.errors import BundleError
from emulated_cuda import (
    SOURCES,
    Emulated,
    EmulatorError,
    compile_changed,
    compile_emulated,
    without_barrier,
)

NUM_CASES, MANY_CASES = 120, 100_000

KERNELS = tuple(SOURCES / f"{name}.cu" for name in ("verify", "verify_tree", "verify_kseq"))


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    path = tmp_path_factory.mktemp("emulated") / "libverify.so"
    compile_emulated(path, *KERNELS)
    return path


@pytest.fixture
def cuda(library):
    emulated = Emulated(library)
    emulated.order(0)
    return emulated


def test_laws_and_verdicts(cuda):
    check_chains(cuda, np.random.default_rng(0), NUM_CASES, largest_vocab=1_000)


def test_laws_and_verdicts_of_a_large_vocabulary(cuda):
    check_chains(cuda, np.random.default_rng(1), 12)


def test_trees(cuda):
    check_trees(cuda, np.random.default_rng(6), 120, largest_vocab=400)
    check_trees(cuda, np.random.default_rng(7), 8)


def test_several_drafts_of_one_token(cuda):
    check_kseq(cuda, np.random.default_rng(10), 120, largest_vocab=1_000)
    check_kseq(cuda, np.random.default_rng(11), 12)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_hundred_thousand_cases_over_all_rules(cuda):
    """As many of every rule, a fifth of them over the whole range of vocabularies."""
    rules = len(verify.RULES) + len(verify.TREE_RULES) + 2  # greedy chains and K-SEQ
    each = -(-MANY_CASES // rules)
    chains = partial(check_chains, filtered=0.1)
    for seed, check in ((2, chains), (4, check_trees), (6, check_kseq)):
        check(cuda, np.random.default_rng(seed), each * 4 // 5, largest_vocab=300)
        check(cuda, np.random.default_rng(seed + 1), each - each * 4 // 5)


@pytest.mark.parametrize("counter", [0, 3, 2**33 + 1, 2**64 - 3])
def test_random_numbers_are_the_same_to_the_bit(cuda, counter):
    expected = sampling.uniforms(2**63 + 11, 7, counter, 200)
    assert (cuda.uniforms(2**63 + 11, 7, counter, 200) == expected).all()


@pytest.mark.parametrize("row", [[0.0, np.nan, 1.0], [-np.inf] * 3, [0.0, np.inf, 1.0], [-np.nan, 0.0, 1.0]])
def test_logits_without_a_law_are_told_apart(cuda, row):
    logits = np.array([row], np.float32)
    with pytest.raises(BundleError):
        sampling.laws(logits, 1.0)
    laws = cuda.laws(logits)
    assert (laws == 0).all()
    assert cuda.chain(verify.RULES["token"], laws, None, np.empty(0, np.int32), np.zeros(2)) == (0, -1)
    assert cuda.greedy(logits, np.empty(0, np.int32)) == (0, -1)


def test_an_accepted_path_becomes_part_of_the_sequence(cuda):
    rng = np.random.default_rng(4)
    for heads, width, start in ((1, 2, 0), (3, 64, 5), (2, 200, 40)):
        caches = [rng.normal(size=(heads, 64, width)).astype(np.float16) for _ in range(4)]
        steps = rng.integers(1, 4, 7)
        slots = (start + np.cumsum(steps) - 1).astype(np.int32)
        expected = [cache.copy() for cache in caches]
        for cache in expected:
            cache[:, start : start + len(slots)] = cache[:, slots]
        cuda.compact(caches, slots, start)
        for cache, wanted in zip(caches, expected, strict=True):
            assert (cache == wanted).all()


def barriers():
    """Places of every barrier of the kernels, as (file, number)."""
    found = []
    for name in ("block.cuh", "laws.cuh", "verify.cu", "verify_tree.cu"):
        found += [(name, i) for i in range((SOURCES / name).read_text().count("__syncthreads();"))]
    return found


@pytest.mark.parametrize(
    ("file", "number"),
    [
        pytest.param(*place, marks=[] if place == ("block.cuh", 0) else [pytest.mark.slow])
        for place in barriers()
    ],
)
def test_a_missing_barrier_is_noticed(tmp_path, file, number):
    library = compile_changed(tmp_path, [path.name for path in KERNELS], file, without_barrier(number))
    # In a process of its own: what is read too early may be an address.
    code = (
        "import sys, numpy as np; from pathlib import Path;"
        "from cuda_cases import check_chains, check_kseq, check_trees; from emulated_cuda import Emulated;"
        "cuda = Emulated(Path(sys.argv[1]));"
        "check_chains(cuda, np.random.default_rng(5), 100, largest_vocab=300);"
        "check_trees(cuda, np.random.default_rng(5), 100, largest_vocab=300);"
        "check_kseq(cuda, np.random.default_rng(5), 100, largest_vocab=300)"
    )
    here = Path(__file__).parent
    child = subprocess.run([sys.executable, "-c", code, library], cwd=here, capture_output=True, text=True)
    assert child.returncode != 0, "nothing happened"
    assert child.returncode < 0 or "AssertionError" in child.stderr or "EmulatorError" in child.stderr


def test_a_barrier_that_some_threads_never_reach_is_an_error(tmp_path):
    source = tmp_path / "parted.cu"
    source.write_text(
        '#include "' + str(SOURCES / "block.cuh") + '"\n'
        "__global__ void parted(int *out) {\n"
        "  if (threadIdx.x < 40) __syncthreads();\n"
        "  out[threadIdx.x] = 1;\n"
        "}\n"
        'extern "C" __attribute__((visibility("default"))) int ds_cuda_uniforms(\n'
        "    uint64_t, uint64_t, uint64_t, int32_t, int *out, void *stream) {\n"
        "  LAUNCH(parted, 1, draftsmith::THREADS, stream, out);\n"
        "  return LAUNCH_STATUS();\n"
        "}\n"
    )
    compile_emulated(tmp_path / "parted.so", source)
    with pytest.raises(EmulatorError, match=r"threads part: 0 waits at a barrier in line 3, 40 has ended"):
        Emulated(tmp_path / "parted.so").uniforms(0, 0, 0, 64)

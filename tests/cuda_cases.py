"""Random cases for the CUDA kernels, emulated or on a GPU, held against the C core."""

import numpy as np
from draftsmith.speculate import kernels, sampling, verify
from draftsmith.speculate.cuda_linear import FORMATS, MOST_ROWS

LARGEST_VOCAB, LONGEST_DRAFT = 50_000, 16


def draw_vocab(rng, largest):
    """From 3 to `largest`, as often in each octave."""
    return int(np.exp(rng.uniform(np.log(3), np.log(largest + 1))))


def draw_case(rng, largest_vocab, filtered):
    """Logits of target and drafter, settings, and a draft: sampled from the drafter's law, or without one."""
    vocab = draw_vocab(rng, largest_vocab)
    n_draft = int(rng.integers(0, LONGEST_DRAFT + 1))
    target = rng.normal(size=(n_draft + 1, vocab)) * rng.uniform(0.2, 6)
    drafter = target[:-1] + rng.normal(size=(n_draft, vocab)) * rng.choice([0.0, 0.3, 1.0, 3.0])
    if rng.random() < 0.3:  # logits with many equals
        target, drafter = np.round(target), np.round(drafter)
    settings = {
        "temperature": float(rng.choice([0.0, 0.3, 1.0, 1.7], p=[0.1, 0.2, 0.5, 0.2])),
        "top_k": int(rng.choice([1, 7, 40]) if rng.random() < filtered else 0),
        "top_p": float(rng.choice([0.95, 0.7, 0.1]) if rng.random() < filtered else 1),
    }
    return target.astype(np.float32), drafter.astype(np.float32), settings


def draw_draft(rng, p, q):
    if q is None:
        likely = p[:-1].argmax(axis=1) if len(p) > 1 else np.empty(0)
        return np.where(rng.random(len(p) - 1) < 0.7, likely, rng.integers(0, p.shape[1], len(p) - 1))
    cumulative = np.cumsum(q, axis=1)
    return [int(np.searchsorted(row, rng.random() * row[-1], side="right")) for row in cumulative]


def check_chains(cuda, rng, num_cases, largest_vocab=LARGEST_VOCAB, filtered=0.5):
    """Each case under every rule. `filtered`: the share of cases with top-k, and of those with top-p."""
    accepted = dict.fromkeys(verify.RULES, 0)
    for case in range(num_cases):
        target, drafter, settings = draw_case(rng, largest_vocab, filtered)
        cuda.order(case % 5)
        p, p_cuda = sampling.laws(target, **settings), cuda.laws(target, **settings)
        q = q_cuda = None
        if rng.random() < 0.8 and len(drafter):
            q, q_cuda = sampling.laws(drafter, **settings), cuda.laws(drafter, **settings)
        for exact, near in ((p, p_cuda), (q, q_cuda)):
            if exact is not None:
                assert ((exact > 0) == (near > 0)).all(), (case, settings)
                np.testing.assert_allclose(near, exact, rtol=1e-12)
        draft = np.array(draw_draft(rng, p, q), np.int32)
        uniforms = cuda.uniforms(case, 3, 5, len(draft) + 2)
        for rule, number in verify.RULES.items():
            expected = verify.chain_of_laws(rule, p, q, draft, uniforms)
            assert cuda.chain(number, p_cuda, q_cuda, draft, uniforms) == expected, (case, rule, settings)
            accepted[rule] += expected[0]
        assert cuda.greedy(target, draft) == verify.greedy(target, draft)
    assert min(accepted.values()) > num_cases // 4, "cases must get somewhere"


LARGEST_TREE = 64


def check_trees(cuda, rng, num_cases, largest_vocab=LARGEST_VOCAB):
    """Each tree under every rule; siblings are drawn independently, so that some are equal."""
    accepted = dict.fromkeys(verify.TREE_RULES, 0)
    for case in range(num_cases):
        cuda.order(case % 5)
        vocab = draw_vocab(rng, largest_vocab)
        count = int(rng.integers(0, LARGEST_TREE + 1)) if vocab < 5_000 else int(rng.integers(0, 9))
        width = int(rng.integers(1, 8))
        parents = np.array([rng.integers(max(-1, i - 1 - width), i) for i in range(count)], np.int32)
        target = rng.normal(size=(count + 1, vocab)) * rng.uniform(0.2, 4)
        drafter = target + rng.normal(size=target.shape) * rng.choice([0.0, 0.5, 2.0])
        p = cuda.laws(target.astype(np.float32))
        q = cuda.laws(drafter.astype(np.float32)) if rng.random() < 0.8 else None
        rows = np.cumsum(p if q is None else q, axis=1)
        draws = [np.searchsorted(rows[parent + 1], rng.random() * 0.999999) for parent in parents]
        tokens = np.array(draws, np.int32)
        uniforms = cuda.uniforms(case, 9, 2, count + 2)
        for rule, number in verify.TREE_RULES.items():
            expected = verify.tree_of_laws(rule, p, q, tokens, parents, uniforms)
            assert cuda.tree(number, p, q, tokens, parents, uniforms) == expected, (case, rule)
            accepted[rule] += len(expected[0])
    assert min(accepted.values()) > num_cases // 4, "cases must get somewhere"


def check_kseq(cuda, rng, num_cases, largest_vocab=LARGEST_VOCAB):
    """Up to 16 drafts of one token, from laws that are near, far or equal."""
    accepted = 0
    for case in range(num_cases):
        cuda.order(case % 5)
        vocab = draw_vocab(rng, largest_vocab)
        target = rng.normal(size=(1, vocab)) * rng.uniform(0.2, 6)
        drafter = target + rng.normal(size=target.shape) * rng.choice([0.0, 0.3, 1.0, 3.0])
        p, q = (sampling.laws(logits.astype(np.float32))[0] for logits in (target, drafter))
        count = rng.choice([1, 2, 4, LONGEST_DRAFT])
        drafts = np.searchsorted(np.cumsum(q), rng.random(count) * 0.999999)
        drafts, uniforms = drafts.astype(np.int32), cuda.uniforms(case, 1, 4, len(drafts) + 1)
        expected = verify.kseq(p, q, drafts, uniforms)
        assert cuda.kseq(p, q, drafts, uniforms) == expected, case
        accepted += expected[1] >= 0
    assert num_cases // 4 < accepted <= num_cases - num_cases // 20, "cases must get somewhere"


def draw_weight(rng, format, n, k):
    """[n, k], of a 2:4 format with two, one or none that is not zero in each group of four inputs."""
    if format.startswith("int8"):
        weight = rng.integers(-127, 128, (n, k), dtype=np.int8)
    else:
        weight = rng.normal(size=(n, k)).astype(np.float16)
    if format.endswith("2_4"):
        order = rng.permuted(np.tile(np.arange(4), (n, k // 4, 1)), axis=2)
        kept = rng.choice(3, (n, k // 4, 1), p=[0.1, 0.2, 0.7])
        weight[(order >= kept).reshape(n, k)] = 0
    return weight


def check_linear(cuda, rng, format, n, k, num_rows):
    """int8: the sums of int64, and to the bit what the C core gives. float16: near float64, and a row gives
    the same bits whatever stands beside it."""
    weight = draw_weight(rng, format, n, k)
    packed = cuda.pack(format, weight)
    if format.startswith("int8"):
        x = rng.integers(-127, 128, (num_rows, k), dtype=np.int8)
        ones = np.ones(max(n, num_rows), np.float32)
        sums = x.astype(np.int64) @ weight.T.astype(np.int64)
        assert (cuda.linear(format, packed, n, x, ones, ones) == sums.astype(np.float32)).all()
        scales = rng.uniform(1e-4, 1e-2, n).astype(np.float32)
        pool = kernels.Pool(1)
        rows = kernels.quantize_rows(pool, rng.normal(size=(num_rows, k)).astype(np.float32))
        quantized, row_scales, _ = kernels.split_rows(rows, k)
        expected = kernels.linear(pool, kernels.make_linear(weight, format, scales), rows)
        found = cuda.linear(format, packed, n, np.ascontiguousarray(quantized), scales, row_scales)
        assert (found == expected).all()
    else:
        x = rng.normal(size=(num_rows, k)).astype(np.float16)
        found = cuda.linear(format, packed, n, x)
        wide, transposed = x.astype(np.float64), weight.T.astype(np.float64)
        assert (np.abs(found - wide @ transposed) <= 1e-6 * (np.abs(wide) @ np.abs(transposed))).all()
        row = rng.integers(num_rows)
        assert (cuda.linear(format, packed, n, x[row : row + 1].copy()) == found[row]).all()


def check_linears(cuda, rng, num_cases):
    for case in range(num_cases):
        cuda.order(case % 5)
        format = FORMATS[case % len(FORMATS)]
        step = 64 if format == "int8_2_4" else 32
        n, k = 16 * int(rng.integers(1, 4)), step * int(rng.integers(1, 20))
        check_linear(cuda, rng, format, n, k, num_rows=int(rng.integers(1, MOST_ROWS + 1)))

"""Random cases for the CUDA kernels, emulated or on a GPU, held against the C core."""

import numpy as np
from draftsmith.speculate import sampling, verify

LARGEST_VOCAB, LONGEST_DRAFT = 50_000, 16


def draw_case(rng, largest_vocab, filtered):
    """Logits of target and drafter, settings, and a draft: sampled from the drafter's law, or without one."""
    vocab = int(np.exp(rng.uniform(np.log(3), np.log(largest_vocab + 1))))
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


def check_cases(cuda, rng, num_cases, largest_vocab=LARGEST_VOCAB, filtered=0.5):
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

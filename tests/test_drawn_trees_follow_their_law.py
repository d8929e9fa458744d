"""Trees of one shape whose nodes a model draws (Sequoia): the shape is the best there is by what was accepted
so far, its tokens are drawn as the rules want them, and the output has the target's law."""

import math
from collections import Counter
from functools import cache

import numpy as np
import pytest
from decoding import decode
from draftsmith.speculate.ladder import Rung, build_ladder
from draftsmith.speculate.settings import Sampling
from fake_engine import FakeEngine
from test_models_draft_trees_losslessly import Stubborn, Watched, costs_of, engines_of, paths_in
from test_sampling_keeps_the_target_law import enumerate_target, g_statistic, largest_error, process
from test_trees_are_drafted_losslessly import RULE_NAMES, TreeBranches

GREEDY = Sampling()

# ---- The law -----------------------------------------------------------------------------------------------


def list_verdicts(rule, p, q, tokens, parents):
    """All outcomes (probability, path, next token) of a rule for a tree whose siblings were drawn without
    replacement from the rows of q; an oracle in plain numpy."""
    children = {node: [i for i, up in enumerate(parents) if up == node] for node in range(-1, len(tokens))}

    def ends(node, path, weight, law):
        for token, mass in enumerate(law):
            if weight * mass > 0:
                yield weight * mass, path, token

    def without(keep, law, drawn, token):
        """What is left of a law and of the drafter's behind a rejected child; the law's mass comes third."""
        rest = np.maximum(keep * law - drawn, 0)
        after = np.where(np.arange(len(drawn)) == token, 0, drawn)
        total = rest.sum()
        return rest / total if total > 0 else law, after / max(after.sum(), 1e-300), total

    def descend(node, path, weight):  # RRSw
        law, drawn = p[node + 1], q[node + 1]
        for child in children[node]:
            token = tokens[child]
            accept = min(1.0, law[token] / drawn[token])
            if accept > 0:
                yield from descend(child, [*path, child], weight * accept)
            weight *= 1 - accept
            if weight < 1e-15:
                return
            law, drawn, _ = without(1.0, law, drawn, token)
        yield from ends(node, path, weight, law)

    def visit(node, path, keep):  # arXiv 2505.12398; (probability, None, None): nothing was accepted
        law, drawn, alive = p[node + 1], q[node + 1], 1.0
        for child in children[node]:
            token, rejected = tokens[child], 0.0
            below = min(1, keep * law[token] / drawn[token])
            for chance, accepted, after in visit(child, [*path, child], below):
                if accepted is None:
                    rejected = chance
                else:
                    yield alive * chance, accepted, after
            alive *= rejected
            if alive < 1e-15:
                return
            law, drawn, total = without(keep, law, drawn, token)
            keep = total / (total + 1 - keep) if total + 1 - keep > 0 else 1.0
        kept = 1.0 if node < 0 else keep
        yield from ends(node, path, alive * kept, law)
        yield alive * (1 - kept), None, None

    outcomes = descend(-1, [], 1.0) if rule == "rrs" else visit(-1, [], 1.0)
    return [outcome for outcome in outcomes if outcome[1] is not None]


class DrawnBranches(TreeBranches):
    sampled = branching = 0

    def list_verdicts(self, rule, p, q, tokens, parents):
        if q is None or not tokens:
            return super().list_verdicts(rule, p, None, tokens, parents)
        for node in range(-1, len(tokens)):
            family = [token for token, up in zip(tokens, parents, strict=True) if up == node]
            assert len(set(family)) == len(family), "siblings are drawn without replacement"
            assert not family or q[node + 1].sum() == pytest.approx(1, abs=1e-12)
            assert all(q[node + 1][token] > 0 for token in family)
        self.sampled = max(self.sampled, len(tokens))
        self.branching += parents != list(range(-1, len(tokens) - 1))
        return list_verdicts(RULE_NAMES[rule], p, np.vstack([q, np.ones_like(q[:1])]), tokens, parents)


def enumerate_loop(engines, rungs, rule, prompt, length, eos=(), costs=None):
    law, branches = Counter(), DrawnBranches()
    for branch in branches:
        out = decode(engines, rungs, prompt, length, Sampling(1.0, rule=rule), eos, costs, branch.verify)
        law[tuple(out.tokens)] += branch.weight
    assert math.isclose(sum(law.values()), 1, abs_tol=1e-12)
    return law, branches


@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize(
    "vocab, rungs, length, priced",
    [
        (2, [Rung("int8-sequoia", 24)], 4, False),
        (2, [Rung("int8-sequoia", 8)], 5, True),
        (2, [Rung("int8-sequoia", 3)], 6, False),
        (3, [Rung("int8-sequoia", 24)], 3, False),
        (3, [Rung("int8-sequoia", 8)], 4, False),
        (2, [Rung("skip-sequoia", 24)], 4, False),
        (2, [Rung("int4-sequoia", 24), Rung("int8", 3)], 4, False),
        (2, [Rung("int4-sequoia", 24), Rung("int8", 3)], 4, True),
    ],
    ids=str,
)
def test_the_law_of_a_loop_over_drawn_trees_is_exact(rule, vocab, rungs, length, priced):
    engines, prompt = engines_of(vocab, 5, scale=1), [0, 1, 0]
    law, branches = enumerate_loop(
        engines, rungs, rule, prompt, length, costs=costs_of(*engines) if priced else None
    )
    assert priced or length == 6 or branches.branching > 0, "there must be trees for this to show anything"
    assert largest_error(law, enumerate_target(engines["target"], prompt, length, ())) < 1e-12


@pytest.mark.parametrize("rule", ["token", "block"])
def test_the_law_is_exact_where_a_law_runs_out_of_tokens_and_texts_end(rule):
    engines = {"target": FakeEngine(3, 2, scale=1), "int8": Stubborn(3, 2, noise=0.5, scale=1)}
    law, branches = enumerate_loop(engines, [Rung("int8-sequoia", 20)], rule, [0, 1], 4, eos=(2,))
    assert branches.branching
    assert largest_error(law, enumerate_target(engines["target"], [0, 1], 4, (2,))) < 1e-12


@pytest.mark.parametrize("rule", ["token", "block", "exact"])
def test_the_shipped_rules_sample_the_targets_law(rule):
    """With top-k, so that laws run out; over a few rounds, so that the shape is learnt."""
    vocab, total, prompt, length = 4, 1500, [0, 1], 4
    engines = {"target": FakeEngine(vocab, 7, scale=1), "int8": FakeEngine(vocab, 7, noise=0.6, scale=1)}
    counts, law = Counter(), {(): 1.0}
    for seed in range(total):
        sampling = Sampling(0.9, 3, seed=seed, rule=rule)
        counts[tuple(decode(engines, [Rung("int8-sequoia", 12)], prompt, length, sampling).tokens)] += 1
    for _ in range(length):
        law = {
            (*tokens, token): mass * p
            for tokens, mass in law.items()
            for token, p in enumerate(
                process(engines["target"].logits_after([*prompt, *tokens]), 0.9, 3, 1.0)
            )
            if p > 0
        }
    assert counts.keys() <= law.keys()
    g, bound = g_statistic(counts, law, total)
    assert g < bound


# ---- The shape ---------------------------------------------------------------------------------------------

PRIOR = [0.7, 0.1, 0.05, 0.03, 0.02, 0.015, 0.01, 0.005]


class Rates:
    """By place among siblings, how often a child was accepted whose parent was; a guess weighs eight."""

    def __init__(self):
        self.tried, self.accepted = np.zeros(8), np.zeros(8)

    def learn(self, paths, output):
        """paths: of the nodes of a tree, in order. output: what stands."""
        for depth in range(len(output)):
            family = [path for path in paths if path[:-1] == tuple(output[:depth]) and len(path) == depth + 1]
            for rank, path in enumerate(family):
                if self.tried[rank] >= 256:
                    self.tried[rank] /= 2
                    self.accepted[rank] /= 2
                self.tried[rank] += 1
                self.accepted[rank] += path == tuple(output[: depth + 1])

    def fit(self):
        """The falling sequence that is closest by least squares, by its formula of means of stretches."""
        weights, right = self.tried + 8, self.accepted + 8 * np.array(PRIOR)

        def mean(first, last):
            return right[first : last + 1].sum() / weights[first : last + 1].sum()

        return [min(max(mean(a, b) for b in range(i, 8)) for a in range(i + 1)) for i in range(8)]


@cache
def list_forests(num_nodes):
    """Every ordered forest, as a tuple of trees, which are the forests below their roots."""
    if num_nodes == 0:
        return [()]
    return [
        (below, *others)
        for size in range(1, num_nodes + 1)
        for below in list_forests(size - 1)
        for others in list_forests(num_nodes - size)
    ]


def worth(forest, rates):
    return sum(rates[rank] * (1 + worth(below, rates)) for rank, below in enumerate(forest))


def count_levels(forest):
    return 1 + max(map(count_levels, forest)) if forest else 0


def dynamic_program(rates, num_nodes):
    """The worth of the best tree below a root, by the paper's recurrence without a limit on depth: T[m][b] is
    that of a root with m nodes below it in at most b families."""
    best = [0.0] * (num_nodes + 1)
    table = [[0.0] * 9 for _ in range(num_nodes + 1)]
    for m in range(1, num_nodes + 1):
        for b in range(1, 9):
            table[m][b] = max(
                [table[m][b - 1]]
                + [table[m - y][b - 1] + rates[b - 1] * (1 + best[y - 1]) for y in range(1, m + 1)]
            )
        best[m] = table[m][8]
    return best[num_nodes]


def forest_of(paths):
    def below(path):
        return tuple(below(other) for other in paths if other[:-1] == path)

    return below(())


def follow_shapes(size, count, noise, costs=None, seed=0):
    """(round, the shape drafted, the rates that it was to follow) wherever the shape was made anew."""
    engines = {
        "target": Watched(12, seed, max_seq_len=700),
        "int8": FakeEngine(12, seed, noise=noise, max_seq_len=800),
    }
    decoder = build_ladder([Rung("int8-sequoia", size)], engines.__getitem__, costs)
    decoder.begin([1, 2], count, GREEDY)
    text, rates, shape_rates, proposals = [1, 2], Rates(), None, 0
    while block := decoder.step():
        if len(text) > 2 and len(text) - 2 < count - size - 1:
            if proposals % 16 == 0 or proposals & (proposals - 1) == 0:
                shape_rates = rates.fit()
            proposals += 1
            paths = paths_in(engines["target"].log[-1], text)
            yield paths, shape_rates
            rates.learn(paths, block)
        text += block


@pytest.mark.parametrize("noise", [0.2, 1.0, 3.0])
def test_a_shape_gives_the_most_tokens_of_its_size(noise):
    for size, count in ((5, 150), (24, 600)):
        seen = set()
        for paths, rates in follow_shapes(size, count, noise):
            assert len(paths) == size
            found = worth(forest_of(paths), rates)
            best = dynamic_program(rates, size)
            assert found == pytest.approx(best, abs=1e-12)
            if size == 5:
                assert best == pytest.approx(max(worth(f, rates) for f in list_forests(5)), abs=1e-12)
            seen.add(forest_of(paths))
        assert len(seen) > 1 or noise < 1, "the shape must change for this to show anything"


@pytest.mark.parametrize("seed", range(6))
def test_where_calls_have_costs_a_shape_takes_the_least_time_a_token(seed):
    rng, size = np.random.default_rng(seed), 5
    costs = {
        "target": (1 + np.cumsum(rng.choice([0, 0.02, 0.2], 65))).tolist(),
        "int8": [float(rng.choice([0.02, 0.1, 0.3]))] * 65,
    }

    def time(forest, rates):
        num_nodes = str(forest).count("(") - 1
        if num_nodes == 0:
            return costs["target"][0]
        drafting = count_levels(forest) * costs["int8"][0]
        return (drafting + costs["target"][num_nodes]) / (1 + worth(forest, rates))

    forests, sizes = [forest for n in range(size + 1) for forest in list_forests(n)], set()
    for paths, rates in follow_shapes(size, 250, [0.2, 0.8, 2.0][seed % 3], costs, seed):
        best = min(time(forest, rates) for forest in forests)
        shape = forest_of(paths)
        if not (len(paths) == 1 and best == costs["target"][0]):  # one node is an exploration
            assert time(shape, rates) == pytest.approx(best, abs=1e-12)
        sizes.add(len(paths))
    assert sizes


# ---- Tokens ------------------------------------------------------------------------------------------------


def test_greedy_children_are_the_likeliest():
    engines = {"target": Watched(12, 3), "int8": FakeEngine(12, 3, noise=2.0)}
    decoder = build_ladder([Rung("int8-sequoia", 24)], engines.__getitem__)
    decoder.begin([1, 2], 240, GREEDY)
    text, families = [1, 2], 0
    while block := decoder.step():
        paths = paths_in(engines["target"].log[-1], text) if len(text) > 2 else []
        for path in [(), *paths]:
            children = [other[-1] for other in paths if other[:-1] == path]
            likely = np.argsort(-engines["int8"].logits_after([*text, *path]), kind="stable")
            assert children == likely[: len(children)].tolist()
            families += len(children) > 1
        text += block
    assert families > 20


def test_under_exact_the_first_child_is_drawn_as_the_target_draws():
    """A drafter that is the target itself is right at every first child."""
    engines = {"target": FakeEngine(9, 3, scale=1), "int8": FakeEngine(9, 3, scale=1)}
    sampling = Sampling(1.0, seed=5, rule="exact")
    plain = decode(engines, [], [1, 2], 120, sampling).tokens
    out = decode(engines, [Rung("int8-sequoia", 6)], [1, 2], 120, sampling)
    assert out.tokens == plain
    assert out.drafter.accepted_at[0] == out.drafter.drafted_at[0] == out.drafter.asked


def test_drawn_trees_accept_more_than_drawn_chains_of_as_many_calls():
    vocab, rounds = 20, {}
    engines = {"target": FakeEngine(vocab, 3, scale=1), "int8": FakeEngine(vocab, 3, noise=0.8, scale=1)}
    for name, size in (("int8", 4), ("int8-sequoia", 24)):
        out = decode(engines, [Rung(name, size)], [1, 2], 230, Sampling(1.0, seed=1))
        rounds[name] = out.target.rounds
    assert rounds["int8-sequoia"] < 0.9 * rounds["int8"]

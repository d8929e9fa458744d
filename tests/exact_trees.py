"""Drafted trees over tiny models, and the law of the native walk over a tree, integrated exactly."""

import itertools
import math
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
from draftsmith.speculate import verify
from draftsmith.speculate.binding import check, ffi, lib, view
from exact_laws import LAST, STEPS, TinyModel, Tokens, count_steps

Parents = tuple[int, ...]


def children_of(parents: Parents, node: int) -> list[int]:
    return [i for i, parent in enumerate(parents) if parent == node]


def path_to(parents: Parents, node: int) -> list[int]:
    """The nodes from the root's child down to `node`; none for the root, -1."""
    return [*path_to(parents, parents[node]), node] if node >= 0 else []


def prefixes(tokens: Tokens, parents: Parents) -> list[Tokens]:
    """The text at each row: the root's, then each node's."""
    return [tuple(tokens[i] for i in path_to(parents, node)) for node in range(-1, len(tokens))]


def rows(model: TinyModel, tokens: Tokens, parents: Parents) -> np.ndarray:
    """float64 [n+1, V]: the model's laws at the root and after each node."""
    laws = np.array([[float(x) for x in model.law(text)] for text in prefixes(tokens, parents)])
    return laws / laws.sum(axis=1, keepdims=True)


def draws(drafter: TinyModel, parents: Parents, replacement: bool) -> Iterator[tuple[Tokens, Fraction]]:
    """Every labelling of a tree with the chance that siblings are drawn so, one after the other.

    Without replacement a law may run out of tokens: then the first one that no elder sibling has is chosen.
    """
    for tokens in itertools.product(range(drafter.vocab), repeat=len(parents)):
        texts, chance = prefixes(tokens, parents), Fraction(1)
        for node in range(-1, len(parents)):
            law, left = drafter.law(texts[node + 1]), Fraction(1)
            seen: set[int] = set()
            for child in children_of(parents, node):
                token = tokens[child]
                if replacement:
                    chance *= law[token]
                elif left:
                    chance *= 0 if token in seen else law[token] / left
                else:
                    chance *= token == min(set(range(drafter.vocab)) - seen, default=0)
                left -= 0 if token in seen else law[token]
                seen.add(token)
        if chance:
            yield tokens, chance


class Walk:
    """The native walk over one tree as a function of its uniforms."""

    def __init__(
        self, rule: verify.TreeRule, p: np.ndarray, q: np.ndarray | None, tokens: Tokens, parents: Parents
    ):
        self.rule, self.parents, self.n, self.vocab = rule, parents, len(tokens), p.shape[1]
        self._p, self._q = view("double[]", p), ffi.NULL if q is None else view("double[]", q)
        self._tree = ffi.new("int32_t[]", list(tokens)), ffi.new("int32_t[]", list(parents))
        self._row, self._path = ffi.new("double[]", self.n + 2), ffi.new("int32_t[]", self.n + 1)
        self._out = ffi.new("int32_t[2]")

    def __call__(self, uniforms: list[float], slot: int = 0, value: float | None = None) -> tuple[int, int]:
        """(the last accepted node or -1, next token), with one uniform replaced."""
        self._row[0 : self.n + 2] = uniforms
        if value is not None:
            self._row[slot] = value
        status = lib.ds_verify_tree(
            verify.TREE_RULES[self.rule], self.n, self.vocab, self._p, self._q, *self._tree, self._row,
            self._path, self._out, self._out + 1,
        )  # fmt: skip
        check(status)
        depth = self._out[0]
        path = list(self._path[0:depth])
        assert path == path_to(self.parents, path[-1] if path else -1), "the accepted nodes are no path"
        return path[-1] if path else -1, self._out[1]

    def steps(self, uniforms: list[float], slot: int, node: int) -> list[int]:
        """How many uniforms in `slot` give a token <= y behind `node`, for each y."""

        def at(u: float) -> int:
            last, token = self(uniforms, slot, u)
            assert last == node
            return token

        return [0] + [count_steps(lambda u, y=y: at(u) <= y) for y in range(self.vocab)]


def integrate(walk: Walk) -> np.ndarray:
    """float64 [n+1, V]: the chance that the walk ends at a node (row 0: the root) and goes on with a token.

    As for chains, only the use of each uniform is taken from the interface; the decisions are the shipped
    code's own, found by bisection down to 2^-53.
    """
    return {"exact": _integrate_exact, "traversal": _integrate_upwards}.get(walk.rule, _integrate_downwards)(
        walk
    )


def _say(walk: Walk, law: np.ndarray, uniforms: list[float], node: int, chance: float) -> None:
    if walk(uniforms)[0] != node:
        assert chance < 1e-15, "the walk cannot end here, yet its decisions say that it may"
        return
    slot = walk.n + bool(children_of(walk.parents, node))
    law[node + 1] = chance * np.diff(walk.steps(uniforms, slot, node)) / STEPS


def _integrate_downwards(walk: Walk) -> np.ndarray:
    """A node is tried once its elder siblings, and those of its ancestors, have been rejected."""
    law = np.zeros((walk.n + 1, walk.vocab))

    def descend(node: int, reach: float, uniforms: list[float]) -> None:
        """`uniforms` lead to the node and reject all that is tried from there on."""
        for child in children_of(walk.parents, node):

            def accepted(u: float, child=child) -> bool:
                return child in path_to(walk.parents, walk(uniforms, child, u)[0])

            accept = count_steps(accepted) / STEPS
            if accept:
                below = [*uniforms]
                below[child] = 0.0
                descend(child, reach * accept, below)
            reach *= 1 - accept
        if reach:
            _say(walk, law, uniforms, node, reach)

    descend(-1, 1.0, [LAST] * (walk.n + 2))
    return law


def _integrate_upwards(walk: Walk) -> np.ndarray:
    """A node's turn comes once all below it, and its elder siblings with all below them, were rejected."""
    law = np.zeros((walk.n + 1, walk.vocab))

    def post_order(node: int) -> Iterator[int]:
        for child in children_of(walk.parents, node):
            yield from post_order(child)
        yield node

    reach, all_rejected = 1.0, [LAST] * (walk.n + 2)
    for node in post_order(-1):
        keep = 1.0
        uniforms = [*all_rejected]
        if node >= 0:
            keep = count_steps(lambda u, node=node: walk(all_rejected, node, u)[0] == node) / STEPS
            uniforms[node] = 0.0
        if reach * keep:
            _say(walk, law, uniforms, node, reach * keep)
        reach *= 1 - keep
    return law


def _integrate_exact(walk: Walk) -> np.ndarray:
    """The sample at each row is followed as long as some child, of equal ones the first, says the same."""
    law = np.zeros((walk.n + 1, walk.vocab))

    def descend(node: int, reach: float, uniforms: list[float]) -> None:
        def sampled(u: float) -> tuple[int, int | None]:
            """(token sampled at the node, the child that it leads to)."""
            last, token = walk(uniforms, node + 1, u)
            if last == node:
                return token, None
            below = path_to(walk.parents, last)
            child = below[0 if node < 0 else below.index(node) + 1]
            return walk_token(child), child

        def walk_token(child: int) -> int:
            return walk._tree[0][child]

        steps = [0] + [count_steps(lambda u, y=y: sampled(u)[0] <= y) for y in range(walk.vocab)]
        for token, share in enumerate(np.diff(steps) / STEPS):
            if not share:
                continue
            start = steps[token] / STEPS  # the first uniform that samples the token
            child = sampled(start)[1]
            if child is None:
                law[node + 1, token] = reach * share
            else:
                below = [*uniforms]
                below[node + 1] = start
                descend(child, reach * share, below)

    descend(-1, 1.0, [0.0] * (walk.n + 2))
    return law


def extend(target: TinyModel, tokens: Tokens, parents: Parents, law: np.ndarray) -> dict[Tokens, float]:
    """The joint law of path and next token, continued by fresh samples of the target to equal lengths."""
    texts = prefixes(tokens, parents)
    length = max(map(len, texts)) + 1
    joint: dict[Tokens, float] = {}
    for row, y in zip(*np.nonzero(law), strict=True):
        said = (*texts[row], int(y))
        for rest in target.sequences(length - len(said)):
            full = said + rest
            tail = math.prod(float(target.law(full[:i])[full[i]]) for i in range(len(said), length))
            joint[full] = joint.get(full, 0.0) + law[row, y] * tail
    return joint


def depth_law(parents: Parents, law: np.ndarray) -> float:
    """The expected number of accepted nodes under a law as `integrate` gives it."""
    return float(sum(law[node + 1].sum() * len(path_to(parents, node)) for node in range(-1, len(parents))))

"""From logits to a verdict: how many drafted tokens stand, and which token follows them."""

import numpy as np
from numpy.typing import NDArray

from . import verify
from .binding import check, lib, view
from .engine import Ids, Logits
from .sampling import uniforms
from .settings import Sampling

Laws = NDArray[np.float64]

_BY_POSITION = 0  # the stream of the exact rule, shared by all levels


class Judge:
    """Decides for one level of a ladder, and keeps the laws from which it decided.

    The uniforms are counter-based, each level with a stream of its own. Under the exact rule they are keyed
    by (seed, position): then an output token is a function of the seed and the tokens before it, whatever was
    drafted; and a drafter that draws with the same uniform as its verifier guesses the same token far more
    often than an independent draw would (2408.07978).
    """

    def __init__(self, sampling: Sampling, level: int, vocab_size: int, max_tokens: int) -> None:
        """level: the place in the ladder, from 0. max_tokens: the longest proposal of this level."""
        self.sampling = sampling
        self.vocab_size = vocab_size
        self.laws: Laws | None = None  # row i: the law of the i-th token of the proposal being built
        if not sampling.greedy:
            self.laws = np.empty((max_tokens, vocab_size))
        self._stream = level + 1
        self._drawn = 0

    def decide(
        self, logits: Logits, draft: Ids, draft_laws: Laws | None, position: int, row: int
    ) -> tuple[int, int]:
        """Accept a prefix of `draft` [m] and choose the token after it; returns (num_accepted, next_token).

        logits: [m+1, V'], the last token before the draft and the draft itself, as this level's engine sees
        them. draft_laws: [m, V], the laws from which the draft was sampled; None: it was not sampled but
        chosen. position: of the first drafted token in the sequence. row: its place in the proposal being
        built. Afterwards rows row..row+num_accepted of `laws` are the laws of the accepted tokens and of the
        next one.
        """
        logits = _fit(logits, self.vocab_size)
        if self.laws is None:
            return verify.greedy(logits, draft)
        laws = self.laws[row : row + len(logits)]
        self._write_laws(logits, laws)
        numbers = self._uniforms(position, len(draft) + 2)
        return verify.chain_of_laws(self.sampling.rule, laws, draft_laws, draft, numbers)

    def _write_laws(self, logits: Logits, laws: Laws) -> None:
        """`sampling.laws`, but into memory that is there already."""
        settings = self.sampling
        top_k = min(int(settings.top_k), self.vocab_size)
        status = lib.ds_laws_from_logits(
            view("float[]", logits),
            *logits.shape,
            settings.temperature,
            top_k,
            settings.top_p,
            view("double[]", laws),
        )
        check(status, "logits")

    def _uniforms(self, position: int, count: int) -> NDArray[np.float64]:
        seed = self.sampling.seed
        if self.sampling.rule == "exact":
            return uniforms(seed, _BY_POSITION, position, count)
        self._drawn += count
        return uniforms(seed, self._stream, self._drawn - count, count)


def _fit(logits: Logits, vocab_size: int) -> Logits:
    """Logits over exactly `vocab_size` ids: engines of one tokenizer may differ in how far they pad the
    vocabulary.

    Padding ids of a drafter are cut off, ids that only the verifier has get no mass from the drafter. Both
    leave the verifier's own law as it is.
    """
    have = logits.shape[1]
    if have == vocab_size:
        return logits
    if have > vocab_size:
        return np.ascontiguousarray(logits[:, :vocab_size])
    return np.pad(logits, ((0, 0), (0, vocab_size - have)), constant_values=-np.inf)

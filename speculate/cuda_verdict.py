"""Verdicts on the device: from logits that stay there to two numbers for the host."""

import numpy as np

from . import cuda
from .binding import ffi, lib
from .engine import Decision
from .errors import BundleError

_MAX_ROWS: int = lib.DS_MAX_DRAFT + 1


class Verdicts:
    """The laws of one engine and what a verdict on them takes, in memory that is allocated once."""

    def __init__(self, name: str, vocab_size: int, stream: cuda.Stream) -> None:
        self._name, self._vocab, self._stream = name, vocab_size, stream
        self.laws = cuda.Buffer(_MAX_ROWS * vocab_size * 8)
        self._draft, self._uniforms = cuda.Buffer(_MAX_ROWS * 4), cuda.Buffer((_MAX_ROWS + 1) * 8)
        self._sums, self._verdict = cuda.Buffer(_MAX_ROWS * 8), cuda.Buffer(8)
        self._host = np.zeros(_MAX_ROWS, np.int32)

    def decide(
        self, logits: cuda.Buffer, row: int, decision: Decision, drafter: "Verdicts | None"
    ) -> tuple[int, int]:
        """How many drafted tokens are accepted, and the token that follows them. The host waits once.

        logits: float32 [.., V] on the device, of which those of the draft begin at `row`.
        Raises BundleError where they are no law.
        """
        count, vocab, stream = len(decision.draft), self._vocab, self._stream.handle
        self._host[:count] = decision.draft
        draft, verdict = self._draft.write(self._host[:count], self._stream).at(), self._verdict.at()
        first = logits.at(row * vocab * 4)
        if decision.temperature == 0:
            cuda.call("ds_cuda_verify_greedy", count, vocab, first, draft, verdict, stream)
        else:
            p = self.laws.at(decision.row * vocab * 8)
            q, uniforms = drafter.laws.at() if drafter else ffi.NULL, self._uniforms.at()
            law = (decision.temperature, min(decision.top_k, vocab), decision.top_p)
            numbers = (decision.seed, decision.stream, decision.counter)
            cuda.call("ds_cuda_laws", first, count + 1, vocab, *law, p, stream)
            cuda.call("ds_cuda_uniforms", *numbers, count + 2, uniforms, stream)
            sums = self._sums.at()
            chain = (decision.rule, count, vocab, p, q, draft, uniforms, sums)
            cuda.call("ds_cuda_verify_chain", *chain, verdict, stream)
        answer = self._verdict.read(np.empty(2, np.int32), self._stream)
        self._stream.wait()
        if answer[1] < 0:
            raise BundleError(f"{self._name} gives logits with a NaN, or none that is finite")
        return int(answer[0]), int(answer[1])

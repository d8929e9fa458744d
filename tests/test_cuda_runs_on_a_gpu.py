"""On a GPU the compiled kernels do what their emulation does, and memory, streams and graphs work."""

import numpy as np
import pytest
from cuda_cases import check_chains, check_linears
from draftsmith.speculate import cuda, cuda_linear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(bool(cuda.why_no_cuda()), reason=f"no GPU run: {cuda.why_no_cuda()}"),
]


class OnDevice:
    """The functions of a round with numpy arrays, each copied to the device and back."""

    def __init__(self) -> None:
        self.stream = cuda.Stream()

    def order(self, order: int) -> None:
        """The device has its own."""

    def put(self, array):
        if array is None:
            return cuda.open_library()[0].NULL
        array = np.ascontiguousarray(array)
        self.kept.append((array, cuda.Buffer(array.nbytes).write(array, self.stream)))
        return self.kept[-1][1].pointer

    def call(self, name, out, *arguments):
        """`out` stands where None does not: last but the stream."""
        self.kept = []
        made = cuda.Buffer(out.nbytes)
        values = [self.put(a) if a is None or isinstance(a, np.ndarray) else a for a in arguments]
        cuda.call(name, *values, cuda.open_library()[0].cast("void *", made.pointer), self.stream.handle)
        made.read(out, self.stream)
        self.stream.wait()
        return out

    def laws(self, logits, temperature=1.0, top_k=0, top_p=1.0):
        return self.call(
            "ds_cuda_laws", np.empty(logits.shape), logits, *logits.shape, temperature, top_k, top_p
        )

    def uniforms(self, seed, stream, counter, n):
        return self.call("ds_cuda_uniforms", np.empty(n), seed, stream, counter, n)

    def chain(self, rule, p, q, draft, uniforms):
        sums = np.empty(max(1, len(draft)))
        verdict = np.empty(2, np.int32)
        arguments = (rule, len(draft), p.shape[1], p, q, draft, uniforms, sums)
        return tuple(self.call("ds_cuda_verify_chain", verdict, *arguments).tolist())

    def greedy(self, logits, draft):
        verdict = np.empty(2, np.int32)
        return tuple(
            self.call("ds_cuda_verify_greedy", verdict, len(draft), logits.shape[1], logits, draft).tolist()
        )

    def pack(self, format, weight):
        return cuda_linear.pack(weight, format)

    def linear(self, format, packed, n, x, scales=None, row_scales=None):
        number = cuda_linear.FORMATS.index(format)
        y = np.empty((len(x), n), np.float32)
        rows, k = x.shape
        return self.call("ds_cuda_linear", y, number, n, k, packed, scales, rows, x, row_scales)


def test_laws_and_verdicts():
    check_chains(OnDevice(), np.random.default_rng(0), 2_000, largest_vocab=3_000)
    check_chains(OnDevice(), np.random.default_rng(1), 100)


def test_linears():
    check_linears(OnDevice(), np.random.default_rng(2), 200)


def test_a_linear_reads_and_writes_where_the_device_is():
    """As the benchmark calls it."""
    rng, stream = np.random.default_rng(3), cuda.Stream()
    weight, x = rng.normal(size=(32, 64)).astype(np.float16), rng.normal(size=(5, 64)).astype(np.float16)
    linear = cuda_linear.Linear(weight, "float16", stream)
    rows, out = cuda.Buffer(x.nbytes).write(x, stream), cuda.Buffer(5 * 32 * 4)
    linear.multiply(rows, 5, out)
    y = out.read(np.empty((5, 32), np.float32), stream)
    stream.wait()
    np.testing.assert_allclose(y, x.astype(np.float64) @ weight.T.astype(np.float64), atol=1e-4)


def test_a_recorded_graph_runs_again():
    stream, out = cuda.Stream(), cuda.Buffer(8 * 8)
    graph = cuda.Graph(stream)
    cuda.call(
        "ds_cuda_uniforms", 1, 2, 3, 8, cuda.open_library()[0].cast("double *", out.pointer), stream.handle
    )
    graph.finish().launch()
    first = out.read(np.empty(8), stream)
    stream.wait()
    out.write(np.zeros(8), stream)
    graph.launch()
    second = out.read(np.empty(8), stream)
    stream.wait()
    assert (first == second).all() and first.any()

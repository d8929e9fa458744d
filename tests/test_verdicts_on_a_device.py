"""Where logits stay on a device, the loop decodes what it decodes on the host, and waits once a round.

TensorRT and memory are stand-ins; the kernels are those that nvcc compiles, run by the emulator.
"""

from types import SimpleNamespace

import numpy as np
import pytest
from decoding import decode
from device_stand_ins import Context, Graph, Memory, Stream
from draftsmith.speculate import cuda_verdict, tensorrt_engine
from draftsmith.speculate.errors import BundleError
from draftsmith.speculate.ladder import Rung
from draftsmith.speculate.manifest import EngineEntry, TensorrtEntry
from draftsmith.speculate.settings import Sampling
from emulated_cuda import SOURCES, Emulated, compile_emulated
from fake_engine import FakeEngine

VOCAB, COUNT = 40, 60
PLAN = TensorrtEntry(
    file="engines/sm89.trt",
    builder="tensorrt_rtx 1.7.1.116",
    compute_capability=("8.9",),
    precision="bfloat16",
    rows=(1, 4, 16),
    max_seq_len=96,
    num_slots=128,
)
ENTRY = EngineEntry(
    graph="cpu.onnx", vocab_size=VOCAB, max_seq_len=96, num_layers=1, num_kv_heads=1, head_dim=4
)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    path = tmp_path_factory.mktemp("emulated") / "libverify.so"
    compile_emulated(path, *SOURCES.glob("verify*.cu"))
    return Emulated(path)


@pytest.fixture
def device(kernels, monkeypatch):
    """`device(model)` is a TensorRT engine that computes what a `FakeEngine` does; all are on one stream."""
    stream = Stream()

    def call(name, *arguments):
        assert getattr(kernels.lib, name)(*arguments) == 0

    stand_ins = SimpleNamespace(Buffer=Memory, Graph=Graph, call=call)
    monkeypatch.setattr(tensorrt_engine, "cuda", stand_ins)
    monkeypatch.setattr(cuda_verdict, "cuda", stand_ins)

    def make(model):
        model.tokens = np.full(PLAN.num_slots, -7)
        made = SimpleNamespace(create_execution_context=lambda: Context(model, stream, PLAN, ENTRY))
        runtime = SimpleNamespace(stream=stream, deserialize=lambda path: made)
        return tensorrt_engine.TensorrtEngine("engine", None, PLAN, ENTRY, runtime)

    make.stream = stream
    return make


def models():
    return {
        "target": FakeEngine(VOCAB, max_seq_len=96),
        "int8": FakeEngine(VOCAB, noise=0.7, max_seq_len=96),
    }


PROMPT = list(range(3, 26))  # longer than the largest profile
LADDERS = {
    "plain": [],
    "suffix": [Rung("suffix", 6)],
    "int8": [Rung("int8", 3)],
    "both": [Rung("suffix", 2), Rung("int8", 5)],
}


@pytest.mark.parametrize("rule", ["token", "block", "exact"])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("ladder", list(LADDERS))
def test_the_tokens_are_those_of_the_host(device, ladder, temperature, rule):
    sampling = Sampling(temperature=temperature, top_k=20, top_p=0.95, seed=5, rule=rule)
    expected = decode(models(), LADDERS[ladder], PROMPT, COUNT, sampling)
    engines = {name: device(model) for name, model in models().items()}
    before = device.stream.waits
    found = decode(engines, LADDERS[ladder], PROMPT, COUNT, sampling)
    assert found.blocks == expected.blocks
    rounds = sum(
        found.decoder.counters(level).rounds for level, rung in enumerate(found.decoder.levels) if rung.engine
    )
    prompts = len([rung for rung in found.decoder.levels if rung.engine])
    # A prompt takes two calls of 16 rows, and a call waits for what the host gave the one before it.
    assert device.stream.waits - before == rounds + prompts


def test_what_the_host_must_see_is_decided_there(device):
    """A schedule looks at logits."""
    engines = {name: device(model) for name, model in models().items()}
    costs = {name: [1.0 + 0.1 * i for i in range(8)] for name in ("suffix", "int8", "target")}
    expected = decode(models(), LADDERS["int8"], PROMPT, COUNT, costs=costs)
    assert decode(engines, LADDERS["int8"], PROMPT, COUNT, costs=costs).blocks == expected.blocks
    assert all(engine._verdicts is None for engine in engines.values())


def test_logits_that_are_no_law_end_the_generation(device):
    model = FakeEngine(VOCAB)
    model.logits_after = lambda tokens: np.full(VOCAB, np.nan, np.float32)
    with pytest.raises(BundleError, match="engine gives logits with a NaN, or none that is finite"):
        decode({"target": device(model)}, [], PROMPT, COUNT)

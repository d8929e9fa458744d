"""Whatever a C program hands to an ONNX engine, it gets an answer or an error in words; never a crash. If one
of these calls did crash, the whole test run would end here."""

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from draftsmith.export.portable import export_onnx
from draftsmith.speculate.binding import LIBRARY, ffi, lib
from draftsmith.speculate.onnx_engine import find_library
from onnx import TensorProto, helper, numpy_helper
from quantized import quantize_checkpoint
from tiny_bundle import CONFIG, write_tiny_bundle

SLOTS, VOCAB = CONFIG.max_position_embeddings, CONFIG.vocab_size
GRAPHS = ["target/cpu.onnx", "drafters/int8/cpu.onnx", "target/model.onnx", "drafters/int8/model.onnx"]


def message() -> str:
    return ffi.string(lib.ds_error_message()).decode()


class Engine:
    """The C interface as it is, with whatever arguments."""

    def __init__(self, graph, slots=SLOTS, runtime=None):
        self.runtime = runtime or open_runtime()
        self.handle = lib.ds_onnx_open(self.runtime, str(graph).encode(), slots, 1)
        assert self.handle != ffi.NULL, message()
        self.handle = ffi.gc(self.handle, lambda handle: handle.close(handle))

    def reserve(self, slots):
        return self.handle.reserve(self.handle, slots)

    def forward(self, ids, start=0, positions=None, mask=None, n_logits=1, n_rows=None):
        """The logits; or the words of an error, which must be one line."""
        logits = ffi.new("const float **")
        status = self.handle.forward(
            self.handle,
            len(ids) if n_rows is None else n_rows,
            ffi.new("int32_t[]", [int(token) for token in ids]),
            start,
            ffi.NULL if positions is None else ffi.new("int64_t[]", positions),
            ffi.NULL if mask is None else ffi.from_buffer("uint8_t[]", np.ascontiguousarray(mask, np.uint8)),
            n_logits,
            logits,
        )
        if status < 0:
            assert message() and "\n" not in message()
            return message()
        values = ffi.buffer(logits[0], n_logits * self.handle.vocab * 4)
        return np.frombuffer(values, np.float32).reshape(n_logits, -1).copy()


def open_runtime(threads=1):
    runtime = lib.ds_onnx_create(str(find_library()).encode(), threads)
    assert runtime != ffi.NULL, message()
    return ffi.gc(runtime, lib.ds_onnx_free)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_bundle(tmp_path_factory.mktemp("tiny") / "bundle")


@pytest.fixture(scope="module", params=GRAPHS)
def engine(folder, request):
    return Engine(folder / request.param)


@pytest.fixture
def reserved(engine):
    assert engine.reserve(100) == lib.DS_OK
    return engine


# ---- Opening -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("library", "threads", "words"),
    [
        (None, 1, "no path"),
        ("/nowhere.so", 1, "cannot open"),
        (Path(__file__), 1, "invalid ELF header"),
        (LIBRARY, 1, "is not an ONNX Runtime"),
        ("real", 0, "n_threads is 0"),
        ("real", -1, "n_threads is -1"),
        ("real", 65, "n_threads is 65"),
    ],
)
def test_a_wrong_library_is_refused(library, threads, words):
    path = ffi.NULL if library is None else str(find_library() if library == "real" else library).encode()
    assert lib.ds_onnx_create(path, threads) == ffi.NULL and words in message()


def test_null_handles_are_refused(folder, engine):
    graph, runtime, handle = str(folder / GRAPHS[0]).encode(), engine.runtime, engine.handle
    for arguments in ((ffi.NULL, graph, 9, 1), (runtime, ffi.NULL, 9, 1), (runtime, graph, 9, 0)):
        assert lib.ds_onnx_open(*arguments) == ffi.NULL and "no runtime, no graph" in message()
    for slots in (0, -1, 2**31 - 1):
        assert lib.ds_onnx_open(runtime, graph, slots, 1) == ffi.NULL and f"of {slots} tokens" in message()
    assert handle.reserve(ffi.NULL, 9) == lib.DS_ERROR_ARGUMENT and "NULL" in message()
    assert engine.reserve(9) == lib.DS_OK
    ids, logits = ffi.new("int32_t[]", 1), ffi.new("const float **")
    for own, given, out in ((ffi.NULL, ids, logits), (handle, ffi.NULL, logits), (handle, ids, ffi.NULL)):
        status = handle.forward(own, 1, given, 0, ffi.NULL, ffi.NULL, 1, out)
        assert status == lib.DS_ERROR_ARGUMENT and "NULL" in message()
    handle.close(ffi.NULL)
    lib.ds_onnx_free(ffi.NULL)
    assert ffi.string(lib.ds_onnx_isa(ffi.NULL)) == b""


def save_graph(path, nodes, inputs, outputs):
    values = [
        [helper.make_tensor_value_info(name, dtype, shape) for name, dtype, shape in ends]
        for ends in (inputs, outputs)
    ]
    graph = helper.make_graph(nodes, "graph", *values)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)


def with_cache(dtype=TensorProto.FLOAT, shape=(1, 2, "S", 4)):
    """Ends of a graph like a decoder of one layer, and nodes that do nothing of the sort."""
    ids = [(name, TensorProto.INT64, [1, "T"]) for name in ("input_ids", "position_ids", "write_index")]
    mask = ("attention_mask", TensorProto.BOOL, [1, 1, "T", "S"])
    past = [(f"past_key_values.0.{part}", dtype, list(shape)) for part in ("key", "value")]
    present = [(f"present.0.{part}", dtype, list(shape)) for part in ("key", "value")]
    nodes = [helper.make_node("Identity", [p[0]], [q[0]]) for p, q in zip(past, present, strict=True)]
    nodes.append(helper.make_node("Constant", [], ["axis"], value_ints=[2]))
    nodes.append(helper.make_node("Cast", ["input_ids"], ["flat"], to=TensorProto.FLOAT))
    nodes.append(helper.make_node("Unsqueeze", ["flat", "axis"], ["logits"]))
    return nodes, [*ids, mask, *past], [("logits", TensorProto.FLOAT, [1, "T", 1]), *present]


ONE = helper.make_node("Relu", ["x"], ["y"])
FLAT = [("x", TensorProto.FLOAT, [1])], [("y", TensorProto.FLOAT, [1])]
_NODES, _INPUTS, _OUTPUTS = with_cache()
_FLAT_LOGITS = helper.make_node("Identity", ["flat"], ["logits"])
_FLAT_OUTPUT = ("logits", TensorProto.FLOAT, [1, "T"])
STRANGERS = {
    "one node": (([ONE], *FLAT), "x is not a float32 cache"),
    "no cache": ((_NODES[2:], _INPUTS[:4], _OUTPUTS[:1]), "its 4 inputs are not those of a decoder"),
    "half a cache": (
        ([_NODES[0], *_NODES[2:]], _INPUTS[:5], _OUTPUTS[:2]),
        "its 5 inputs are not those of a decoder",
    ),
    "no logits": ((_NODES[:2], _INPUTS, _OUTPUTS[1:]), "its 2 outputs are not logits and the cache"),
    "an int cache": (with_cache(TensorProto.INT64), "is not a float32 cache"),
    "a cache of any heads": (with_cache(shape=(1, "H", "S", 4)), "is not a float32 cache"),
    "a flat cache": (with_cache(shape=(1, "S", 4)), "is not a float32 cache"),
    "five dimensions": (with_cache(shape=(1, 1, 2, "S", 4)), "more than 4 dimensions"),
    "flat logits": (([*_NODES[:4], _FLAT_LOGITS], _INPUTS, [_FLAT_OUTPUT, *_OUTPUTS[1:]]), "logits are not"),
}


@pytest.mark.parametrize("kind", STRANGERS)
def test_graphs_of_another_kind_are_refused(tmp_path, kind):
    parts, words = STRANGERS[kind]
    save_graph(tmp_path / "graph.onnx", *parts)
    opened = lib.ds_onnx_open(open_runtime(), str(tmp_path / "graph.onnx").encode(), 64, 1)
    assert opened == ffi.NULL and words in message()


def test_a_graph_that_only_looks_like_a_decoder_fails_in_words(tmp_path):
    """Its write_index is no vector, which only ONNX Runtime can tell, and only when it runs."""
    save_graph(tmp_path / "graph.onnx", *with_cache())
    engine = Engine(tmp_path / "graph.onnx", slots=64)
    assert engine.reserve(9) == lib.DS_OK
    assert "write_index" in engine.forward([0])


def test_files_that_are_no_graphs_are_refused(folder, tmp_path):
    (tmp_path / "text.onnx").write_text("no graph\n" * 99)
    (tmp_path / "empty.onnx").touch()
    graph = (folder / GRAPHS[0]).read_bytes()
    (tmp_path / "half.onnx").write_bytes(graph[: len(graph) // 2])
    (tmp_path / "lonely.onnx").write_bytes(graph)  # its weights are missing
    runtime = open_runtime()
    for name in ("text", "empty", "half", "lonely", "none"):
        opened = lib.ds_onnx_open(runtime, str(tmp_path / f"{name}.onnx").encode(), 64, 1)
        assert opened == ffi.NULL and "\n" not in message(), name
    assert lib.ds_onnx_open(runtime, str(tmp_path).encode(), 64, 1) == ffi.NULL
    assert Engine(folder / GRAPHS[0], runtime=runtime).reserve(9) == lib.DS_OK  # nothing is left behind


# ---- Calls -------------------------------------------------------------------------------------------------


def test_a_cache_is_not_reserved_beyond_the_longest_sequence(engine):
    for slots in (0, -1, SLOTS + 1, 2**31 - 1, -(2**31)):
        assert engine.reserve(slots) == lib.DS_ERROR_ARGUMENT
        assert f"{slots} are wanted" in message()
    assert engine.reserve(SLOTS) == lib.DS_OK


def test_nothing_is_read_before_room_was_made(folder):
    for graph in GRAPHS:
        assert "reserved for 0" in Engine(folder / graph).forward([1])


def test_rows_that_do_not_fit_are_refused(reserved):
    for n_rows in (0, -1, -(2**31)):
        assert f"{n_rows} rows" in reserved.forward([1], n_rows=n_rows)
    for start in (-1, -(2**31)):
        assert f"slot {start}" in reserved.forward([1], start)
    for ids, start in (([1], 100), ([1, 2], 99), ([1], 2**31 - 1), ([1] * 101, 0), ([1] * 5000, 0)):
        assert "reserved for 100" in reserved.forward(ids, start)
    for n_logits in (0, 3, -1, 2**31 - 1):
        assert f"logits of {n_logits}" in reserved.forward([1, 2], n_logits=n_logits)


def test_the_cache_fills_to_the_last_slot_and_no_further(reserved):
    ids = np.random.default_rng(0).integers(0, VOCAB, 101)
    assert np.isfinite(reserved.forward(ids[:99])).all()
    last = reserved.forward(ids[99:100], 99)
    assert np.isfinite(last).all()
    assert "reserved for 100" in reserved.forward(ids[100:], 100)
    assert np.array_equal(reserved.forward(ids[99:100], 99), last)


@pytest.mark.parametrize("token", [VOCAB, -1, -VOCAB, 2**31 - 1, -(2**31)])
def test_tokens_outside_the_vocabulary_are_refused(reserved, token):
    assert f"token {token} in row 1 of a vocabulary of {VOCAB}" in reserved.forward([1, token])


@pytest.mark.parametrize("position", [SLOTS, -1, 2**40, -(2**63)])
def test_positions_outside_the_sequence_are_refused(reserved, position):
    assert f"position {position} in row 1" in reserved.forward([1, 2], positions=[0, position])
    assert np.isfinite(reserved.forward([1, 2], positions=[0, SLOTS - 1])).all()


@pytest.mark.parametrize("graph", GRAPHS)
def test_positions_behind_the_rotary_table_are_refused(folder, graph):
    """Even of an engine that was opened for longer sequences than its graph was made for."""
    engine = Engine(folder / graph, slots=2 * SLOTS)
    assert engine.reserve(2 * SLOTS) == lib.DS_OK
    assert str(SLOTS) in engine.forward([1], positions=[SLOTS])
    assert str(SLOTS) in engine.forward([1], start=SLOTS)
    assert np.isfinite(engine.forward([1], start=SLOTS, positions=[0])).all()


def test_an_error_leaves_the_cache_as_it_was(reserved):
    prompt, wrong = [3, 1, 4], {"positions": [-1]}
    reserved.forward(prompt)
    wanted = reserved.forward([1], 3)
    reserved.forward(prompt)
    assert isinstance(reserved.forward([VOCAB], 2), str) and isinstance(
        reserved.forward([9], 2, **wrong), str
    )
    assert np.array_equal(reserved.forward([1], 3), wanted)


@pytest.mark.parametrize("graph", GRAPHS[:2])
@pytest.mark.parametrize("count", [33, 64, 100])
def test_more_than_32_rows_give_the_bits_of_single_ones(folder, graph, count):
    engine = Engine(folder / graph)
    assert engine.reserve(100) == lib.DS_OK
    ids = np.random.default_rng(1).integers(0, VOCAB, count)
    together = engine.forward(ids, n_logits=count)
    alone = np.concatenate([engine.forward(ids[i : i + 1], i) for i in range(count)])
    assert np.array_equal(together, alone)


def test_rows_that_see_nothing_are_no_harm_to_others(reserved):
    """Such a row attends to nothing; what it says is of no use, but other rows say what they did."""
    ids, mask = [5, 6, 7], np.tril(np.ones((3, 3), bool))
    wanted = reserved.forward(ids, mask=mask, n_logits=3)
    mask[2] = False
    assert np.array_equal(reserved.forward(ids, mask=mask, n_logits=3)[:2], wanted[:2])
    blind = reserved.forward(ids, mask=np.zeros((3, 3)), n_logits=3)
    assert blind.shape == (3, VOCAB)
    assert np.array_equal(reserved.forward(ids, mask=np.tril(np.full((3, 3), 7)), n_logits=3), wanted)


def test_a_mask_may_show_later_slots(reserved):
    """Not a tree, but no reason to crash."""
    assert np.isfinite(reserved.forward([5, 6, 7], mask=np.ones((3, 3)), n_logits=3)).all()


@pytest.mark.parametrize("graph", GRAPHS[:2])
def test_a_tree_gives_the_bits_of_its_paths(folder, graph):
    engine = Engine(folder / graph)
    assert engine.reserve(100) == lib.DS_OK
    prompt, left, right = [3, 1, 4], [8, 9], [7, 2]
    engine.forward(prompt)
    mask = np.zeros((4, 7), bool)  # 3: 8, 4: 7 after the prompt; 5: 9 after 8, 6: 2 after 7
    mask[:, :3] = True
    mask[[0, 1, 2, 2, 3, 3], [3, 4, 3, 5, 4, 6]] = True
    tree = engine.forward([8, 7, 9, 2], 3, positions=[3, 3, 4, 4], mask=mask, n_logits=4)
    assert np.array_equal(tree[[0, 2]], engine.forward(left, 3, n_logits=2))
    assert np.array_equal(tree[[1, 3]], engine.forward(right, 3, n_logits=2))


# ---- Graphs that do not hold what they say -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["n", "k", "format", "activation"])
@pytest.mark.parametrize("inside", ["target", "drafters/int8"])
def test_weights_that_do_not_fit_their_node_are_refused(folder, tmp_path, inside, name):
    copy = shutil.copytree(folder / inside, tmp_path / "copy")
    for value in (-1, 5, 7, 2**20, 2**31 - 1):  # 0 is a format and an activation
        model = onnx.load(folder / inside / "cpu.onnx", load_external_data=False)
        node = next(node for node in model.graph.node if node.op_type.startswith("Linear"))
        next(a for a in node.attribute if a.name == name).i = value
        onnx.save(model, copy / "cpu.onnx")
        engine = Engine(copy / "cpu.onnx")
        assert engine.reserve(9) == lib.DS_OK
        assert isinstance(engine.forward([1]), str), value


@pytest.mark.parametrize("damage", [-1, 1, 2**40, -(2**62)])
def test_a_sparse_weight_with_wrong_starts_is_refused(tiny_checkpoint, tmp_path, damage):
    quantize_checkpoint(tiny_checkpoint("llama"), tmp_path / "checkpoint", zeros="half")
    export_onnx(tmp_path / "checkpoint", tmp_path)
    model = onnx.load(tmp_path / "cpu.onnx", load_external_data=False)
    starts = next(t for t in model.graph.initializer if t.name.endswith(".packed_starts"))
    where = {entry.key: entry.value for entry in starts.external_data}
    data = np.memmap(tmp_path / where["location"], np.uint8, "r+")
    begin = int(where.get("offset", 0)) + 8
    assert isinstance(run_once(tmp_path), np.ndarray)
    second = data[begin : begin + 8].view(np.int64)
    second += damage
    data.flush()
    assert "a weight of" in run_once(tmp_path)


def run_once(folder):
    engine = Engine(folder / "cpu.onnx", slots=64)
    assert engine.reserve(9) == lib.DS_OK
    return engine.forward([1])


def test_the_embedding_operator_refuses_tokens_too(tiny_checkpoint, tmp_path):
    """A graph whose logits are wider than its embedding: only the operator can tell."""
    export_onnx(tiny_checkpoint("llama-tied"), tmp_path)
    model = onnx.load(tmp_path / "cpu.onnx")
    embed = next(node for node in model.graph.node if node.op_type == "Embed")
    count, width = (next(a.i for a in embed.attribute if a.name == name) for name in ("n", "k"))
    few = numpy_helper.from_array(np.zeros(16 * 4 * width, np.uint8), "few")  # 16 tokens
    model.graph.initializer.append(few)
    embed.input[1] = "few"
    next(a for a in embed.attribute if a.name == "n").i = 16
    onnx.save(model, tmp_path / "few.onnx")
    engine = Engine(tmp_path / "few.onnx", slots=64)
    assert engine.reserve(9) == lib.DS_OK and engine.handle.vocab == count
    assert isinstance(engine.forward([15]), np.ndarray)
    assert "token 16 of a vocabulary of 16" in engine.forward([16])

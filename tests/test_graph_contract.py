"""What a runtime may rely on: names, standard operators, one copy of each weight, a cache in place."""

import hashlib

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from conftest import VARIANTS
from draftsmith.export.onnx_files import list_weight_bytes
from draftsmith.export.portable import export_onnx
from draftsmith.model.errors import ModelError
from draftsmith.model.store import Checkpoint
from graph_session import GraphSession, open_session
from quantized import quantize_checkpoint

BOTH = ("model.onnx", "cpu.onnx")


@pytest.fixture(scope="module")
def exported(tmp_path_factory, tiny_checkpoint):
    """`exported("llama")`: a folder with both graphs of the model rounded to int8."""
    made = {}

    def make(variant):
        if variant not in made:
            folder = made[variant] = tmp_path_factory.mktemp(variant)
            quantize_checkpoint(tiny_checkpoint(variant), folder / "checkpoint")
            export_onnx(folder / "checkpoint", folder / "out")
        return made[variant] / "out"

    return make


def shapes(values):
    return {value.name: (value.type, value.shape) for value in values}


@pytest.mark.parametrize("graph", BOTH)
@pytest.mark.parametrize("variant", ["llama", "gemma3_text", "gpt2"])
def test_inputs_and_outputs_are_those_of_the_contract(exported, tiny_checkpoint, variant, graph):
    config = Checkpoint(tiny_checkpoint(variant)).config
    session = open_session(exported(variant) / graph)
    cache = ("tensor(float)", ["batch", config.num_kv_heads, "slots", config.head_dim])
    layers = [f"{layer}.{kind}" for layer in range(config.num_layers) for kind in ("key", "value")]
    assert shapes(session.get_inputs()) == {
        "input_ids": ("tensor(int64)", ["batch", "tokens"]),
        "position_ids": ("tensor(int64)", ["batch", "tokens"]),
        "write_index": ("tensor(int64)", ["batch"]),
        "attention_mask": ("tensor(bool)", ["batch", 1, "tokens", "slots"]),
        **{f"past_key_values.{layer}": cache for layer in layers},
        **({"num_logits": ("tensor(int64)", [1])} if graph == "cpu.onnx" else {}),
    }
    rows = "num_logits" if graph == "cpu.onnx" else "tokens"
    assert shapes(session.get_outputs()) == {
        **{f"present.{layer}": cache for layer in layers},
        "logits": ("tensor(float)", ["batch", rows, config.vocab_size]),
    }


@pytest.mark.parametrize("graph", BOTH)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_portable_graph_has_only_operators_of_standard_onnx(exported, variant, graph):
    model = onnx.load(exported(variant) / graph, load_external_data=False)
    ours = {"draftsmith"} if graph == "cpu.onnx" else set()
    assert {(opset.domain, opset.version) for opset in model.opset_import} == {
        ("", 24),
        *((domain, 1) for domain in ours),
    }
    assert {node.domain for node in model.graph.node} == {"", *ours}
    onnx.checker.check_model(exported(variant) / graph, full_check=True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_cpu_graph_leaves_no_arithmetic_of_a_layer_to_stock_operators(exported, variant):
    """What they sum depends on how many rows there are. Adding two values, or picking some, does not."""
    model = onnx.load(exported(variant) / "cpu.onnx", load_external_data=False)
    stock = {node.op_type for node in model.graph.node if not node.domain}
    assert stock <= {"Gather", "Cast", "Add", "Mul", "Neg", "Slice", "Div", "Tanh", "Identity"}


@pytest.mark.parametrize("graph", BOTH)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_shape_is_known_but_for_the_named_sizes(exported, variant, graph):
    """Where inference loses a size, ONNX Runtime plans memory in quadratic time and shares no buffer."""
    model = onnx.load(exported(variant) / graph, load_external_data=False)
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    known = {value.name: value.type.tensor_type.shape.dim for value in inferred.value_info}
    for node in inferred.node[:-1]:
        for output in set(node.output) - {value.name for value in inferred.output}:
            sizes = [dim.dim_param or dim.dim_value for dim in known[output]]
            named = ("batch", "tokens", "slots", "num_logits")
            assert all(isinstance(size, int) or size in named for size in sizes), output


@pytest.mark.parametrize("variant", ["llama", "llama-tied", "opt"])
def test_each_weight_is_stored_once_for_each_graph(exported, variant):
    """What is not packed, both graphs read from one file."""
    stored: dict[str, dict[str, tuple[int, int]]] = {"model.data": {}, "cpu.data": {}}
    for graph in BOTH:
        model = onnx.load(exported(variant) / graph, load_external_data=False)
        for tensor in model.graph.initializer:
            if tensor.data_location != onnx.TensorProto.EXTERNAL:
                assert len(tensor.raw_data) <= 64, "more than a scalar or a shape in the graph itself"
                continue
            place = {entry.key: entry.value for entry in tensor.external_data}
            assert place["location"] == "model.data" or graph == "cpu.onnx"
            assert (place["location"] == "cpu.data") == (".packed" in tensor.name)
            where = int(place["offset"]), int(place["length"])
            assert stored[place["location"]].setdefault(tensor.name, where) == where
    for file, places in stored.items():
        data = (exported(variant) / file).read_bytes()
        end, seen = 0, set()
        for offset, length in sorted(places.values()):
            assert end <= offset < end + 4096, "tensors overlap, or something is stored that no graph reads"
            assert offset % 4096 == 0, "cannot be mapped"
            end = offset + length
            assert length < 4096 or data[offset:end] not in seen, "the same weight twice"
            seen.add(data[offset:end])
        assert len(data) == end


def test_the_same_checkpoint_gives_the_same_bytes(tiny_checkpoint, tmp_path):
    quantize_checkpoint(tiny_checkpoint("llama"), tmp_path / "checkpoint")
    hashes = []
    for name in ("first", "second"):
        export_onnx(tmp_path / "checkpoint", tmp_path / name)
        files = sorted((tmp_path / name).iterdir())
        assert [file.name for file in files] == ["cpu.data", "cpu.onnx", "model.data", "model.onnx"]
        hashes.append([hashlib.sha256(file.read_bytes()).hexdigest() for file in files])
    assert hashes[0] == hashes[1]


def test_the_graph_for_the_cpu_is_named_beside_the_portable_one(tiny_checkpoint, tmp_path):
    result = export_onnx(tiny_checkpoint("llama"), tmp_path)
    names = {"graph": "cpu.onnx", "portable": "model.onnx"}
    assert result.pop("screened_bytes") in list_weight_bytes(tmp_path / "cpu.onnx", "cpu.data").values()
    assert result == {**names, "max_seq_len": 256, "kv_cache_dtype": "float32"}


@pytest.mark.parametrize("variant", ["llama", "gemma3_text", "gpt2"])
def test_logits_come_only_of_the_rows_that_are_asked_for(exported, variant):
    ids = np.random.default_rng(0).integers(0, 300, (2, 20))
    session = GraphSession(exported(variant) / "cpu.onnx", 24, batch=2)
    every = session.run(ids, [0, 0])
    assert np.array_equal(session.run(ids, [0, 0], num_logits=3), every[:, -3:])


def test_a_failed_export_leaves_nothing(tiny_checkpoint, tmp_path):
    quantize_checkpoint(tiny_checkpoint("llama"), tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "head.safetensors").unlink()
    with pytest.raises(ModelError, match="head"):
        export_onnx(tmp_path / "checkpoint", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("variant", ["llama", "gemma3_text", "gpt2"])
def test_positions_are_limited_as_asked(tiny_checkpoint, tmp_path, variant):
    config = Checkpoint(tiny_checkpoint(variant)).config
    result = export_onnx(tiny_checkpoint(variant), tmp_path, max_seq_len=32)
    assert result["max_seq_len"] == 32
    model = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    tables = (
        "rotary.cos",
        "rotary.sin",
        "rotary_local.cos",
        "rotary_local.sin",
        "model.embed_positions.weight",
    )
    rows = [tensor.dims[0] for tensor in model.graph.initializer if tensor.name in tables]
    assert rows == [32] * {"llama": 2, "gemma3_text": 4, "gpt2": 1}[variant]
    assert export_onnx(tiny_checkpoint(variant), tmp_path, max_seq_len=9999)["max_seq_len"] == (
        config.max_position_embeddings
    )


@pytest.mark.parametrize("graph", BOTH)
def test_the_cache_is_written_in_place_where_input_and_output_are_one_buffer(exported, graph):
    path, slots = exported("llama") / graph, 24
    ids = np.random.default_rng(0).integers(0, 300, (1, 20))
    copied = GraphSession(path, slots)
    session = open_session(path)
    binding, buffers = session.io_binding(), {}
    for name, array in copied.cache.items():
        buffers[name] = array.copy()
        value = ort.OrtValue.ortvalue_from_numpy(buffers[name])
        binding.bind_ortvalue_input(name, value)
        binding.bind_ortvalue_output(name.replace("past_key_values", "present"), value)
    for start, end in ((0, 9), (9, 10), (10, 16), (12, 20)):
        expected = copied.run(ids[:, start:end], [start])
        slot = np.arange(start, end)
        binding.bind_cpu_input("input_ids", np.ascontiguousarray(ids[:, start:end]))
        binding.bind_cpu_input("position_ids", slot[None])
        binding.bind_cpu_input("write_index", np.array([start]))
        binding.bind_cpu_input("attention_mask", (np.arange(slots) <= slot[:, None])[None, None])
        if graph == "cpu.onnx":
            binding.bind_cpu_input("num_logits", np.array([end - start]))
        binding.bind_output("logits", "cpu")
        session.run_with_iobinding(binding)
        assert np.array_equal(binding.get_outputs()[-1].numpy(), expected)
        for name, buffer in buffers.items():
            assert np.array_equal(buffer, copied.cache[name])

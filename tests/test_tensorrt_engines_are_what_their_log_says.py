"""TensorRT engines are built without a GPU, and nothing is said of one that its builder did not say."""

import json
import shutil
from importlib.util import find_spec

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from conftest import save_random_model
from draftsmith.export import capabilities, tensorrt
from draftsmith.export.build_log import read_layers, summarize
from draftsmith.export.portable import export_onnx
from draftsmith.export.precision import list_float_products, list_split_inputs, lower_precision
from draftsmith.model.errors import ModelError
from draftsmith.model.load import load_model
from draftsmith.pipeline.errors import RecipeError
from draftsmith.pipeline.preflight import check_recipe
from draftsmith.pipeline.recipe import Recipe
from draftsmith.speculate.driver import Gpu
from quantized import quantize_checkpoint

LAYERS, SLOTS = 3, 96

needs_rtx = pytest.mark.skipif(
    find_spec("tensorrt_rtx") is None,
    reason="tensorrt_rtx is not installed: pip install 'draftsmith[tensorrt]'",
)


def tensors(*pairs):
    return ", ".join(
        f"{{ Name: {name}, Dimensions: [1,8], Strides: [8,1], Datatype: {dtype} }}" for name, dtype in pairs
    )


def line(name, kind, reads, constants=(), writes=(("y", "Float"),), node=""):
    return (
        f"Name: {name}, LayerType: {kind}, Inputs: [ {tensors(*reads)}], "
        f"Constants: [ {tensors(*constants)}], Outputs: [ {tensors(*writes)}], "
        f"TacticName: t, StreamId: 0, Metadata: [ONNX Layer: {node}]\n"
    )


CACHES = [("present.0.key", "Half"), ("present.0.value", "Half")]
LOG = [
    "Engine generation completed.\n",
    line("a.MatMul_myl0_1", "gemm", [("x", "Int8")], [("w", "Int8"), ("s", "Float")], node="a.MatMul"),
    line("a.MatMul [profile 1]_myl1_1", "gemm", [("x", "Int8")], [("w", "Int8")], node="a.MatMul"),
    line("__myl_CastMulFc", "runtime_fusion", [("x", "BFloat16")], [("w", "Int8")], node="b.MatMul"),
    line("_gemv_mha_v1_myl0_3", "kgen", CACHES, node="Attention"),
    line("_gemm_mha_v2_myl1_3", "kgen", [("present.0.key [profile 1]", "Half")], node="Attention"),
    line("__myl_Mul", "kgen", [("x", "Float")], node="Mul"),
]


def test_the_log_tells_int8_products_from_int8_weights():
    said = summarize(LOG)
    assert said["int8_products"] == 2
    assert said["layers"]["runtime_fusion BFloat16 × Int8 → Float"] == 1
    assert said["fused_attention"] == 2
    assert said["caches_in_place"] == 2, "a cache is the same one in every profile"
    assert len(read_layers(LOG)) == 6


def test_sparse_tactics_are_those_that_the_builder_names():
    assert summarize(LOG)["sparse_tactics"] == 0
    assert (
        summarize([*LOG, "(Sparsity) Found 9 layer(s) eligible to use sparse tactics\n"])["sparse_tactics"]
        == 0
    )
    assert summarize([*LOG, "(Sparsity) Chose 7 layer(s) using sparse tactics\n"])["sparse_tactics"] == 7


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (["8.9", "5.2"], "compute_capability '5.2' is unknown; there are: 7.5, 8.0, .*9.0, 10.0"),
        (["8.9", "8.9"], "names one twice"),
        (["8.9", "7.5"], "7.5 has no bfloat16; give it an entry of its own with precision: float16"),
        (["8.9", "9.0"], "give 9.0 an entry of its own"),
        (["9.0"], "needs the package tensorrt, which is not installed: pip install tensorrt"),
        (
            ["8.9"],
            r"needs the package tensorrt_rtx, which is not installed: pip install 'draftsmith\[tensorrt\]'",
        ),
    ],
)
def test_what_cannot_be_built_is_named_with_the_way_out(monkeypatch, wanted, message):
    monkeypatch.setattr(capabilities, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=message):
        capabilities.choose_builder(wanted)


@pytest.mark.parametrize(
    ("gpus", "why", "message"),
    [
        (
            [],
            "no NVIDIA driver: x",
            "for the GPU that it finds, and here is none: no NVIDIA driver: x; build",
        ),
        (
            [Gpu("RTX 4090", "8.9", 1)],
            "",
            "and that is RTX 4090, 8.9; build on a machine with such",
        ),
        ([Gpu("H100", "9.0", 1), Gpu("RTX 4090", "8.9", 1)], "", ""),
    ],
)
def test_a_gpu_that_is_built_for_must_be_there(monkeypatch, gpus, why, message):
    """Found by the preflight, before any stage has cost time."""
    monkeypatch.setattr(capabilities, "find_spec", lambda name: name)
    monkeypatch.setattr(capabilities, "find_gpus", lambda: (gpus, why))
    recipe = Recipe.model_validate(
        {
            "version": 1,
            "model": {"source": "a/b"},
            "export": [{"format": "tensorrt", "compute_capability": ["9.0"], "max_seq_len": 256}],
        }
    )
    if not message:
        check_recipe(recipe)
        return
    with pytest.raises(RecipeError, match=message) as refused:
        check_recipe(recipe)
    assert str(refused.value).startswith("export.0: ") and "\n" not in str(refused.value)


def test_too_little_memory_is_found_before_the_builder_starts():
    with pytest.raises(ModelError, match=r"takes about 13\.0 GiB of memory, and 8\.0 GiB are free here"):
        tensorrt.check_memory(2 << 30, 8 << 30)
    tensorrt.check_memory(2 << 30, 13 << 30)


@pytest.fixture(scope="module")
def exports(tmp_path_factory, tiny_tokenizer):
    """Exports of a small Llama whose heads are as wide as TensorRT's attention wants: plain and rounded to
    int8."""
    root = tmp_path_factory.mktemp("small")
    sizes = {"hidden_size": 64, "head_dim": 32, "num_attention_heads": 4, "intermediate_size": 96}
    save_random_model("llama", sizes | {"tie_word_embeddings": True}, root / "model")
    shutil.copy(tiny_tokenizer, root / "model")
    load_model(str(root / "model"), "bfloat16", root / "float", root / "cache")
    quantize_checkpoint(root / "float", root / "int8")
    made = {}
    for name in ("float", "int8"):
        made[name] = root / f"{name}-export"
        export_onnx(root / name, made[name])
    return made


def logits(path, ids, slots, cache_dtype):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    rows = np.arange(len(ids))
    feeds = {
        "input_ids": np.array([ids]),
        "position_ids": rows[None],
        "write_index": np.zeros(1, np.int64),
        "attention_mask": (np.arange(slots) <= rows[:, None])[None, None],
    }
    for value in session.get_inputs():
        if value.name.startswith("past_key_values."):
            feeds[value.name] = np.zeros((1, value.shape[1], slots, value.shape[3]), cache_dtype)
    return session.run(["logits"], feeds)[0][0]


def test_products_in_16_bits_are_close_and_everything_else_is_as_it_was(exports):
    """ONNX Runtime's CPU provider has float16 products but none of bfloat16: the former stands for both."""
    portable, lowered = exports["float"] / "model.onnx", exports["float"] / "lowered.onnx"
    lowered.write_bytes(lower_precision(portable, "float16", SLOTS).SerializeToString())
    onnx.checker.check_model(lowered, full_check=True)
    ids = list(range(5, 25))
    exact = logits(portable, ids, SLOTS, np.float32)
    near = logits(lowered, ids, SLOTS, np.float16)
    assert near.dtype == np.float32
    error = np.abs(near - exact).max() / exact.std()
    assert 0 < error < 0.02
    kinds = [node.op_type for node in onnx.load(lowered, load_external_data=False).graph.node]
    assert kinds.count("RMSNormalization") == 2 * LAYERS + 1


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_int8_products_keep_their_float32_scales_and_the_others_are_named(exports, precision):
    portable = exports["int8"] / "model.onnx"
    model = lower_precision(portable, precision, SLOTS)
    types = {"bfloat16": onnx.TensorProto.BFLOAT16, "float16": onnx.TensorProto.FLOAT16}
    for value in [*model.graph.input, *model.graph.output]:
        if value.name.startswith(("past_key_values.", "present.")):
            assert value.type.tensor_type.elem_type == types[precision]
            assert [dim.dim_value for dim in value.type.tensor_type.shape.dim] == [1, 2, SLOTS, 32]
    scales = {node.input[1] for node in model.graph.node if node.op_type.endswith("QuantizeLinear")}
    stored = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert {stored[name] for name in scales} == {onnx.TensorProto.FLOAT}
    graph = onnx.load(portable, load_external_data=False).graph
    assert list_float_products(graph) == []
    assert list_split_inputs(graph) == [f"model.layers.{layer}.mlp.down_proj" for layer in range(LAYERS)]


@needs_rtx
@pytest.mark.parametrize("name", ["float", "int8"])
def test_an_engine_for_four_capabilities_is_built_and_described_without_a_gpu(exports, tmp_path, name):
    built = tensorrt.build_engine(
        exports[name],
        tmp_path,
        compute_capability=["8.0", "8.6", "8.9", "12.0"],
        rows=[5, 1, 5],
        max_seq_len=60,
    )
    plan = tmp_path / "engines" / "sm80-sm86-sm89-sm120.trt"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [plan], "what it worked with is gone"
    assert (built["file"], built["size"]) == ("engines/sm80-sm86-sm89-sm120.trt", plan.stat().st_size)
    assert (built["rows"], built["num_slots"], built["max_seq_len"]) == ([1, 5], 64, 60)
    assert built["builder"].startswith("tensorrt_rtx 1.")
    assert built["kv_cache_updates"] == built["caches_in_place"] == 2 * LAYERS
    assert built["fused_attention"] == LAYERS * len(built["rows"])
    products = built["matrix_products"]
    # qkv, o, gate and up, down of each layer, and the output projection
    assert products["total"] == (4 * LAYERS + 1) * len(built["rows"])
    assert products["int8"] == (0 if name == "float" else products["total"])
    assert built["kept_in_higher_precision"] == []
    assert len(built["inputs_in_two_int8_parts"]) == (0 if name == "float" else LAYERS)
    assert built["sparse_tactics"] == 0
    assert built["peak_memory"] < tensorrt.estimate_memory((exports[name] / "model.data").stat().st_size)
    json.dumps(built)


@needs_rtx
def test_an_operator_that_the_builder_refuses_is_named(exports, tmp_path):
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "model.data").write_bytes((exports["float"] / "model.data").read_bytes())
    model = onnx.load(exports["float"] / "model.onnx", load_external_data=False)
    node = next(node for node in model.graph.node if node.op_type == "Sigmoid")
    node.op_type, node.domain = "Multinomial", ""
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match=r"tensorrt_rtx: the graph is not accepted: .*Multinomial"):
        tensorrt.build_engine(folder, tmp_path, compute_capability=["8.9"], rows=[1], max_seq_len=60)


@needs_rtx
def test_a_builder_that_dies_is_one_line(exports, tmp_path, monkeypatch):
    died = type("Died", (), {"returncode": -9, "stdout": "", "stderr": ""})
    monkeypatch.setattr(tensorrt.subprocess, "run", lambda *_, **__: died)
    with pytest.raises(ModelError, match="ended by signal 9, which is what a machine out of memory does"):
        tensorrt.build_engine(
            exports["float"], tmp_path, compute_capability=["8.9"], rows=[1], max_seq_len=60
        )

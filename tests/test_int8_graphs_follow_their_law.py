"""Int8 linears in the graphs: one scale a token row in cpu.onnx, one fixed scale in model.onnx."""

import numpy as np
import onnx
import pytest
import torch
from draftsmith.export.builder import Graph
from draftsmith.export.linear import apply_linears
from draftsmith.export.onnx_files import WeightFile, write_model
from draftsmith.export.packed import PackedLinear
from draftsmith.export.portable import export_onnx
from draftsmith.export.weights import StoredLinear
from draftsmith.model.decoder import Decoder, Linear
from draftsmith.model.store import Checkpoint
from graph_session import GraphSession, open_session
from quantized import quantize_checkpoint

FAMILIES = ["llama-bias", "llama-tied", "qwen3", "gemma3_text", "opt", "gpt2"]
NUM_TOKENS = 24


def run_linear(folder, x, weight, weight_scale, bias, input_scales=()):
    """x [B, S, K] through one int8 linear, weight [K, N], as a graph by itself."""
    with WeightFile(folder / "model.data") as weights:
        weights.add("linear.weight", torch.tensor(weight))
        weights.add("linear.weight_scale", torch.tensor(weight_scale))
        weights.add("linear.weight_zero_point", torch.zeros(weight.shape[1], dtype=torch.int8))
        if has_bias := bool(bias.any()):
            weights.add("linear.bias", torch.tensor(bias))
    graph = Graph("linear", weights)
    packed = PackedLinear("linear", weight.shape[1], weight.shape[0], "int8", False, has_bias)
    linear = StoredLinear("linear", (weight.shape[1],), True, has_bias, input_scales, packed)
    graph.input("x", onnx.TensorProto.FLOAT, ["batch", "tokens", weight.shape[0]])
    graph.op("Identity", *apply_linears(graph, "x", [linear]), output="y")
    graph.output("y", onnx.TensorProto.FLOAT, ["batch", "tokens", weight.shape[1]])
    write_model(graph.model(), folder / "model.onnx")
    return open_session(folder / "model.onnx").run(None, {"x": x})[0]


@pytest.fixture(params=[False, True], ids=["plain", "bias"])
def numbers(request):
    """x with rows of every size, zeros and exact ties among them; weights at full scale."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((2, 7, 96)) * 10.0 ** rng.integers(-6, 4, (2, 7, 1))
    x[0, 0] = 0
    x[0, 1] = 127
    x[0, 1, 1:] = rng.integers(-126, 126, 95) + 0.5
    x[1, 2] = rng.choice([-1, 1], 96)  # every product at full scale
    weight = rng.integers(-127, 128, (96, 40))
    weight[:, :3] = [-127, 127, 0]
    scale, bias = rng.uniform(1e-4, 1e-2, 40), rng.standard_normal(40) * request.param
    return (
        x.astype(np.float32),
        weight.astype(np.int8),
        scale.astype(np.float32),
        bias.astype(np.float32),
    )


def test_static_scales_are_exact_sums_over_clipped_rows(numbers, tmp_path):
    x, weight, weight_scale, bias = numbers
    y = run_linear(tmp_path, *numbers, input_scales=(0.25,))
    rounded = np.rint(x / np.float32(0.25)).clip(-128, 127).astype(np.int64)
    assert {-128, 127} <= set(rounded.ravel())
    product = (rounded @ weight.astype(np.int64)) * (0.25 * weight_scale.astype(np.float64))
    bound = 4e-7 * (np.abs(product) + np.abs(bias))
    assert (np.abs(y - (product + bias)) <= bound).all()


def test_an_input_in_two_parts_has_15_bits(numbers, tmp_path):
    """Within the range of the first part the product is that of an input rounded to 1/254 of its step."""
    x, weight, weight_scale, bias = numbers
    x = x.clip(-32, 31.75)
    y = run_linear(tmp_path, x, *numbers[1:], input_scales=(0.25, 0.25 / 254))
    first = np.rint(x.astype(np.float64) / 0.25)
    rest = np.rint((x - 0.25 * first) * np.float32(254) / 0.25).clip(-128, 127)
    assert np.abs(first).max() == 128 and np.abs(rest).max() > 120
    rounded = 0.25 * (first + rest / 254)
    assert np.abs(rounded - x).max() <= 0.5001 * 0.25 / 254
    scaled = weight * weight_scale.astype(np.float64)
    size = np.abs(rounded) @ np.abs(scaled) + np.abs(bias)
    assert (np.abs(y - (rounded @ scaled + bias)) <= 1e-6 * size + 1e-12).all()


def test_without_a_static_scale_activations_stay_in_float(numbers, tmp_path):
    x, weight, weight_scale, bias = numbers
    y = run_linear(tmp_path, *numbers)
    exact = x.astype(np.float64) @ (weight * weight_scale.astype(np.float64)) + bias
    size = np.abs(x).astype(np.float64) @ (np.abs(weight) * weight_scale.astype(np.float64)) + np.abs(bias)
    assert (np.abs(y - exact) <= 1e-6 * size).all()


class StaticLinear(Linear):
    """The law of model.onnx in float64."""

    def __init__(self, name, tensors):
        super().__init__(name, tensors)
        self.input_scale = tensors.get(f"{name}.input_scale")

    def forward(self, x):
        x = x.double()
        if self.input_scale is not None:
            rest, x = x, torch.zeros(())
            for scale in self.input_scale.double():
                part = torch.round((rest / scale).float()).clamp(-128, 127).double() * scale
                rest, x = rest - part, x + part
        y = x @ (self.weight.double() * self.weight_scale[:, None]).T
        return (y if self.bias is None else y + self.bias).float()


def make_static(decoder: Decoder, checkpoint: Checkpoint) -> Decoder:
    for index, layer in enumerate(decoder.layers):
        tensors = checkpoint.load_layer(index)
        for name in layer.linears():
            layer.set_submodule(name, StaticLinear(name, tensors))
    decoder.head.lm_head = StaticLinear("lm_head", checkpoint.load_head())
    return decoder


@pytest.fixture(scope="module", params=FAMILIES)
def int8(request, tiny_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("int8")
    quantize_checkpoint(tiny_checkpoint(request.param), folder / "checkpoint")
    files = export_onnx(folder / "checkpoint", folder / "out")
    assert files["graph"] == "cpu.onnx"
    return Checkpoint(folder / "checkpoint"), folder / "out"


def check_logits(path, decoder: Decoder, worst: float = 2e-2):
    """A value on the edge between two steps may be rounded either way, and all that follows is off by about a
    step then. So all but few logits agree to float precision, and all to the precision of int8."""
    ids = np.random.default_rng(4).integers(0, decoder.config.vocab_size, (2, NUM_TOKENS))
    expected = decoder(torch.from_numpy(ids)).numpy()
    logits = GraphSession(path, NUM_TOKENS, batch=2).run(ids, [0, 0])
    errors = np.abs(logits - expected).max(-1) / np.abs(expected).max()
    assert np.median(errors) < 1e-5
    assert errors.max() < worst


def test_cpu_graph_has_the_logits_of_the_dynamic_law(int8):
    checkpoint, out = int8
    check_logits(out / "cpu.onnx", Decoder.from_checkpoint(checkpoint))


def test_portable_graph_has_the_logits_of_the_static_law(int8):
    checkpoint, out = int8
    check_logits(out / "model.onnx", make_static(Decoder.from_checkpoint(checkpoint), checkpoint))


def test_a_row_does_not_feel_the_scale_of_its_neighbours(int8):
    """A draft beside it, however large its activations, does not change a token's logits."""
    checkpoint, out = int8
    config = checkpoint.config
    ids = np.random.default_rng(4).integers(0, config.vocab_size, (1, 8))
    alone = GraphSession(out / "cpu.onnx", 16).run(ids, [0])
    crowd = np.concatenate((ids, np.random.default_rng(5).integers(0, config.vocab_size, (1, 8))), 1)
    assert np.array_equal(GraphSession(out / "cpu.onnx", 16).run(crowd, [0])[:, :8], alone)


@pytest.mark.parametrize(
    "leave", [("self_attn.k_proj",), ("mlp.gate_proj", "self_attn.v_proj"), ("self_attn.o_proj",)]
)
def test_linears_kept_in_float_stand_by_themselves(tiny_checkpoint, tmp_path, leave):
    quantize_checkpoint(tiny_checkpoint("llama"), tmp_path / "checkpoint", leave=leave)
    export_onnx(tmp_path / "checkpoint", tmp_path)
    check_logits(tmp_path / "cpu.onnx", Decoder.from_checkpoint(Checkpoint(tmp_path / "checkpoint")))


@pytest.mark.parametrize("leave", [(), ("self_attn.k_proj",)], ids=["fused", "split"])
def test_linears_of_one_input_share_its_quantization(tiny_checkpoint, tmp_path, leave):
    quantize_checkpoint(tiny_checkpoint("llama"), tmp_path / "checkpoint", leave=leave)
    export_onnx(tmp_path / "checkpoint", tmp_path)
    nodes = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph.node
    layers = Checkpoint(tmp_path / "checkpoint").config.num_layers
    # down_proj takes two: to find the second part of its input, and on both.
    assert sum(node.op_type == "QuantizeLinear" for node in nodes) == layers * 5 + 1


def test_linears_stored_as_one_are_static_only_together(tiny_checkpoint, tmp_path):
    quantize_checkpoint(tiny_checkpoint("llama"), tmp_path / "checkpoint", no_scale=("self_attn.k_proj",))
    export_onnx(tmp_path / "checkpoint", tmp_path)
    layers = Checkpoint(tmp_path / "checkpoint").config.num_layers
    for graph, kind, count in (
        # none for q, k and v; o; gate and up; down, of two parts; and the head
        ("model.onnx", "QuantizeLinear", layers * (0 + 1 + 1 + 2) + 1),
        ("cpu.onnx", "Layer", layers),
    ):
        nodes = onnx.load(tmp_path / graph, load_external_data=False).graph.node
        assert sum(node.op_type == kind for node in nodes) == count
    check_logits(tmp_path / "cpu.onnx", Decoder.from_checkpoint(Checkpoint(tmp_path / "checkpoint")))

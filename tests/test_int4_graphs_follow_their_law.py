"""Linears of 4 bits in the graphs: rows quantized one by one in cpu.onnx, activations in float in model.onnx,
which is of standard operators alone."""

import json

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from draftsmith.export.portable import export_onnx
from draftsmith.model.decoder import Decoder
from draftsmith.model.linear import Linear
from draftsmith.model.store import Checkpoint
from draftsmith.speculate.bundle import load
from fake_engine import write_manifest
from graph_session import GraphSession
from quantized import quantize_checkpoint
from test_int8_graphs_follow_their_law import check_logits
from tiny_bundle import write_tiny_bundle

# Its sums are of floats, unlike those of int8, so more values end up across a rounding boundary.
WORST = 5e-2
FAMILIES = ["llama-bias", "llama-tied", "qwen3", "gemma3_text", "opt", "gpt2"]


class FloatRows(Linear):
    """The law of model.onnx."""

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight, self.bias)


def keep_rows(decoder: Decoder, checkpoint: Checkpoint) -> Decoder:
    for index, layer in enumerate(decoder.layers):
        for name in layer.linears():
            layer.set_submodule(name, FloatRows(name, checkpoint.load_layer(index)))
    decoder.head.lm_head = FloatRows("lm_head", checkpoint.load_head())
    return decoder


@pytest.fixture(scope="module", params=FAMILIES)
def int4(request, tiny_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("int4")
    quantize_checkpoint(tiny_checkpoint(request.param), folder / "checkpoint", bits=4)
    export_onnx(folder / "checkpoint", folder / "out")
    return Checkpoint(folder / "checkpoint"), folder / "out"


def test_cpu_graph_has_the_logits_of_the_w4a8_law(int4):
    checkpoint, out = int4
    check_logits(out / "cpu.onnx", Decoder.from_checkpoint(checkpoint), WORST)


def test_portable_graph_has_the_logits_of_the_weights(int4):
    checkpoint, out = int4
    check_logits(out / "model.onnx", keep_rows(Decoder.from_checkpoint(checkpoint), checkpoint))


def test_both_graphs_are_one_model(int4):
    """They differ by what rounding the rows to int8 costs."""
    checkpoint, out = int4
    ids = np.random.default_rng(4).integers(0, checkpoint.config.vocab_size, (1, 24))
    ours, portable = (GraphSession(out / name, 24).run(ids, [0]) for name in ("cpu.onnx", "model.onnx"))
    assert np.sqrt(np.mean((ours - portable) ** 2)) < 0.1 * portable.std()


def test_portable_graph_is_of_standard_operators(int4):
    _, out = int4
    model = onnx.load(out / "model.onnx", load_external_data=False)
    assert {node.domain for node in model.graph.node} == {""}
    weights = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.INT4]
    dequantized = [node for node in model.graph.node if node.op_type == "DequantizeLinear"]
    assert len(weights) == len(dequantized) > 0
    ort.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])  # without our library


@pytest.mark.parametrize(
    "leave", [("self_attn.k_proj",), ("mlp.gate_proj", "self_attn.v_proj"), ("self_attn.o_proj",)]
)
def test_linears_kept_in_float_stand_by_themselves(tiny_checkpoint, tmp_path, leave):
    quantize_checkpoint(tiny_checkpoint("llama"), tmp_path / "checkpoint", leave=leave, bits=4)
    export_onnx(tmp_path / "checkpoint", tmp_path)
    check_logits(tmp_path / "cpu.onnx", Decoder.from_checkpoint(Checkpoint(tmp_path / "checkpoint")), WORST)


# ---- In a bundle -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """The tiny bundle with a second drafter, the target in 4 bits."""
    folder = tmp_path_factory.mktemp("bundle") / "bundle"
    write_tiny_bundle(folder)
    checkpoint = folder.parent / "int4.checkpoint"
    quantize_checkpoint(folder.parent / "target.checkpoint", checkpoint, bits=4)
    export_onnx(checkpoint, folder / "drafters/int4")
    manifest = json.loads((folder / "manifest.json").read_text())
    paths = {
        key: f"drafters/int4/{name}" for key, name in (("graph", "cpu.onnx"), ("portable", "model.onnx"))
    }
    manifest["engines"]["int4"] = {**manifest["engines"]["int8"], **paths, "weights": "W4A8"}
    write_manifest(folder, manifest)
    return folder


@pytest.mark.parametrize("ladder", [["int4"], ["suffix", "int4"], ["int4", "int8"]], ids="-".join)
def test_decoding_with_a_drafter_of_4_bits_is_lossless(bundle, ladder):
    opened, taken = load(bundle, threads=2), 0
    for seed, prompt in enumerate(("abc abd", "the quick brown fox", "x = 1\ny = ")):
        plain = opened.generate(prompt, max_new_tokens=60, speculate="none", ignore_eos=True)
        drafted = opened.generate(prompt, max_new_tokens=60, speculate=ladder, ignore_eos=True)
        assert drafted.token_ids == plain.token_ids
        by_name = {draft.name: draft for draft in drafted.stats.drafts}
        taken += by_name["int4"].accepted
        sampled = [
            opened.generate(
                prompt, max_new_tokens=40, temperature=0.8, seed=seed, speculate=levels, verify="exact",
                ignore_eos=True,
            ).token_ids
            for levels in ("none", ladder)
        ]  # fmt: skip
        assert sampled[0] == sampled[1]
    assert taken > 0

"""A drafter that is the target without some layers, in the target's own cache: it computes what such a model
computes, reads no prompt, and leaves no trace in what the target says."""

import re

import numpy as np
import pytest
import torch
from conftest import VARIANTS
from decoding import check_no_trace, check_read_along, decode, random_costs
from draftsmith.export.portable import export_onnx
from draftsmith.model.store import Checkpoint
from draftsmith.speculate.ladder import Rung
from draftsmith.speculate.onnx_engine import OnnxEngine, OnnxRuntime, SkippingEngine
from draftsmith.speculate.settings import Sampling
from fake_engine import FakeEngine, FakeGuest
from graph_session import entry_of, error_of
from quantized import KINDS, export_kind
from transformers import AutoModelForCausalLM

BOUND = 2e-5  # as of whole graphs
NUM_TOKENS = 40
# What the residual stream takes from a sublayer, by the names that transformers gives it.
OUTPUTS = ("attn.o_proj", "attn.out_proj", "attn.c_proj"), ("mlp.down_proj", "fc2", "mlp.c_proj")
SKIPS = {
    "an attention": [[1, 0], [0, 0], [0, 0]],
    "an MLP": [[0, 0], [0, 1], [0, 0]],
    "a layer": [[0, 0], [1, 1], [0, 0]],
    "one of each": [[0, 1], [1, 0], [0, 1]],
    "all but one": [[1, 1], [1, 0], [1, 1]],
}


def open_target(folder, threads=2) -> OnnxEngine:
    config = Checkpoint(folder / "checkpoint").config
    return OnnxEngine("target", folder / "cpu.onnx", entry_of(config), OnnxRuntime(threads))


def skip(target: OnnxEngine, table) -> SkippingEngine:
    return SkippingEngine("skip", target, np.array(table, bool))


def table_of(skips: str, num_layers: int) -> np.ndarray:
    table = np.zeros((num_layers, 2), bool)
    table[:3] = SKIPS[skips]
    return table


def remove_sublayers(model: torch.nn.Module, table) -> torch.nn.Module:
    """The reference: a sublayer whose output is zero is none."""
    removed = 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            layer = int(match[1]) if (match := re.search(r"\.(\d+)\.", name)) else -1
            for part, outputs in enumerate(OUTPUTS):
                if layer >= 0 and table[layer][part] and name.rpartition(".")[0].endswith(outputs):
                    parameter.zero_()
                    removed += name.endswith("weight")
    assert removed == np.sum(table)
    return model


@pytest.fixture(scope="module", params=VARIANTS)
def exported(request, tiny_folder, tiny_checkpoint, tmp_path_factory):
    """(the folder of transformers' model, the folder of its graph)"""
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "checkpoint").symlink_to(tiny_checkpoint(request.param))
    export_onnx(folder / "checkpoint", folder)
    return tiny_folder(request.param), folder


def load_reference(folder) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("skips", SKIPS)
def test_it_computes_what_the_model_without_these_sublayers_computes(exported, skips):
    source, folder = exported
    target = open_target(folder)
    ids = np.random.default_rng(5).integers(0, target.vocab_size, NUM_TOKENS).astype(np.int32)
    table = table_of(skips, Checkpoint(folder / "checkpoint").config.num_layers)
    with torch.no_grad():
        whole, wanted = (
            model(torch.as_tensor(ids[None])).logits[0].numpy()
            for model in (load_reference(source), remove_sublayers(load_reference(source), table))
        )
    drafter = skip(target, table)
    drafter.reserve(64)
    logits = np.concatenate([drafter.forward(ids[:17], 0).copy(), drafter.forward(ids[17:], 17).copy()])
    assert error_of(logits, wanted) < BOUND < error_of(logits, whole)
    assert error_of(target.forward(ids, 0), whole) < BOUND, "the target is whole again"


def test_behind_the_targets_rows_it_sees_these(exported):
    source, folder = exported
    target, full = open_target(folder), load_reference(source)
    ids = np.random.default_rng(6).integers(0, target.vocab_size, NUM_TOKENS).astype(np.int32)
    table = table_of("one of each", Checkpoint(folder / "checkpoint").config.num_layers)
    reduced = remove_sublayers(load_reference(source), table)
    drafter = skip(target, table)
    drafter.reserve(64)
    for start in (1, 5, 23, NUM_TOKENS - 2):
        tokens = torch.as_tensor(ids[None])
        with torch.no_grad():
            cache = full(tokens[:, :start], use_cache=True).past_key_values
            wanted = reduced(tokens[:, start : start + 1], past_key_values=cache).logits[0].numpy()
            alone = reduced(tokens[:, : start + 1]).logits[0, -1:].numpy()
        target.forward(ids[:start], 0)
        logits = drafter.forward(ids[start : start + 1], start).copy()
        assert error_of(logits, wanted) < BOUND < error_of(logits, alone)


@pytest.fixture(scope="module", params=[*(("llama-bias", kind) for kind in KINDS), ("gemma3_text", "int8")])
def folder(request, tiny_checkpoint, tmp_path_factory):
    variant, kind = request.param
    folder = tmp_path_factory.mktemp(f"{variant}-{kind.replace(':', '')}")
    source = tiny_checkpoint(variant)
    export_kind(source, kind, folder)
    return folder


@pytest.mark.parametrize("temperature", [0.0, 8.0])
def test_tokens_are_those_of_the_target_alone_and_so_is_the_cache_behind_them(folder, temperature):
    target = open_target(folder)
    engines = {
        "target": target,
        "skip": skip(target, [[0, 0], [0, 0], [1, 0]]),
        "less": skip(target, [[1, 0], [0, 0], [1, 0]]),
    }
    ladders = (["skip"], ["suffix", "skip"], ["less", "skip"], ["suffix-tree", "less", "skip"])
    check_no_trace(engines, ladders, 3, temperature)


def test_a_draft_with_nothing_skipped_is_accepted_whole(folder):
    target, length = open_target(folder), 41
    engines = {"target": target, "skip": skip(target, np.zeros((3, 2)))}
    out = decode(engines, [Rung("skip", 4)], range(40), length)
    assert [len(block) for block in out.blocks] == [1, *[5] * 8]
    assert out.drafter.accepted == out.drafter.drafted == 32
    assert out.drafter.rows == out.drafter.drafted, "it reads no prompt, and nothing again"


def test_read_along_is_what_a_draft_right_there_says(folder):
    target = open_target(folder)
    check_read_along(target, skip(target, [[0, 1], [1, 0], [0, 0]]))


def guests_and_others(vocab_size, seed):
    """The same drafters in the target's cache and in caches of their own."""
    target = FakeEngine(vocab_size, seed)
    models = {"skip": {"noise": 0.8, "own": 1}, "less": {"noise": 1.6, "own": 2}}
    shared = {"target": target, "int8": FakeEngine(vocab_size, seed, noise=0.5, own=3)}
    shared |= {name: FakeGuest(target, seed=seed, **model) for name, model in models.items()}
    apart = {name: FakeEngine(vocab_size, seed, **model) for name, model in models.items()}
    return shared, shared | apart


@pytest.mark.parametrize("rule", ["block", "token", "exact"])
@pytest.mark.parametrize("seed", range(20))
def test_a_shared_cache_changes_nothing_but_what_is_read(seed, rule):
    rng = np.random.default_rng(seed)
    shared, apart = guests_and_others(int(rng.choice([2, 3, 5])), seed)
    saved = 0
    for names in (["skip"], ["suffix", "skip"], ["less", "skip"], ["skip", "int8"],
                  ["suffix-tree", "skip"], ["suffix-tree", "less", "skip"],
                  ["less-tree", "skip"], ["less-sequoia", "skip"]):  # fmt: skip
        rungs = [Rung(name, int(rng.choice([1, 2, 4, 7]))) for name in names]
        prompt = rng.integers(shared["target"].vocab_size, size=int(rng.integers(1, 30))).tolist()
        sampling = Sampling(float(rng.choice([0.0, 1.0])), seed=seed, rule=rule)
        costs = random_costs(rng, shared) if rng.random() < 0.5 else None
        one, other = (
            decode(engines, rungs, prompt, 30, sampling, costs=costs) for engines in (shared, apart)
        )
        assert one.blocks == other.blocks
        assert (one.drafter.drafted, one.drafter.accepted) == (other.drafter.drafted, other.drafter.accepted)
        saved += other.decoder.counters(len(names) - 1).rows - one.decoder.counters(len(names) - 1).rows
    assert saved > 0


def test_what_cannot_be_skipped_is_refused_in_words(folder, tiny_checkpoint):
    target = open_target(folder)
    for table, words in (
        (np.ones((3, 2)), "all 6 sublayers are skipped"),
        (np.zeros((4, 2)), "6 sublayers, not 8"),
    ):
        with pytest.raises(Exception, match=words):
            skip(target, table)
    with pytest.raises(Exception, match="no engine"):
        skip(skip(target, np.zeros((3, 2))), np.zeros((3, 2)))
    portable = entry_of(Checkpoint(folder / "checkpoint").config)
    stock = OnnxEngine("target", folder / "model.onnx", portable, OnnxRuntime(1))
    with pytest.raises(Exception, match=r"not of operators of ours .* run its graph for the CPU"):
        skip(stock, np.zeros((3, 2)))
    other = open_target(folder)
    with pytest.raises(Exception, match="level 0 drafts in the cache of one that is not above it"):
        decode({"target": other, "skip": skip(target, SKIPS["a layer"])}, [Rung("skip", 2)], [1, 2], 4)

"""A compressed copy that drafts in the cache of its target: it sees what that wrote there, reads no prompt
and nothing again, and leaves no trace in what the target says. By itself it is the engine that it was."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import CACHE
from decoding import check_no_trace, check_read_along, decode, draw_ids
from draftsmith.export.portable import export_onnx
from draftsmith.model.load import load_model
from draftsmith.model.store import Checkpoint
from draftsmith.pipeline.recipe import Recipe
from draftsmith.pipeline.stages import plan_tasks
from draftsmith.pipeline.traces import measure_agreement, record
from draftsmith.speculate.bundle import load
from draftsmith.speculate.engine import GuestEngine
from draftsmith.speculate.errors import BundleError
from draftsmith.speculate.joint import Ensemble, generate_jointly
from draftsmith.speculate.ladder import Rung
from draftsmith.speculate.onnx_engine import OnnxEngine, OnnxRuntime, SharingEngine
from fake_engine import write_manifest
from graph_session import entry_of, error_of
from quantized import export_kind
from test_skipping_layers_changes_no_token import load_reference, skip
from tiny_bundle import write_tiny_bundle

BOUND = 2e-5  # as of whole graphs
NUM_TOKENS = 40


def open_engine(folder, name="target", graph="cpu.onnx", runtime=None) -> OnnxEngine:
    config = Checkpoint(folder / "checkpoint").config
    return OnnxEngine(name, folder / graph, entry_of(config), runtime or OnnxRuntime(2))


# ---- What it computes --------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["llama-bias", "qwen3", "gemma3_text", "phi3", "opt", "gpt2"])
def copies(request, tiny_folder, tiny_checkpoint, tmp_path_factory):
    """(transformers' model and the folder of its graph), of a model and of one with weights near its own"""
    folder = tmp_path_factory.mktemp(request.param)
    near = folder / "near"
    model = load_reference(tiny_folder(request.param))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(near)
    for file in ("tokenizer.json", "chat_template.jinja"):
        shutil.copy(tiny_folder(request.param) / file, near)
    (folder / "target").mkdir()
    (folder / "target/checkpoint").symlink_to(tiny_checkpoint(request.param))
    load_model(str(near), "float32", folder / "copy/checkpoint", CACHE)
    for name in ("target", "copy"):
        export_onnx(folder / name / "checkpoint", folder / name)
    return (tiny_folder(request.param), folder / "target"), (near, folder / "copy")


def test_it_sees_the_targets_rows_and_its_own_behind_them(copies):
    """As transformers' copy does, given the keys and values of transformers' target."""
    (source, folder), (near, copy_folder) = copies
    full, other = load_reference(source), load_reference(near)
    target, engine = open_engine(folder), open_engine(copy_folder, "copy")
    drafter = SharingEngine("copy", target, engine)
    ids = draw_ids(target, NUM_TOKENS, 6)
    tokens = torch.as_tensor(ids[None].astype(np.int64))
    drafter.reserve(64)
    for start in (1, 5, 23, NUM_TOKENS - 3):
        with torch.no_grad():
            cache = full(tokens[:, :start], use_cache=True).past_key_values
            wanted = other(tokens[:, start : start + 3], past_key_values=cache).logits[0].numpy()
            alone = other(tokens[:, : start + 3]).logits[0, -3:].numpy()
        target.forward(ids[:start], 0)
        first = drafter.forward(ids[start : start + 2], start).copy()
        logits = np.concatenate([first, drafter.forward(ids[start + 2 : start + 3], start + 2)])
        assert error_of(logits, wanted) < BOUND < error_of(logits, alone)


# ---- Decoding ----------------------------------------------------------------------------------------------

# A model, and the weights of the target and of the copies that draft for it. Of qwen3 what is quantized has a
# cache in bfloat16: the target of the last, and the copies before it, which leave it for the target's.
PAIRS = [
    ("llama-bias", "float32", "int8", "int4"),
    ("llama-bias", "bfloat16", "int4", "2:4"),
    ("llama-bias", "int8", "int4", "half"),
    ("qwen3", "bfloat16", "int8", "int4"),
    ("qwen3", "int8", "int4", "bfloat16"),
]


@pytest.fixture(scope="module", params=PAIRS, ids="-".join)
def folders(request, tiny_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kinds")
    variant, *kinds = request.param
    for name, kind in zip(("target", "copy", "small"), kinds, strict=True):
        export_kind(tiny_checkpoint(variant), kind, folder / name)
    return folder


def open_ladder(folder) -> dict[str, OnnxEngine]:
    """The target, two copies in its cache, and one with a cache of its own."""
    runtime = OnnxRuntime(2)
    engines = {
        name: open_engine(folder / name, name, runtime=runtime) for name in ("target", "copy", "small")
    }
    guests = {name: SharingEngine(name, engines["target"], engines[name]) for name in ("copy", "small")}
    return {**engines, **guests, "apart": engines["small"]}


LADDERS = [
    ["copy"],
    ["suffix", "copy"],
    ["small", "copy"],
    ["copy", "apart"],
    ["apart", "copy"],
    ["suffix-tree", "small", "copy"],
    ["copy-tree"],
    ["copy-graph"],
    ["copy-sequoia"],
    ["small-tree", "copy"],
    ["small-sequoia", "copy"],
]


@pytest.mark.parametrize("temperature", [0.0, 8.0])
def test_tokens_are_those_of_the_target_alone_and_so_is_the_cache_behind_them(folders, temperature):
    check_no_trace(open_ladder(folders), LADDERS, 5, temperature)


def test_a_copy_of_the_same_weights_is_accepted_whole(tiny_checkpoint, tmp_path):
    export_kind(tiny_checkpoint("llama-bias"), "int8", tmp_path)
    target = open_engine(tmp_path)
    engines = {"target": target, "copy": SharingEngine("copy", target, open_engine(tmp_path, "copy"))}
    out = decode(engines, [Rung("copy", 4)], range(40), 41)
    assert [len(block) for block in out.blocks] == [1, *[5] * 8]
    assert out.drafter.accepted == out.drafter.drafted == 32
    assert out.drafter.rows == out.drafter.drafted, "it reads no prompt, and nothing again"


def test_a_chain_verified_in_the_same_cache_is_kept_for_who_drafted_it(folders):
    """Of three levels in one cache the innermost reads what it drafts, and nothing again."""
    engines = open_ladder(folders)
    out = decode(engines, [Rung("small", 2), Rung("copy", 6)], range(3, 30), 60)
    inner = out.decoder.counters(0)
    assert inner.drafted > 0 and inner.rows == inner.drafted
    assert (
        decode(engines, [Rung("apart", 2), Rung("copy", 6)], range(3, 30), 60).decoder.counters(0).rows
        > inner.rows
    )


def test_by_itself_it_is_as_before(folders):
    engines = open_ladder(folders)
    alone, target, drafter = engines["apart"], engines["target"], engines["small"]
    ids = draw_ids(target, 50)
    alone.reserve(64)
    wanted = alone.forward(ids, 0).copy()
    drafter.reserve(120)
    target.forward(ids[::-1], 0)
    inside = drafter.forward(ids[:1], 50).copy()
    assert np.array_equal(alone.forward(ids[40:], 40), wanted[40:]), "its rows are still there"
    assert np.array_equal(drafter.forward(ids[:1], 50), inside), "and so are the target's"
    drafter.reserve(200)  # another cache
    target.forward(ids[::-1], 0)
    assert np.array_equal(drafter.forward(ids[:1], 50), inside)


def test_read_along_is_what_a_draft_right_there_says(folders):
    engines = open_ladder(folders)
    check_read_along(engines["target"], engines["copy"])


def test_caches_that_differ_are_refused_in_words(folders, tiny_checkpoint, tmp_path):
    target, copy = (open_engine(folders / name, name) for name in ("target", "copy"))
    export_kind(tiny_checkpoint("gpt2"), "float32", tmp_path)
    stock = open_engine(folders / "copy", "copy", "model.onnx")
    guest = SharingEngine("copy", target, copy)
    other = open_engine(tmp_path, "other")
    for host, engine, words in (
        (target, other, r"a cache of \d layers, \d heads, \d+ channels for an engine of"),
        (target, stock, "runs on stock operators"),
        (target, target, "each with a cache of its own"),
        (target, guest, "each with a cache of its own"),
        (skip(target, np.zeros((3, 2))), copy, "each with a cache of its own"),
    ):
        with pytest.raises(BundleError, match=words):
            SharingEngine("copy", host, engine)
    with pytest.raises(BundleError, match="8 rows from slot 60 on; the cache was reserved for 64"):
        guest.reserve(64)
        guest.forward(draw_ids(target, 8), 60)


# ---- In a bundle -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle_folder(tmp_path_factory):
    """The tiny bundle, whose drafter may share the target's cache."""
    folder = write_tiny_bundle(tmp_path_factory.mktemp("bundle") / "bundle")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["engines"]["int8"]["shares_cache"] = True
    write_manifest(folder, manifest)
    return folder


def test_a_bundle_says_who_shares(bundle_folder):
    bundle = load(bundle_folder, threads=2)
    drafter, alone = bundle.engine("int8"), bundle.engine("int8", alone=True)
    assert isinstance(drafter, GuestEngine) and drafter.cache_host is bundle.engine("target")
    assert not isinstance(alone, GuestEngine) and bundle.engine("int8") is drafter
    plain = bundle.generate("abc abd", 40, speculate="none", ignore_eos=True)
    drafted = bundle.generate("abc abd", 40, speculate=["int8"], ignore_eos=True)
    assert drafted.token_ids == plain.token_ids
    assert alone.calls == 0, "it never needed a cache"
    recording = record(bundle, bundle.encode("abc abd"), ["int8"], 20)
    assert recording.guests == {"int8"}


def test_its_logits_are_its_own_or_those_of_a_draft(bundle_folder):
    bundle = load(bundle_folder, threads=2)
    ids = bundle.encode("the quick brown fox")
    alone, drafting = bundle.logits(ids, "int8"), bundle.logits(ids, "int8", drafting=True)
    engine = bundle.engine("int8", alone=True)
    engine.reserve(len(ids))
    assert np.array_equal(alone, engine.forward(np.array(ids, np.int32), 0))
    guest = bundle.engine("int8")
    bundle.engine("target").forward(np.array(ids[:-1], np.int32), 0)
    assert np.array_equal(drafting[-1], guest.forward(np.array(ids[-1:], np.int32), len(ids) - 1)[0])
    assert not np.array_equal(alone[-1], drafting[-1])
    choices = drafting.argmax(-1)[-4:].tolist()
    assert measure_agreement(bundle, [ids[:-3]], [choices[:1]])["int8"] == 1.0


def test_where_caches_differ_each_has_its_own(bundle_folder):
    assert not isinstance(load(bundle_folder, device="portable").engine("int8"), GuestEngine)
    both = load(bundle_folder, device={"target": "portable", "int8": "cpu"})
    assert not isinstance(both.engine("int8"), GuestEngine)
    plain = both.generate("abc", 20, speculate="none", ignore_eos=True)
    assert both.generate("abc", 20, speculate=["int8"], ignore_eos=True).token_ids == plain.token_ids


def test_a_joint_law_has_two_caches(bundle_folder):
    bundle = load(bundle_folder, threads=2)
    out = generate_jointly(bundle, "int8", Ensemble(0.5), "abc abd", 20, ignore_eos=True)
    assert len(out.token_ids) == 20


def recipe(**drafter) -> Recipe:
    return Recipe.model_validate({"version": 1, "model": {"source": "x"}, "drafters": {"copy": drafter}})


@pytest.mark.parametrize(
    ("settings", "shares"), [({}, True), ({"cache": "target"}, True), ({"cache": "own"}, False)]
)
def test_a_recipe_says_who_shares(tmp_path, settings, shares):
    plan = plan_tasks(recipe(quantize={"scheme": "W8A8"}, **settings), tmp_path, {})
    for measured in (plan.tune, plan.bench):
        assert measured.params["sharing"] == (["copy"] if shares else [])
    assert "sharing" not in plan.exports["copy"].params, "the graph is the same"
    with pytest.raises(ValueError, match="skip_layers drafts in the target's cache"):
        recipe(skip_layers=[1], cache="own")

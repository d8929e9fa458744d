"""Layers to skip that are searched while decoding (SWIFT): a set scores what a model without it matches, what
can be missed is found, and output is the target's own all the while."""

import json
from dataclasses import astuple

import numpy as np
import pytest
import torch
from decoding import decode
from draftsmith.export.portable import export_onnx
from draftsmith.model.layout import layer_part
from draftsmith.model.store import Checkpoint, read_part, write_part
from draftsmith.pipeline.errors import RecipeError
from draftsmith.pipeline.pack import try_bundle
from draftsmith.pipeline.preflight import check_model
from draftsmith.pipeline.recipe import Recipe, Speculate
from draftsmith.pipeline.recipe_file import load_recipe
from draftsmith.pipeline.skips import choose_skips
from draftsmith.pipeline.stages import plan_tasks
from draftsmith.pipeline.traces import measure_agreement
from draftsmith.pipeline.tune import tune_bundle
from draftsmith.speculate.binding import check, ffi, lib
from draftsmith.speculate.bundle import load
from draftsmith.speculate.errors import BundleError
from draftsmith.speculate.ladder import Rung, build_ladder
from draftsmith.speculate.manifest import Skips
from draftsmith.speculate.onnx_engine import OnnxEngine, OnnxRuntime, SkippingEngine, SwiftEngine, SwiftState
from draftsmith.speculate.plan import Plan
from draftsmith.speculate.settings import Sampling
from fake_engine import FakeEngine, FakeLearner
from graph_session import entry_of
from quantized import export_kind
from safetensors.numpy import save_file
from test_layers_to_skip_are_found import export
from test_skipping_layers_changes_no_token import load_reference, remove_sublayers
from tiny_bundle import CONFIG, write_tiny_checkpoint

SHARE = 0.45
LEAST, MOST = 32, 50  # rows of a pass
OUTPUTS = "self_attn.o_proj.weight", "mlp.down_proj.weight"
PLANTED = [
    (1, 0),
    (2, 1),
    (3, 0),
    (5, 0),
    (6, 1),
]  # layer, sublayer: as many as 0.45 of the 12 between the ends
DEEP = CONFIG.model_copy(update={"num_layers": 8, "eos_token_ids": ()})


def open_engines(folder, num_layers, share=SHARE) -> dict[str, OnnxEngine]:
    config = Checkpoint(folder / "checkpoint").config
    assert config.num_layers == num_layers
    target = OnnxEngine("target", folder / "cpu.onnx", entry_of(config), OnnxRuntime(2))
    return {"target": target, "swift": SwiftEngine("swift", target, num_layers, share)}


def export_deep(folder, planted=()):
    """A model of eight layers. Those `planted` add nothing to the residual stream; where there are any, the
    other attentions add enough to be missed, which of random ones is little."""
    checkpoint = folder / "checkpoint"
    write_tiny_checkpoint(checkpoint, quantized=False, config=DEEP)
    for layer in range(DEEP.num_layers if planted else 0):
        tensors = read_part(checkpoint, layer_part(layer))
        tensors[OUTPUTS[0]] *= 4
        for part in range(2):
            if (layer, part) in planted:
                tensors[OUTPUTS[part]].zero_()
        write_part(checkpoint, layer_part(layer), tensors)
    export_onnx(checkpoint, folder)
    return folder


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    return export_deep(tmp_path_factory.mktemp("deep"))


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    return export_deep(tmp_path_factory.mktemp("planted"), PLANTED)


def table_of(sublayers, num_layers=8) -> np.ndarray:
    table = np.zeros((num_layers, 2), bool)
    for layer, part in sublayers:
        table[layer, part] = True
    return table


def read_text(engines, text) -> None:
    """As the loop would have: the target holds all but the last token."""
    engines["target"].reserve(len(text) + MOST)
    engines["target"].forward(np.array(text[:-1], np.int32), 0)


def tell(swift, text, num_decoded) -> int:
    """Rows that were read."""
    tokens = ffi.new("int32_t[]", [int(token) for token in text])
    return check(swift.handle.adapt(swift.handle, tokens, len(text), num_decoded))


def try_sets(engines, text, count) -> list:
    """The state after each of `count` sets, scored on the same text."""
    read_text(engines, text)
    states = []
    for _ in range(count):
        assert tell(engines["swift"], text, 1) == 0, "a generation that has just begun"
        assert tell(engines["swift"], text, MOST) == MOST
        states.append(engines["swift"].state)
    return states


def write_text(engines, length=80, seed=0) -> list[int]:
    """A prompt and what the target says."""
    prompt = np.random.default_rng(seed).integers(0, engines["target"].vocab_size - 2, 20).tolist()
    return prompt + decode(engines, [], prompt, length).tokens


# ---- Scores ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["gemma3-pattern", "qwen3"])
def exported(request, tiny_folder, tiny_checkpoint, tmp_path_factory):
    """(transformers' model, the folder of its graph): seven layers with sliding windows, or three"""
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "checkpoint").symlink_to(tiny_checkpoint(request.param))
    export_onnx(folder / "checkpoint", folder)
    return tiny_folder(request.param), folder


def match_by_reference(source, table, text, count) -> float:
    """Of the last `count` tokens, the share that a model chooses that sees the keys of the whole one before
    the token that it reads itself."""
    full, reduced = load_reference(source), remove_sublayers(load_reference(source), table)
    ids, matches = torch.as_tensor([text]), []
    with torch.no_grad():
        for place in range(len(text) - count, len(text)):
            cache = full(ids[:, : place - 1], use_cache=True).past_key_values
            logits = reduced(ids[:, place - 1 : place], past_key_values=cache).logits
            matches.append(int(logits[0, -1].argmax()) == text[place])
    return float(np.mean(matches))


def test_a_set_scores_what_the_model_without_it_matches_while_decoding(exported):
    source, folder = exported
    engines = open_engines(folder, Checkpoint(folder / "checkpoint").config.num_layers)
    prompt = list(range(5, 30))
    decoder = build_ladder([Rung("swift", 3)], engines.__getitem__)
    decoder.begin(prompt, 120, Sampling(0.0, seed=1))
    text, scores = prompt + decoder.step(), []
    read = decoder.counters(0).adapt_rows
    while block := decoder.step():
        if rows := decoder.counters(0).adapt_rows - read:
            state = engines["swift"].state
            assert LEAST <= rows <= MOST and state.num_tried == decoder.counters(0).adapt_calls
            assert state.tried_match == match_by_reference(source, state.tried, text, rows)
            scores.append(state.tried_match)
        read, text = decoder.counters(0).adapt_rows, text + block
    assert len(scores) >= 2 and 0 < scores[0] < 1
    assert engines["swift"].state.match == max(scores)


def test_rows_are_read_once_each_and_only_as_far_as_the_cache_goes(deep):
    engines = open_engines(deep, 8)
    text = write_text(engines, 150)
    read_text(engines, text)
    rows = [tell(engines["swift"], text[: 20 + count], count) for count in range(1, 151)]
    assert [count for count, read in enumerate(rows, 1) if read] == [32, 64, 96, 128]
    assert set(rows) == {0, LEAST}
    whole = decode(engines, [], range(9), DEEP.max_position_embeddings - 9).tokens
    engines["swift"].forget()
    assert decode(engines, [Rung("swift", 4)], range(9), len(whole)).tokens == whole, "no room behind"
    assert engines["swift"].state.num_tried == (len(whole) - 1) // LEAST - 1, "there was none for the last"


def test_a_pass_leaves_what_the_target_reads_alone(deep):
    engines, others = open_engines(deep, 8), open_engines(deep, 8)
    text = write_text(engines, 60)
    after = np.random.default_rng(3).integers(0, DEEP.vocab_size, 12).astype(np.int32)
    logits = []
    for these in (engines, others):
        read_text(these, text)
        if these is engines:
            assert tell(these["swift"], text, MOST) == MOST
        last = np.array([*text[-1:], *after], np.int32)
        logits.append(these["target"].forward(last, len(text) - 1).copy())
    assert np.array_equal(*logits)


# ---- The search --------------------------------------------------------------------------------------------


def test_sets_are_random_but_the_first_and_every_fifth_which_is_the_models(deep):
    engines = open_engines(deep, 8)
    states = try_sets(engines, write_text(engines), 100)
    assert not states[-1].is_over
    tables = np.array([state.tried.ravel()[2:-2] for state in states], float)
    scores = np.array([state.tried_match for state in states])
    assert not any(state.tried[[0, -1]].any() for state in states), "the first and the last layer are kept"
    assert set(tables.sum(axis=1)) == {5}
    assert np.flatnonzero(tables[0]).tolist() == [1, 3, 6, 8, 10]
    for step in range(5, 101, 5):  # weighted ridge regression on all before, solved at once
        x, weights = tables[: step - 1], scores[: step - 1] + 0.02
        covariance = np.linalg.inv((x.T * weights) @ x + 0.2 * np.eye(12))
        effects = covariance @ (x.T * weights) @ np.log(weights)
        uniforms = ffi.new("double[]", 12)
        lib.ds_uniforms(0, 1 << 32, 12 * (step - 1), 12, uniforms)
        evenly = np.sqrt(12) * (np.array(ffi.unpack(uniforms, 12)) - 0.5)  # of mean 0 and variance 1
        effects += 0.14 * np.sqrt(np.diag(covariance)) * evenly
        order = np.argsort(-effects, kind="stable")
        assert effects[order[4]] - effects[order[5]] > 1e-9
        assert sorted(order[:5]) == np.flatnonzero(tables[step - 1]).tolist()
    drawn = tables[[step % 5 != 4 for step in range(100)]][1:]
    assert len(np.unique(drawn, axis=0)) > 60
    expected = len(drawn) * 5 / 12
    assert np.all(np.abs(drawn.sum(axis=0) - expected) < 4 * np.sqrt(expected * 7 / 12))
    for state, tried in zip(states, np.maximum.accumulate(scores), strict=True):
        assert state.match == tried
    best = states[int(scores.argmax())]
    assert np.array_equal(states[-1].skips, best.tried)


def test_it_ends_where_nothing_better_is_found(deep):
    engines = open_engines(deep, 8)
    text = write_text(engines)
    states = try_sets(engines, text, 1)
    while not states[-1].is_over:
        states += try_sets(engines, text, 1)
        assert len(states) <= 1000
    scores = [state.tried_match for state in states]
    idle = len(scores) - 1 - scores.index(max(scores))
    assert max(scores) < 0.93 and idle == 300
    assert tell(engines["swift"], text, 1) == tell(engines["swift"], text, MOST) == 0, "it is over"


def test_what_adds_nothing_is_found_and_skipped(planted):
    engines = open_engines(planted, 8)
    generations = 0
    while not engines["swift"].state.is_over:
        prompt = np.random.default_rng(generations).integers(0, 250, 20).tolist()
        out = decode(engines, [Rung("swift", 3)], prompt, 200)
        assert out.tokens == decode(engines, [], prompt, 200).tokens
        generations += 1
    state = engines["swift"].state
    assert state.num_tried <= 100 < 792, "of so many sets a random one is rarely it"
    assert np.array_equal(state.skips, table_of(PLANTED)) and state.match == 1.0
    out = decode(engines, [Rung("swift", 3)], range(20), 41)
    assert out.drafter.accepted == out.drafter.drafted == 30
    assert out.drafter.adapt_rows == 0, "it costs nothing any more"


# ---- Decoding with it --------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 8.0])
@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_tokens_are_those_of_the_target_alone(kind, temperature, tiny_checkpoint, tmp_path):
    export_kind(tiny_checkpoint("gemma3-pattern"), kind, tmp_path)
    engines = open_engines(tmp_path, 7)
    engines["less"] = SkippingEngine("less", engines["target"], table_of([(1, 0), (2, 1), (4, 1)], 7))
    prompt, sampling = list(range(3, 30)), Sampling(temperature, seed=3, rule="exact")
    plain = decode(engines, [], prompt, 120, sampling).tokens
    after = np.arange(5, 9, dtype=np.int32)
    wanted = engines["target"].forward(after, len(prompt) + 110).copy()
    drafted = accepted = 0
    for ladder in (
        ["swift"],
        ["suffix", "swift"],
        ["less", "swift"],
        ["swift", "less"],
        ["suffix-tree", "swift"],
    ):
        tried = engines["swift"].state.num_tried
        out = decode(engines, [Rung(name, 3) for name in ladder], prompt, 120, sampling)
        assert out.tokens == plain, ladder
        assert np.array_equal(engines["target"].forward(after, len(prompt) + 110), wanted), ladder
        assert engines["swift"].state.num_tried > tried or engines["swift"].state.is_over
        drafted, accepted = drafted + out.drafter.drafted, accepted + out.drafter.accepted
    assert 0 < accepted < drafted


def test_equal_seeds_give_equal_tokens_and_what_was_found_lasts_until_it_is_forgotten(deep):
    def generate(engines) -> list:
        runs = []
        for seed in range(3):
            sampling = Sampling(6.0, seed=seed, rule="block")
            out = decode(engines, [Rung("swift", 4)], range(20), 120, sampling)
            runs.append((out.blocks, out.drafter.drafted, engines["swift"].state))
        return runs

    def same(one: SwiftState, other: SwiftState) -> bool:
        return all(map(np.array_equal, astuple(one), astuple(other)))

    engines = open_engines(deep, 8)
    first, again = generate(engines), generate(open_engines(deep, 8))
    later = generate(engines)
    engines["swift"].forget()
    assert engines["swift"].state.num_tried == 0 and not engines["swift"].state.match
    anew = generate(engines)
    for others in (again, anew):
        for (blocks, drafted, state), (blocks_too, drafted_too, state_too) in zip(first, others, strict=True):
            assert (blocks, drafted) == (blocks_too, drafted_too) and same(state, state_too)
    assert [state.num_tried for _, _, state in first] == [3, 6, 9]
    assert [state.num_tried for _, _, state in later] == [12, 15, 18]
    assert [run[0] for run in later] != [run[0] for run in first], "drafts depend on what was asked before"


def test_an_error_while_it_learns_is_the_generations():
    class Failing(FakeLearner):
        def adapt(self, token_ids, num_decoded) -> int:
            raise RuntimeError("too much to learn")

    target = FakeEngine(5)
    with pytest.raises(RuntimeError, match="too much to learn"):
        decode({"target": target, "swift": Failing(target)}, [Rung("swift", 2)], [1, 2], 9)


def test_what_cannot_be_searched_is_refused_in_words(deep):
    target = open_engines(deep, 8)["target"]
    for count, share, words in (
        (2, 0.45, "at least 3 layers are wanted"),
        (8, 0.0, "a share of 0 of the sublayers"),
        (8, 1.0, "a share of 1 of the sublayers"),
        (9, 0.45, "16 sublayers, not 18"),
    ):
        with pytest.raises(Exception, match=words):
            SwiftEngine("swift", target, count, share)
    stock = OnnxEngine("target", deep / "model.onnx", entry_of(DEEP), OnnxRuntime(1))
    with pytest.raises(Exception, match=r"not of operators of ours .* run its graph for the CPU"):
        SwiftEngine("swift", stock, 8, SHARE)


# ---- From a recipe to a bundle -----------------------------------------------------------------------------


def make_recipe(skip_layers, **more) -> Recipe:
    drafter = {"skip_layers": skip_layers, **more}
    return Recipe.model_validate(
        {"version": 1, "model": {"source": "x"}, "drafters": {"swift": drafter}}, strict=False
    )


def test_a_recipe_says_it_in_two_ways(tmp_path):
    plain = make_recipe("swift")
    assert plain == make_recipe({"swift": SHARE}) != make_recipe({"swift": 0.2})
    assert Recipe.model_validate(plain.model_dump()) == plain
    file = tmp_path / "recipe.yaml"
    file.write_text("version: 1\nmodel: {source: x}\ndrafters: {swift: {skip_layers: {swift: 0.2}}}\n")
    assert load_recipe(str(file)).recipe == make_recipe({"swift": 0.2})
    plan = plan_tasks(plain, tmp_path, {})
    assert plan.exports["swift"].params == {
        "skip_layers": {"attention": [], "mlp": [], "swift": SHARE},
        "weights": "of the target, without some layers, searched while decoding",
    }
    for bad in ({"swift": 0}, {"swift": 1.0}, {"swift": 0.4, "mlp": [1]}, "Swift"):
        with pytest.raises(Exception, match="skip_layers"):
            make_recipe(bad)
    with pytest.raises(Exception, match="shares the target's weights"):
        make_recipe("swift", quantize={"scheme": "W8A8"})
    with pytest.raises(
        RecipeError, match=r"drafters\.swift\.skip_layers: swift keeps the first and the last layer"
    ):
        check_model(plain, CONFIG, tmp_path, tmp_path)


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """(inputs of the stages after the skip stage, what that reported)"""
    folder = tmp_path_factory.mktemp("stages")
    inputs = export(folder, DEEP.model_copy(update={"max_position_embeddings": 512}))
    for name in ("tokens", "work", "swift"):
        (folder / name).mkdir()
    windows = np.random.default_rng(0).integers(0, 256, (5, 80))
    save_file({"tokens": windows}, folder / "tokens" / "tokens.safetensors")
    bundle = try_bundle(folder / "work", inputs)
    report = choose_skips(bundle, folder / "tokens", {"swift": SHARE}, "fewer", folder / "swift")
    return inputs | {"engine swift": folder / "swift"}, report


def test_a_bundle_searches_while_it_decodes_and_forgets_when_told(stages, tmp_path):
    inputs, report = stages
    bundle = load(try_bundle(tmp_path, inputs), threads=1)
    assert report["skip_layers"] == {"swift": SHARE} and report["tried"] == 1
    assert bundle.manifest.engines["swift"].skips == Skips(share=SHARE, bytes_read=report["bytes_read"])
    assert 0.45 < report["bytes_read"] < 0.8
    prompt, settings = list(range(60)), {"max_new_tokens": 120, "ignore_eos": True}
    plain = bundle.generate(prompt, speculate="none", **settings)
    runs = [bundle.generate(prompt, speculate=["swift"], **settings) for _ in range(2)]
    assert [run.token_ids for run in runs] == [plain.token_ids] * 2
    engine = bundle.engine("swift")
    assert isinstance(engine, SwiftEngine) and engine.state.num_tried == 6
    assert "adapt" not in plain.stats.to_dict()["ms"]
    parts = runs[0].stats.to_dict()["ms"]
    assert 0 < parts["adapt"] < runs[0].stats.total_ms and parts["bookkeeping"] >= 0
    bundle.forget()
    again = bundle.generate(prompt, speculate=["swift"], **settings)
    assert again.stats.drafts == runs[0].stats.drafts and engine.state.num_tried == 3
    logits = bundle.logits(prompt, engine="swift")
    assert logits.shape == (60, DEEP.vocab_size) and not np.array_equal(logits, bundle.logits(prompt))
    found = measure_agreement(bundle, [prompt], [plain.token_ids])
    assert engine.state.num_tried == 0 and 0 <= found["swift"] <= 1, "as the bundle was packed"


def test_auto_does_not_weigh_it_but_a_ladder_may_name_it(stages, tmp_path):
    inputs, _ = stages
    prompts = np.random.default_rng(2).integers(0, 256, (2, 40)).tolist()
    plan = tune_bundle(load(try_bundle(tmp_path, inputs), threads=1), prompts, Speculate())
    assert plan["candidates"] and not any("swift" in row["ladder"] for row in plan["candidates"])
    named = Speculate(ladder=["suffix", "swift"], num_speculative_tokens=4)
    plan = tune_bundle(load(try_bundle(tmp_path, inputs), threads=1), prompts, named)
    assert (
        plan["ladder"] == ["suffix", "swift"] and plan["choices"][0]["work"]["swift"]["reads_prompt"] is False
    )


def test_where_layers_cannot_be_skipped_it_is_refused_by_name(stages, tmp_path):
    inputs, _ = stages
    portable = load(try_bundle(tmp_path, inputs), device="portable")
    with pytest.raises(BundleError, match=r"swift: .* not of operators of ours .* run its graph for the CPU"):
        portable.generate([1, 2], 4, speculate=["swift"])
    portable.plan = Plan(ladder=("suffix", "swift"))
    assert portable.plan_for("auto")["ladder"] == ["suffix"], "a plan made on the CPU goes without it"
    elsewhere = load(try_bundle(tmp_path, inputs))
    elsewhere._engines.opened["target"] = FakeEngine(DEEP.vocab_size)
    with pytest.raises(BundleError, match="swift leaves out layers of the target's engine for the CPU"):
        elsewhere.generate([1, 2], 4, speculate=["swift"])


@pytest.mark.parametrize("share", [0.0, 1.0, "much"])
def test_a_manifest_with_a_share_that_is_none_is_refused(stages, tmp_path, share):
    folder = try_bundle(tmp_path, stages[0])
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["engines"]["swift"]["skips"]["share"] = share
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=r"skips\.share"):
        load(folder)

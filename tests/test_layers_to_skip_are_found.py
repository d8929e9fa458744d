"""Which layers a drafter skips: searched as a search without shortcuts would, by an agreement that is the one
of decoding; and from a recipe's words to a bundle that decodes as the target alone."""

import json

import numpy as np
import pytest
from draftsmith.pipeline.pack import ENGINE_FILE, try_bundle
from draftsmith.pipeline.preflight import LEAST_CONTEXT, check_model
from draftsmith.pipeline.progress import no_progress
from draftsmith.pipeline.recipe import Recipe
from draftsmith.pipeline.skips import (
    NEW_TOKENS,
    PATIENCE,
    Choice,
    Rehearsal,
    choose_skips,
    measure_sublayers,
    predict_speedup,
    search,
    weigh,
)
from draftsmith.pipeline.stage import Call
from draftsmith.pipeline.stages import EXPORT, plan_tasks
from draftsmith.pipeline.traces import record
from draftsmith.speculate.bundle import load
from draftsmith.speculate.errors import BundleError
from draftsmith.speculate.joint import Ensemble, generate_jointly
from draftsmith.speculate.plan import Plan
from fake_engine import byte_tokenizer
from safetensors.numpy import save_file
from tiny_bundle import CONFIG, write_tiny_checkpoint

SKIPPED = {"attention": [1], "mlp": [0]}
LONG = CONFIG.model_copy(update={"max_position_embeddings": 1024})  # room for several texts


def search_plainly(sizes, rest, agreement) -> Choice:
    """Every sublayer tried at every step."""
    path, idle, best = frozenset(), 0, None
    while idle < PATIENCE and len(path) < len(sizes) - 1:
        tried = [weigh(path | {i}, sizes, rest, agreement) for i in range(len(sizes)) if i not in path]
        chosen = max(tried, key=lambda choice: choice.speedup)
        idle = 0 if best is None or chosen.speedup > best.speedup else idle + 1
        path, best = chosen.skipped, chosen if idle == 0 else best
    return best


@pytest.mark.parametrize("seed", range(30))
def test_the_search_finds_what_trying_everything_at_each_step_finds(seed):
    rng = np.random.default_rng(seed)
    sizes, left = rng.integers(1, 9, 12).tolist(), rng.uniform(0.8, 1.0, 12)
    calls = 0

    def agreement(skipped):
        nonlocal calls
        calls += 1
        neighbours = sum(i + 1 in skipped for i in skipped)  # two in a row are harder to miss
        return float(np.prod(left[list(skipped)]) * 0.97**neighbours)

    wanted = search_plainly(sizes, 5, agreement)
    plain, calls = calls, 0
    assert search(sizes, 5, agreement) == wanted
    assert calls < 0.7 * plain
    assert wanted.speedup >= max(weigh(frozenset([i]), sizes, 5, agreement).speedup for i in range(12))


def test_the_speed_is_that_of_the_theorem():
    for agreement, cost in ((0.9, 0.5), (0.3, 0.9), (0.0, 0.4), (1.0, 0.25)):
        speeds = []
        for length in range(1, 17):
            tokens = sum(agreement**i for i in range(length + 1))
            speeds.append(tokens / (1 + length * cost))
        assert predict_speedup(agreement, cost) == pytest.approx(max(speeds), rel=1e-12)


def export(folder, config) -> dict:
    """The inputs of the stages after the export."""
    write_tiny_checkpoint(folder / "model", quantized=False, config=config)
    byte_tokenizer().save(str(folder / "model" / "tokenizer.json"))
    (folder / "target").mkdir()
    params = {"max_seq_len": None, "kv_cache_dtype": "auto", "weights": ""}
    EXPORT.run(Call({"model": folder / "model"}, {}, params, folder / "target", folder, no_progress))
    return {"model": folder / "model", "engine target": folder / "target"}


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """(inputs of the stages after the export, a folder with tokens and for more)"""
    folder = tmp_path_factory.mktemp("stages")
    inputs = export(folder, LONG)
    (folder / "tokens").mkdir()
    windows = np.random.default_rng(0).integers(0, 256, (5, 80))
    save_file({"tokens": windows}, folder / "tokens" / "tokens.safetensors")
    (folder / "work").mkdir()
    return inputs, folder


def test_the_agreement_is_that_of_single_texts(stages):
    inputs, folder = stages
    bundle = load(try_bundle(folder / "work", inputs), threads=1)
    prompts = np.random.default_rng(1).integers(0, 256, (3, 64)).tolist()
    rehearsal = Rehearsal(bundle, prompts)
    sizes, rest = measure_sublayers(bundle)
    *layers, (n, k) = packed_shapes()
    screen = n * -(-k // 4) * 4 + 2 * 4 * n  # of the head: int8, with a scale and an error for each output
    assert sum(sizes) + rest == 4 * sum(np.prod(shape) for shape in layers) + screen
    shares = []
    for skipped in ({1, 2}, {0}, {3}):
        out = folder / f"skip-{len(skipped)}-{sum(skipped)}"
        out.mkdir()
        layers = {key: [i // 2 for i in skipped if i % 2 == part] for part, key in enumerate(SKIPPED)}
        write_skips(out, layers)
        guest = load(try_bundle(folder / "work", inputs | {"engine skip": out}), threads=1)
        alone = [record(guest, prompt, ["skip"], NEW_TOKENS).agreement("skip") for prompt in prompts]
        assert rehearsal.agreement(frozenset(skipped)) == pytest.approx(np.mean(alone), rel=1e-12)
        shares.append(np.mean(alone))
    assert any(0 < share < 1 for share in shares)
    assert rehearsal.agreement(frozenset()) == 1.0


def test_a_short_context_is_enough(tmp_path):
    short = CONFIG.model_copy(update={"max_position_embeddings": LEAST_CONTEXT})
    bundle = load(try_bundle(tmp_path, export(tmp_path, short)), threads=1)
    rehearsal = Rehearsal(bundle, np.random.default_rng(1).integers(0, 256, (3, 64)).tolist())
    assert rehearsal.positions == NEW_TOKENS and rehearsal.agreement(frozenset()) == 1.0


def packed_shapes():
    """[N, K] as packed: N in whole blocks of 16."""
    c = CONFIG
    heads = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
    layer = [(heads, c.hidden_size), (c.hidden_size, c.num_heads * c.head_dim),
             (2 * c.intermediate_size, c.hidden_size), (c.hidden_size, c.intermediate_size)]  # fmt: skip
    head = [(c.vocab_size, c.hidden_size)]
    return [(-(-n // 16) * 16, k) for n, k in [*c.num_layers * layer, *head]]


def write_skips(out, layers) -> None:
    entry = {"skips": layers | {"bytes_read": 0.7}, "weights": "of the target, without some layers"}
    (out / ENGINE_FILE).write_text(json.dumps(entry))


@pytest.mark.parametrize("wanted", ["auto", SKIPPED], ids=str)
def test_a_bundle_decodes_with_it_as_the_target_alone(stages, wanted, tmp_path):
    inputs, folder = stages
    reports = [
        choose_skips(try_bundle(tmp_path, inputs), folder / "tokens", wanted, "fewer", tmp_path)
        for _ in range(2)
    ]
    assert reports[0] == reports[1]
    report = reports[0]
    assert wanted == "auto" or (report["skip_layers"], report["tried"]) == (SKIPPED, 1)
    assert 1 <= sum(map(len, report["skip_layers"].values())) < 4
    bundle = load(try_bundle(tmp_path, inputs | {"engine skip": tmp_path}), threads=1)
    assert bundle.drafters == ["skip"] and bundle.manifest.engine_files("skip") == {}
    prompt, settings = list(range(60)), {"max_new_tokens": 50, "ignore_eos": True}
    plain = bundle.generate(prompt, speculate="none", **settings)
    for ladder in (["skip"], ["suffix", "skip"]):
        out = bundle.generate(prompt, speculate=ladder, **settings)
        assert out.token_ids == plain.token_ids
    logits = bundle.logits(prompt, engine="skip")
    assert logits.shape == (60, CONFIG.vocab_size) and not np.array_equal(logits, bundle.logits(prompt))
    with pytest.raises(BundleError, match="skip is the target without some layers"):
        generate_jointly(bundle, "skip", Ensemble(), prompt)


def test_without_the_operators_it_is_an_error_that_says_so(stages, tmp_path):
    inputs, _ = stages
    write_skips(tmp_path, SKIPPED)
    folder = try_bundle(tmp_path, inputs | {"engine skip": tmp_path})
    portable = load(folder, device="portable")
    assert len(portable.generate([1, 2], 4, ignore_eos=True).token_ids) == 4
    with pytest.raises(BundleError, match=r"skip: .* not of operators of ours .* run its graph for the CPU"):
        portable.generate([1, 2], 4, speculate=["skip"])
    portable.plan = Plan(ladder=("suffix", "skip"))
    assert portable.plan_for("auto")["ladder"] == ["suffix"], "a plan made on the CPU goes without it"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"graph": "target/model.onnx"}, "skip leaves out layers of a graph that is not the target's"),
        ({"skips": {"attention": [2], "mlp": [], "bytes_read": 1.0}}, "its 2 are not"),
        ({"skips": {"attention": [-1], "mlp": [], "bytes_read": 1.0}}, "skips.attention"),
    ],
)
def test_a_manifest_that_skips_what_is_not_there_is_refused(stages, tmp_path, changes, words):
    inputs, _ = stages
    write_skips(tmp_path, SKIPPED)
    folder = try_bundle(tmp_path, inputs | {"engine skip": tmp_path})
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["engines"]["skip"] |= changes
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=words):
        load(folder)


def make_recipe(skip_layers, **more) -> Recipe:
    drafter = {"skip_layers": skip_layers, **more}
    return Recipe.model_validate(
        {"version": 1, "model": {"source": "x"}, "drafters": {"skip": drafter}}, strict=False
    )


@pytest.mark.parametrize(
    ("skip_layers", "words"),
    [
        ([0, 2], r"drafters\.skip\.skip_layers\.attention: there is no layer 2; the model's are 0 to 1"),
        ({"mlp": [7]}, r"drafters\.skip\.skip_layers\.mlp: there is no layer 7"),
        ([0, 1], r"drafters\.skip\.skip_layers: all layers are skipped"),
    ],
)
def test_layers_that_the_model_lacks_are_refused_before_work(skip_layers, words, tmp_path):
    with pytest.raises(Exception, match=words):
        check_model(make_recipe(skip_layers), CONFIG, tmp_path, tmp_path)


def test_a_recipe_says_it_in_three_ways_and_plans_one_stage(tmp_path):
    auto, listed = make_recipe("auto"), make_recipe([3, 1, 3])
    assert listed == make_recipe({"attention": [1, 3], "mlp": [3, 1]})
    for recipe in (auto, listed):
        plan = plan_tasks(recipe, tmp_path, {})
        assert [task.stage.name for task in plan if task.label == "skip"] == ["skip"]
        assert "skip" not in plan.checkpoints and plan.tune.inputs["engine skip"] is plan.exports["skip"]
    for bad, more, words in (
        ([], {}, "no layer is named"),
        ({}, {}, "no layer is named"),
        ("some", {}, "skip_layers"),
        ([-1], {}, "skip_layers"),
        ("auto", {"quantize": {"scheme": "W8A8"}}, "shares the target's weights"),
    ):
        with pytest.raises(Exception, match=words):
            make_recipe(bad, **more)

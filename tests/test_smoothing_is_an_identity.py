"""Smoothing finds its folds by probing, uses the paper's factors, and leaves the function of the model
alone."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from draftsmith.model.decoder import Decoder
from draftsmith.model.errors import ModelError
from draftsmith.model.store import Checkpoint
from draftsmith.model.walk import Part
from draftsmith.quantize.pairs import Fold, find_folds
from draftsmith.quantize.smooth import find_factors, smooth_model
from safetensors.torch import load_file, save_file

QKV = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}
NORMS = {"input_layernorm": QKV, "post_attention_layernorm": {"mlp.gate_proj", "mlp.up_proj"}}
GATED = NORMS | {"mlp.up_proj": {"mlp.down_proj"}}
RELU = GATED | {"post_attention_layernorm": {"mlp.up_proj"}}
GELU = {producer: consumers for producer, consumers in RELU.items() if producer != "mlp.up_proj"}
FOLDS = {
    "llama": GATED,
    "llama-tied": GATED,
    "llama-bias": GATED,
    "mistral": GATED,
    "qwen2": GATED,
    "qwen3": GATED,
    "gemma3_text": GATED,  # its norms after the sublayers fold into nothing
    "phi3": GATED,
    "opt": RELU,
    "gpt2": GELU,
}


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokens") / "tokens.safetensors"
    windows = torch.randint(0, 300, (6, 32), generator=torch.Generator().manual_seed(5), dtype=torch.int32)
    save_file({"tokens": windows}, path)
    return path


def make_part(checkpoint: Checkpoint, layer: int) -> Part:
    hidden = torch.zeros(1, 1, checkpoint.config.hidden_size)
    return Part(checkpoint.config, f"layers/{layer:03d}", layer, checkpoint.load_layer(layer), hidden)


@pytest.mark.parametrize("variant", FOLDS)
def test_probing_finds_the_folds_of_every_family(tiny_checkpoint, variant):
    checkpoint = Checkpoint(tiny_checkpoint(variant))
    folds = {fold.producer: fold.consumers for fold in find_folds(make_part(checkpoint, 1))}
    assert {producer: set(consumers) for producer, consumers in folds.items()} == FOLDS[variant]
    for consumers in folds.values():
        for source in consumers.values():
            assert torch.equal(source, torch.arange(len(source)))


@pytest.mark.parametrize("variant", FOLDS)
def test_smoothing_leaves_keys_and_values(tiny_checkpoint, tokens, tmp_path, variant):
    """So a smoothed copy can draft in the cache of one that was not, or otherwise."""
    smooth_model(
        tiny_checkpoint(variant), tokens, tmp_path / "out", tmp_path / "work", smoothing_strength=1.0
    )
    before, after = (read_keys_and_values(folder) for folder in (tiny_checkpoint(variant), tmp_path / "out"))
    assert len(before) == len(after) == 2 * 3
    for one, other in zip(before, after, strict=True):
        assert (one - other).norm() <= 1e-5 * one.norm()


def read_keys_and_values(folder: Path) -> list[torch.Tensor]:
    """What the projections give for a text: of each layer, of its keys and then of its values."""
    decoder, seen = Decoder.from_checkpoint(Checkpoint(folder)), []
    for layer in decoder.layers:
        for linear in (layer.self_attn.k_proj, layer.self_attn.v_proj):
            linear.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    decoder(torch.arange(3, 40)[None])
    return seen


@pytest.mark.parametrize("smoothing_strength", [0.0, 0.5, 1.0, "auto"])
@pytest.mark.parametrize("variant", FOLDS)
def test_smoothing_leaves_the_logits(tiny_checkpoint, tokens, tmp_path, variant, smoothing_strength):
    src, out = tiny_checkpoint(variant), tmp_path / "out"
    report = smooth_model(src, tokens, out, tmp_path / "work", smoothing_strength=smoothing_strength)
    windows = load_file(tokens)["tokens"].long()
    before = Decoder.from_checkpoint(Checkpoint(src))(windows)
    after = Decoder.from_checkpoint(Checkpoint(out))(windows)
    # float32; measured up to 4e-6, and 3e-5 for α = 1 where factors differ most
    assert (after - before).abs().max() <= 1e-4 * before.abs().max()
    # relative squared error of the layers, KL of the head; measured 5e-13 and 1e-8
    assert all(part["change"] < 1e-11 for part in report["parts"][:-1])
    assert report["parts"][-1]["change"] < 1e-7
    if smoothing_strength == "auto":
        assert all(part["error"] <= part["error_unsmoothed"] for part in report["parts"])
    else:
        changed = Checkpoint(out).load_layer(0)["self_attn.q_proj.weight"]
        assert not torch.equal(changed, Checkpoint(src).load_layer(0)["self_attn.q_proj.weight"])


def test_a_tied_head_gets_weights_of_its_own(tiny_checkpoint, tokens, tmp_path):
    src, out = tiny_checkpoint("llama-tied"), tmp_path / "out"
    smooth_model(src, tokens, out, tmp_path / "work", smoothing_strength=0.5)
    before, after = Checkpoint(src), Checkpoint(out)
    assert before.config.tied_head and not after.config.tied_head
    embedding = before.load_embed()["model.embed_tokens.weight"]
    assert torch.equal(after.load_embed()["model.embed_tokens.weight"], embedding)
    head = after.load_head()
    assert head["lm_head.weight"].dtype == torch.float32
    factors = before.load_head()["model.norm.weight"] / head["model.norm.weight"]
    torch.testing.assert_close(head["lm_head.weight"], embedding * factors, rtol=1e-5, atol=0)


@pytest.mark.parametrize("strength", [0.0, 0.35, 0.5, 1.0])
def test_factors_are_the_papers(strength):
    """Channel by channel with plain loops; channels 0 and 1 of the producer feed two inputs each."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "norm.weight": torch.ones(3),
        "a.weight": torch.randn(4, 5, generator=generator),
        "b.weight": 3 * torch.randn(2, 5, generator=generator),
    }
    peaks = {"a": torch.tensor([1.0, 20.0, 0.0, 0.5, 3.0]), "b": torch.tensor([2.0, 0.1, 0.0, 0.5, 3.0])}
    source = [0, 1, 2, 0, 1]
    fold = Fold("norm", {"a": torch.tensor(source), "b": torch.tensor(source)})
    factors = find_factors(fold, tensors, peaks, strength)
    for channel in range(3):
        inputs = [j for j in range(5) if source[j] == channel]
        x = max(1e-5, *(float(peaks[name][j]) for name in "ab" for j in inputs))
        w = max(
            1e-5,
            *(
                float(tensors[f"{n}.weight"][r, j].abs())
                for n, rows in (("a", 4), ("b", 2))
                for r in range(rows)
                for j in inputs
            ),
        )
        assert float(factors[channel]) == pytest.approx(x**strength / w ** (1 - strength), rel=1e-5)


def test_factors_grow_with_strength_where_activations_are_large():
    tensors = {"norm.weight": torch.ones(8), "a.weight": torch.full((2, 8), 0.5)}
    peaks = {"a": torch.linspace(3, 50, 8)}
    fold = Fold("norm", {"a": torch.arange(8)})
    grid = [find_factors(fold, tensors, peaks, step / 10) for step in range(11)]
    assert all((later > earlier).all() for earlier, later in pairwise(grid))
    torch.testing.assert_close(grid[0], torch.full((8,), 2.0))
    torch.testing.assert_close(grid[10], peaks["a"])


def plant_outliers(src: Path, dst: Path) -> None:
    """The same function with activations that are hard to round: every fold of every layer used backwards."""
    from draftsmith.model.store import copy_tokenizer, link_part, write_config, write_part

    checkpoint = Checkpoint(src)
    generator = torch.Generator().manual_seed(11)
    for layer in range(checkpoint.config.num_layers):
        part = make_part(checkpoint, layer)
        tensors = part.tensors
        for fold in find_folds(part):
            factors = torch.ones(len(tensors[f"{fold.producer}.weight"]))
            factors[torch.randperm(len(factors), generator=generator)[:3]] = 1 / 60
            tensors = fold.apply(tensors, factors)
        write_part(dst, part.name, tensors)
    for name in ("embed", "head"):
        link_part(src, dst, name)
    copy_tokenizer(src, dst)
    write_config(dst, checkpoint.config)


@pytest.mark.parametrize("variant", ["llama", "qwen3", "opt"])
def test_auto_takes_planted_outliers_out_again(tiny_checkpoint, tokens, tmp_path, variant):
    plant_outliers(tiny_checkpoint(variant), tmp_path / "hard")
    report = smooth_model(tmp_path / "hard", tokens, tmp_path / "out", tmp_path / "work")
    clean = smooth_model(tiny_checkpoint(variant), tokens, tmp_path / "clean", tmp_path / "work2")
    for hard, easy in zip(report["parts"][:3], clean["parts"][:3], strict=True):
        assert hard["error"] < hard["error_unsmoothed"] / 5
        assert hard["error"] < 2 * easy["error"]


def test_ignored_linears_and_what_folds_with_them_stay_as_they_are(tiny_checkpoint, tokens, tmp_path):
    src, out = tiny_checkpoint("llama"), tmp_path / "out"
    report = smooth_model(
        src, tokens, out, tmp_path / "work", smoothing_strength=0.5, ignore=["*.gate_proj", "lm_head"]
    )
    before, after = Checkpoint(src).load_layer(2), Checkpoint(out).load_layer(2)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    attention = {"input_layernorm.weight", *(f"self_attn.{x}_proj.weight" for x in "qkv")}
    assert changed == attention | {"mlp.up_proj.weight", "mlp.down_proj.weight"}
    assert [part["part"] for part in report["parts"]] == ["layers/000", "layers/001", "layers/002"]
    linears = ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj")
    assert report["parts"][0]["unreached"] == [f"model.layers.0.{name}" for name in linears]
    assert (out / "head.safetensors").samefile(src / "head.safetensors")


def test_a_crash_changes_nothing(tiny_checkpoint, tokens, tmp_path):
    src = tiny_checkpoint("qwen2")
    whole = smooth_model(src, tokens, tmp_path / "whole", tmp_path / "work")

    def crash(done: int, total: int, label: str) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        smooth_model(src, tokens, tmp_path / "out", tmp_path / "work2", progress=crash)
    assert smooth_model(src, tokens, tmp_path / "out", tmp_path / "work2") == whole
    for part in Checkpoint(src).parts():
        ours, theirs = (load_file(tmp_path / x / f"{part}.safetensors") for x in ("out", "whole"))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("smoothing_strength", [-0.1, 1.5])
def test_impossible_strengths_are_errors(tiny_checkpoint, tokens, tmp_path, smoothing_strength):
    with pytest.raises(ModelError, match="smoothing_strength"):
        smooth_model(
            tiny_checkpoint("llama"),
            tokens,
            tmp_path / "out",
            tmp_path / "work",
            smoothing_strength=smoothing_strength,
        )

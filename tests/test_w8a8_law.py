"""The quantize stage rounds weights to the nearest of their row's grid, keeps grids that pruning chose, and
gives a static input scale only where that does no harm."""

import json
from pathlib import Path

import pytest
import torch
from draftsmith.model.decoder import Decoder
from draftsmith.model.store import Checkpoint, copy_tokenizer, link_part, write_config, write_part
from draftsmith.prune.stage import prune_model
from draftsmith.quantize.int8 import pack_int8, row_scale
from draftsmith.quantize.smooth import smooth_model
from draftsmith.quantize.w8a8 import quantize_model
from safetensors.torch import load_file, save_file


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokens") / "tokens.safetensors"
    windows = torch.randint(0, 300, (6, 32), generator=torch.Generator().manual_seed(7), dtype=torch.int32)
    save_file({"tokens": windows}, path)
    return path


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor under its full name."""
    checkpoint, tensors = Checkpoint(folder), {}
    for layer in range(checkpoint.config.num_layers):
        tensors |= {f"model.layers.{layer}.{name}": t for name, t in checkpoint.load_layer(layer).items()}
    return tensors | checkpoint.load_head()


def test_rounding_is_to_the_nearest_half_to_even():
    weight = torch.tensor([[127.0, 0.5, 1.5, -2.5, -127.0], [0, 0, 0, 0, 0], [1e-30, 0, -1e-30, 0, 0]])
    packed = pack_int8("a", weight, row_scale(weight))
    assert packed["a.weight"].tolist() == [[127, 0, 2, -2, -127], [0] * 5, [127, 0, -127, 0, 0]]
    assert packed["a.weight_scale"][:2].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("variant", ["llama-tied", "qwen2", "gemma3_text", "opt", "gpt2"])
def test_every_linear_is_the_nearest_int8_of_its_row(tiny_checkpoint, tokens, tmp_path, variant):
    src, out = tiny_checkpoint(variant), tmp_path / "out"
    report = quantize_model(src, tokens, out, tmp_path / "work")
    json.dumps(report)
    before, after = load_all(src), load_all(out)
    embedding = Checkpoint(src).load_embed()["model.embed_tokens.weight"]
    before.setdefault("lm_head.weight", embedding)
    linears = [n.removesuffix(".weight") for n in before if n.endswith(("_proj.weight", "lm_head.weight"))]
    assert sorted(row["linear"] for row in report["linears"]) == sorted(linears)
    for name in linears:
        dense, weight = before[f"{name}.weight"].double(), after[f"{name}.weight"]
        scale = after[f"{name}.weight_scale"].double()[:, None]
        assert weight.dtype == torch.int8 and int(weight.min()) >= -127
        assert (weight.abs().amax(1) == 127).all()  # the scale just fits the row
        assert ((dense - weight * scale).abs() <= scale / 2 * (1 + 1e-5)).all()
    for name in before.keys() - {f"{linear}.weight" for linear in linears}:
        assert torch.equal(before[name], after[name])
    assert not Checkpoint(out).config.tied_head
    assert torch.equal(Checkpoint(out).load_embed()["model.embed_tokens.weight"], embedding)


@pytest.mark.parametrize("variant", ["llama", "opt"])
def test_scales_of_inputs_are_those_of_the_quantized_model(tiny_checkpoint, tokens, tmp_path, variant):
    """max|x| / 127 of what enters each linear when all layers, this one included, follow the W8A8 law."""
    src, out = tiny_checkpoint(variant), tmp_path / "out"
    report = quantize_model(src, tokens, out, tmp_path / "work")
    decoder = Decoder.from_checkpoint(Checkpoint(out))
    peaks: dict[str, float] = {}
    modules = {
        f"layers.{i}.{name}": m
        for i, layer in enumerate(decoder.layers)
        for name, m in layer.linears().items()
    }
    modules["lm_head"] = decoder.head.lm_head
    for name, module in modules.items():
        module.register_forward_pre_hook(
            lambda _, x, name=name: peaks.update({name: float(x[0].abs().max())})
        )
    decoder(load_file(tokens)["tokens"].long())
    stored = load_all(out)
    for row in report["linears"]:
        assert row["input_scale"] == pytest.approx(
            peaks[row["linear"].removeprefix("model.")] / 127, rel=1e-5
        )
        name = f"{row['linear']}.input_scale"
        steps = [row["input_scale"], row["input_scale"] / 254][: row["input_parts"]]
        assert stored[name].tolist() == pytest.approx(steps)
        assert (row["input_parts"] == 2) == (row["linear"] in report["inputs_in_two_parts"])


def test_an_input_that_a_static_scale_would_ruin_has_two_parts(tiny_checkpoint, tokens, tmp_path):
    """One channel of one MLP answers to the first token alone, a hundred times louder than the rest: it takes
    the whole range of a static scale, while a scale of each row's own hardly notices."""
    src, hard, first = Checkpoint(tiny_checkpoint("llama")), tmp_path / "hard", []
    decoder = Decoder.from_checkpoint(src)
    decoder.layers[1].get_submodule("mlp.up_proj").register_forward_pre_hook(
        lambda _, x: first.append(x[0][0, 0])
    )
    decoder(load_file(tokens)["tokens"].long())
    layer = src.load_layer(1)
    for name in ("gate_proj", "up_proj"):
        layer[f"mlp.{name}.weight"][5] = 50 * first[0] / first[0].square().sum()
    for part in src.parts():
        link_part(src.path, hard, part)
    write_part(hard, "layers/001", layer)
    copy_tokenizer(src.path, hard)
    write_config(hard, src.config)
    easy_report = quantize_model(src.path, tokens, tmp_path / "easy-out", tmp_path / "a")
    hard_report = quantize_model(hard, tokens, tmp_path / "hard-out", tmp_path / "b")
    assert easy_report["inputs_in_two_parts"] == []
    assert hard_report["inputs_in_two_parts"] == ["model.layers.1.mlp.down_proj"]
    row = next(row for row in hard_report["linears"] if row["linear"] == "model.layers.1.mlp.down_proj")
    assert row["static_error"] > 100 * row["dynamic_error"]
    assert row["two_part_error"] < row["dynamic_error"]


def test_errors_in_the_report_follow_from_the_two_laws(tiny_checkpoint, tokens, tmp_path):
    """Recomputed in float64 from the definitions, on all tokens of a short calibration."""
    src, out = tiny_checkpoint("llama"), tmp_path / "out"
    report = quantize_model(src, tokens, out, tmp_path / "work")
    decoder, stored = Decoder.from_checkpoint(Checkpoint(out)), load_all(out)
    inputs: dict[str, torch.Tensor] = {}
    for name in ("self_attn.q_proj", "mlp.down_proj"):
        module = decoder.layers[0].get_submodule(name)
        module.register_forward_pre_hook(
            lambda _, x, name=name: inputs.update({name: x[0].flatten(0, 1).double()})
        )
    decoder(load_file(tokens)["tokens"].long())
    rows = {row["linear"]: row for row in report["linears"]}
    for name, x in inputs.items():
        row = rows[f"model.layers.0.{name}"]
        weight = (
            stored[f"{row['linear']}.weight"].double()
            * stored[f"{row['linear']}.weight_scale"].double()[:, None]
        )
        exact = x @ weight.T
        for law, step in (("dynamic", x.abs().amax(1, keepdim=True) / 127), ("static", row["input_scale"])):
            rounded = (x / step).round().clamp(-127, 127) * step
            assert row[f"{law}_error"] == pytest.approx(mean_error(rounded @ weight.T, exact), rel=1e-3)
        fine = step / 254
        rounded += ((x - rounded) / fine).round().clamp(-127, 127) * fine
        assert row["two_part_error"] == pytest.approx(mean_error(rounded @ weight.T, exact), rel=0.1)


def mean_error(output, exact):
    return float(((output - exact).square().sum(1) / exact.square().sum(1)).mean())


@pytest.mark.parametrize("mask_structure", ["2:4", "unstructured"])
def test_weights_that_pruning_rounded_are_kept(tiny_checkpoint, tokens, tmp_path, mask_structure):
    src, pruned, out = tiny_checkpoint("llama-tied"), tmp_path / "pruned", tmp_path / "out"
    prune_model(
        src,
        tokens,
        pruned,
        tmp_path / "a",
        mask_structure=mask_structure,
        joint_int8=True,
        ignore=["*.o_proj"],
    )
    report = quantize_model(pruned, tokens, out, tmp_path / "b")
    before, after = load_all(pruned), load_all(out)
    assert len(report["linears"]) == 3 * 7 + 1
    for name in before:
        if before[name].dtype == torch.int8:
            assert torch.equal(before[name], after[name])
            assert torch.equal(before[f"{name}_scale"], after[f"{name}_scale"])
    assert after["model.layers.2.self_attn.o_proj.weight"].dtype == torch.int8
    assert after["lm_head.weight"].dtype == torch.int8


def test_ignored_linears_stay_in_floating_point(tiny_checkpoint, tokens, tmp_path):
    src, out = tiny_checkpoint("llama-tied"), tmp_path / "out"
    report = quantize_model(src, tokens, out, tmp_path / "work", ignore=["lm_head", "*.down_proj"])
    after = load_all(out)
    assert Checkpoint(out).config.tied_head and "lm_head.weight" not in after
    assert after["model.layers.0.mlp.down_proj.weight"].dtype == torch.float32
    assert len(report["linears"]) == 3 * 6


def test_the_whole_model_is_near_the_dense_one(tiny_checkpoint, tokens, tmp_path):
    """int8 is a small perturbation; smoothing by search does not make it larger."""
    src, windows = tiny_checkpoint("llama"), load_file(tokens)["tokens"].long()
    smooth_model(src, tokens, tmp_path / "smooth", tmp_path / "a")
    dense = Decoder.from_checkpoint(Checkpoint(src))(windows)
    errors = {}
    for name, folder in (("plain", src), ("smoothed", tmp_path / "smooth")):
        quantize_model(folder, tokens, tmp_path / name, tmp_path / f"{name}-work")
        logits = Decoder.from_checkpoint(Checkpoint(tmp_path / name))(windows)
        errors[name] = float((logits - dense).norm() / dense.norm())
    print(errors)
    assert errors["plain"] < 0.1 and errors["smoothed"] < 1.1 * errors["plain"]


def test_a_crash_changes_nothing(tiny_checkpoint, tokens, tmp_path):
    src = tiny_checkpoint("llama-tied")
    whole = quantize_model(src, tokens, tmp_path / "whole", tmp_path / "work")

    def crash(done: int, total: int, label: str) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_model(src, tokens, tmp_path / "out", tmp_path / "work2", progress=crash)
    assert quantize_model(src, tokens, tmp_path / "out", tmp_path / "work2") == whole
    ours, theirs = load_all(tmp_path / "out"), load_all(tmp_path / "whole")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)

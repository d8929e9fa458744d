"""The W4A8 stage: grids of 32 inputs fitted to the weights, weights rounded onto them so that later columns
make up for earlier ones, and a linear that computes what they say."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from draftsmith.model.linear import Linear, expand_int4
from draftsmith.model.store import Checkpoint
from draftsmith.prune.sparsegpt import factor_hessian, factor_inputs
from draftsmith.quantize.int4 import fit_grids, pack_int4, to_int4
from draftsmith.quantize.int8 import row_scale, to_int8
from draftsmith.quantize.smooth import smooth_model
from draftsmith.quantize.w4a8 import quantize_model, round_linears
from safetensors.torch import save_file
from test_sparsegpt_matches_float64_obs import make_inputs, make_weight
from test_w8a8_law import load_all

WIDTHS = (32, 96, 1, 31, 33, 75)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokens") / "tokens.safetensors"
    windows = torch.randint(0, 300, (6, 32), generator=torch.Generator().manual_seed(7), dtype=torch.int32)
    save_file({"tokens": windows}, path)
    return path


def spread(grid: torch.Tensor, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Step and base of every weight, float64."""
    wide = np.repeat(grid.double().numpy(), 32, axis=1)[:, :width]
    return wide[..., 0], wide[..., 1]


# ---- Grids and levels --------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [32, 96, 31, 75])
def test_a_weight_on_a_grid_is_found_there(width):
    """Levels 0 and 15 in every group settle the grid; bfloat16 holds these steps and bases exactly."""
    generator = torch.Generator().manual_seed(width)
    groups = -(-width // 32)
    levels = torch.randint(0, 16, (7, groups, 32), generator=generator)
    levels[..., 0], levels[..., 1] = 0, 15
    levels = levels.view(7, -1)[:, :width]
    step = 2.0 ** torch.randint(-9, 0, (7, groups), generator=generator)
    grid = torch.stack((step, torch.full_like(step, -0.75)), -1)
    weight = expand_int4(levels.to(torch.uint8), grid.bfloat16())
    found = fit_grids(weight, torch.ones(width))
    assert torch.equal(expand_int4(to_int4(weight, found), found), weight)
    x = torch.randn(200, width, generator=generator)
    ((swept, grid),) = round_linears([weight], factor_inputs([x], 0.01, "linear"))
    assert torch.equal(expand_int4(to_int4(swept, grid), grid), weight)


@pytest.mark.parametrize("width", WIDTHS)
def test_the_nearest_level_is_taken_half_to_even(width):
    weight = make_weight(9, width).float()
    grid = fit_grids(weight, torch.ones(width))
    step, base = spread(grid, width)
    levels = np.clip(np.rint((weight.double().numpy() - base) / step), 0, 15)
    assert (to_int4(weight, grid).numpy() == levels).mean() > 0.999
    np.testing.assert_allclose(expand_int4(to_int4(weight, grid), grid), levels * step + base, atol=1e-2)


def test_groups_without_a_range_are_kept():
    weight = torch.tensor([0.0, 1.5, -2.0, 1e-30])[:, None].expand(4, 40).contiguous()
    grid = fit_grids(weight, torch.ones(40))
    assert grid.isfinite().all()
    torch.testing.assert_close(expand_int4(to_int4(weight, grid), grid), weight, rtol=2**-8, atol=0)


def test_the_search_finds_grids_near_the_best():
    """Every range of a fine mesh, in float64: the search may miss the best error by little, and beats the
    range from the least to the largest weight."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(40, 32, generator=generator)
    weight = weight * weight.abs()  # long tails, as weights have
    importance = torch.rand(32, generator=generator) + 0.1

    def errors(grid: torch.Tensor) -> np.ndarray:
        step, base = (part.double().numpy()[..., None] for part in grid[:, 0].unbind(-1))
        exact = weight.double().numpy()
        levels = np.clip(np.rint((exact - base) / step), 0, 15)
        return ((levels * step + base - exact) ** 2 * importance.numpy()).sum(1)

    low, high = weight.amin(1), weight.amax(1)
    plain = errors(torch.stack(((high - low) / 15, low), -1)[:, None])
    best = plain
    for left in np.linspace(0, 0.48, 25):
        for right in np.linspace(0, 0.48, 25):
            start, end = low + left * (high - low), high - right * (high - low)
            best = np.minimum(best, errors(torch.stack(((end - start) / 15, start), -1)[:, None]))
    found = errors(fit_grids(weight, importance))
    assert found.sum() < 0.9 * plain.sum()
    assert found.sum() < 1.15 * best.sum()


# ---- The sweep ---------------------------------------------------------------------------------------------


def gptq_by_inverses(weight: np.ndarray, hessian: np.ndarray, grid: torch.Tensor) -> np.ndarray:
    """Column by column in float64: round, and move the columns behind by the inverse of what is left of H."""
    weight = weight.copy()
    step, base = spread(grid, weight.shape[1])
    for i in range(weight.shape[1]):
        inverse = np.linalg.inv(hessian[i:, i:])
        kept = np.clip(np.rint((weight[:, i] - base[:, i]) / step[:, i]), 0, 15) * step[:, i] + base[:, i]
        weight[:, i:] -= np.outer((weight[:, i] - kept) / inverse[0, 0], inverse[0])
        weight[:, i] = kept
    return weight


@pytest.mark.parametrize("width", [33, 75, 160])
def test_the_sweep_is_gptq(width):
    x, weights = make_inputs(600, width), [make_weight(12, width), make_weight(5, width, seed=2)]
    factor = factor_inputs([x], 0.01, "linear")
    for weight, (swept, grid) in zip(weights, round_linears(weights, factor), strict=True):
        reference = gptq_by_inverses(weight.numpy(), factor.damped.numpy(), grid)
        np.testing.assert_allclose(swept.numpy(), reference, atol=1e-9)


@pytest.mark.parametrize("width", [64, 75, 160])
def test_the_sweep_beats_the_nearest_levels_of_searched_grids(width):
    """In squared error of the outputs, float64; the search in turn beats the plain range."""
    x, weight = make_inputs(900, width), make_weight(48, width)
    factor = factor_inputs([x], 0.01, "linear")

    def error(rounded: torch.Tensor) -> float:
        return float(((x @ (rounded.double() - weight).T) ** 2).sum())

    def nearest(grid: torch.Tensor) -> float:
        return error(expand_int4(to_int4(weight, grid), grid))

    plain = nearest(fit_grids(weight, torch.ones(width), [1.0]))
    searched = nearest(fit_grids(weight, factor.damped.diagonal()))
    ((swept, _),) = round_linears([weight], factor)
    assert error(swept) < 0.8 * searched
    assert searched < plain


def test_a_dead_input_moves_nothing():
    x, weight = make_inputs(400, 64), make_weight(6, 64)
    x[:, [3, 40]] = 0
    ((swept, grid),) = round_linears([weight], factor_hessian(2 * x.T @ x / len(x), 0.01, "linear"))
    assert swept.isfinite().all() and grid.isfinite().all()


# ---- The linear --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("bias", [False, True])
def test_law_of_a_row(width, bias):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 3, width, generator=generator)
    x[0, 0] = 0
    weight = make_weight(9, width).float()
    tensors = pack_int4("l", weight, fit_grids(weight, torch.ones(width)))
    if bias:
        tensors["l.bias"] = torch.randn(9, generator=generator)
    linear = Linear("l", tensors)
    assert linear.is_quantized
    step, base = spread(tensors["l.weight_grid"], width)
    values = tensors["l.weight"].double().numpy() * step + base
    for row, got in zip(x.reshape(-1, width).numpy(), linear(x).reshape(-1, 9).numpy(), strict=True):
        scale = np.abs(row).max() / np.float32(127) or np.float32(1)
        integers = np.clip(np.rint(row / scale), -127, 127).astype(np.float64)
        wanted = float(scale) * (values @ integers) + (tensors["l.bias"].double().numpy() if bias else 0)
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


# ---- The stages --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["llama-tied", "qwen2", "gemma3_text", "opt", "gpt2"])
def test_every_linear_comes_out_in_4_bits(tiny_checkpoint, tokens, tmp_path, variant):
    src, out = tiny_checkpoint(variant), tmp_path / "out"
    report = quantize_model(src, tokens, out, tmp_path / "work")
    json.dumps(report)
    before, after = load_all(src), load_all(out)
    before.setdefault("lm_head.weight", Checkpoint(src).load_embed()["model.embed_tokens.weight"])
    linears = [n.removesuffix(".weight") for n in before if n.endswith(("_proj.weight", "lm_head.weight"))]
    assert sorted(row["linear"] for row in report["linears"]) == sorted(linears)
    assert all(0 < row["dynamic_error"] < 0.05 for row in report["linears"])
    head = before["lm_head.weight"]
    assert torch.equal(after["lm_head.weight"], to_int8(head, row_scale(head)))  # not in 4 bits
    for name in set(linears) - {"lm_head"}:
        dense, weight, grid = before[f"{name}.weight"], after[f"{name}.weight"], after[f"{name}.weight_grid"]
        assert weight.dtype == torch.uint8 and weight.shape == dense.shape and int(weight.max()) <= 15
        assert grid.dtype == torch.bfloat16 and grid.shape == (len(dense), -(-dense.shape[1] // 32), 2)
        assert float((expand_int4(weight, grid) - dense).norm() / dense.norm()) < 0.2
    for name in before.keys() - {f"{linear}.weight" for linear in linears}:
        assert torch.equal(before[name], after[name])
    assert not Checkpoint(out).config.tied_head


def test_what_is_ignored_stays_as_it_is(tiny_checkpoint, tokens, tmp_path):
    src, out = tiny_checkpoint("llama"), tmp_path / "out"
    report = quantize_model(src, tokens, out, tmp_path / "work", ignore=["lm_head", "*.down_proj"])
    assert not any(row["linear"].endswith(("lm_head", "down_proj")) for row in report["linears"])
    before, after = load_all(src), load_all(out)
    for name in ("lm_head.weight", "model.layers.1.mlp.down_proj.weight"):
        assert torch.equal(before[name], after[name])
    assert after["model.layers.1.mlp.up_proj.weight"].dtype == torch.uint8


def test_smoothing_is_searched_under_the_law_of_the_scheme(tiny_checkpoint, tokens, tmp_path):
    """What counts is the error with 4 bits: larger than with 8, and never above that of no smoothing."""
    src, errors = tiny_checkpoint("llama"), {}
    for scheme in ("W8A8", "W4A8"):
        report = smooth_model(src, tokens, tmp_path / scheme, tmp_path / f"{scheme}-work", scheme=scheme)
        errors[scheme] = [row["error"] for row in report["parts"] if row["part"] != "head"]
        assert all(row["error"] <= row["error_unsmoothed"] for row in report["parts"])
    assert all(four > 10 * eight for four, eight in zip(errors["W4A8"], errors["W8A8"], strict=True))

"""What a mask has left is refit to the least-squares optimum: against a direct solution in float64, row by
row."""

import pytest
import torch
from draftsmith.prune.masks import MaskStructure
from draftsmith.prune.refit import refit_matrices
from draftsmith.prune.sparsegpt import Hessian, factor_hessian, prune_matrices
from draftsmith.quantize.int8 import row_scale

WIDTH = 24


def make_problem(mask_structure: str, dead: tuple[int, ...] = (), dtype=torch.float64):
    """Two matrices that share correlated inputs, as the sweep leaves them."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(200, WIDTH, generator=generator) @ torch.randn(WIDTH, WIDTH, generator=generator)
    x[:, list(dead)] = 0
    hessian = Hessian(WIDTH)
    hessian.add(x)
    factor = factor_hessian(hessian.mean(), 0.01, "test")
    dense = [torch.randn(rows, WIDTH, generator=generator).to(dtype) for rows in (7, 3)]
    structure = MaskStructure.parse(mask_structure, 0.5, 8)
    return dense, factor, structure, prune_matrices(dense, factor, structure)


def solve(dense, kept, damped):
    """The optimum of one row on its kept channels: damped[S, S] w[S] = damped[S] dense."""
    row = torch.zeros_like(dense)
    row[kept] = torch.linalg.solve(damped[kept][:, kept], damped[kept] @ dense)
    return row


@pytest.mark.parametrize("mask_structure", ["2:4", "unstructured"])
def test_each_row_is_the_optimum_of_its_mask(mask_structure):
    dense, factor, structure, swept = make_problem(mask_structure)
    for weight, before, after in zip(
        dense, swept, refit_matrices(dense, swept, factor, structure), strict=True
    ):
        assert torch.equal(after.weight == 0, before.weight == 0)
        wanted = torch.stack(
            [solve(w, b != 0, factor.damped) for w, b in zip(weight, before.weight, strict=True)]
        )
        torch.testing.assert_close(after.weight, wanted, rtol=1e-6, atol=1e-8)
        change = wanted - weight
        least = float((change @ factor.damped * change).sum()) / 2
        assert after.trace == pytest.approx(least) and after.loss == pytest.approx(least)
        assert after.sweep_loss == before.loss > 1.05 * least


def test_in_float32_no_row_gets_worse():
    dense, factor, structure, swept = make_problem("2:4", dtype=torch.float32)
    for weight, before, after in zip(
        dense, swept, refit_matrices(dense, swept, factor, structure), strict=True
    ):
        losses = [
            ((result.weight - weight).double() @ factor.damped * (result.weight - weight)).sum(1)
            for result in (before, after)
        ]
        assert (losses[1] <= losses[0] * (1 + 1e-6)).all() and losses[1].sum() < 0.95 * losses[0].sum()


def test_a_row_at_its_optimum_and_a_dead_channel_stay():
    dense, factor, structure, swept = make_problem("unstructured", dead=(2, 5))
    once = refit_matrices(dense, swept, factor, structure)
    twice = refit_matrices(dense, once, factor, structure)
    for first, second in zip(once, twice, strict=True):
        assert (first.weight[:, [2, 5]] == 0).all() and first.weight.isfinite().all()
        torch.testing.assert_close(second.weight, first.weight, rtol=1e-6, atol=1e-9)


def test_on_the_grid_the_mask_stays_and_the_error_is_made_up_for():
    dense, factor, structure, swept = make_problem("2:4")
    scales = [row_scale(weight) for weight in dense]
    free = refit_matrices(dense, swept, factor, structure)
    for weight, scale, loose, onto in zip(
        dense, scales, free, refit_matrices(dense, swept, factor, structure, scales), strict=True
    ):
        steps = onto.weight / scale[:, None]
        torch.testing.assert_close(steps, steps.round())
        assert steps.abs().max() <= 127 and ((onto.weight == 0) | (loose.weight != 0)).all()
        rounded = torch.round(loose.weight / scale[:, None]).clamp(-127, 127) * scale[:, None]
        change = rounded - weight
        assert onto.loss == pytest.approx(onto.trace)
        assert onto.trace <= float((change @ factor.damped * change).sum()) / 2

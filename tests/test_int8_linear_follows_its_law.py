"""An int8 linear is the dynamic per-row law, with an exact integer product however long the row."""

import numpy as np
import pytest
import torch
from draftsmith.model.linear import Linear, multiply_int8, quantize_rows


@pytest.mark.parametrize("k", [1, 7, 64, 1041, 4097])
def test_products_at_full_scale_are_exact(k):
    a, b = torch.full((3, k), -127, dtype=torch.int8), torch.full((5, k), -127, dtype=torch.int8)
    b[2:] = 127
    b[4, -1] = 126  # an odd sum, lost where sums above 2**24 are kept in float32
    exact = a.numpy().astype(np.int64) @ b.numpy().astype(np.int64).T
    assert np.array_equal(multiply_int8(a, b).numpy(), exact.astype(np.float32))


@pytest.mark.parametrize("bias", [False, True])
def test_law_of_a_row(bias):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 3, 33, generator=generator)
    x[0, 0] = 0  # its scale is 1
    x[0, 1] = torch.linspace(-127, 127, 33)  # and so is this one's
    weight = torch.randint(-127, 128, (9, 33), dtype=torch.int8, generator=generator)
    tensors = {"l.weight": weight, "l.weight_scale": torch.rand(9, generator=generator)}
    if bias:
        tensors["l.bias"] = torch.randn(9, generator=generator)
    y = Linear("l", tensors)(x)

    for row, got in zip(x.reshape(-1, 33).numpy(), y.reshape(-1, 9).numpy(), strict=True):
        scale = np.abs(row).max() / np.float32(127) or np.float32(1)
        integers = np.clip(np.rint(row / scale), -127, 127).astype(np.int64)
        wanted = float(scale) * tensors["l.weight_scale"].double().numpy()
        wanted = wanted * (weight.numpy().astype(np.int64) @ integers)
        wanted = wanted + (tensors["l.bias"].double().numpy() if bias else 0)
        np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-6)


def test_halves_round_to_even():
    rows, scale = quantize_rows(torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]]))
    assert scale.item() == 1 and rows.tolist() == [[127, 0, 2, 2, 0, -2]]


def test_rows_do_not_see_each_other():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(6, 64, generator=generator)
    weight = torch.randint(-127, 128, (16, 64), dtype=torch.int8, generator=generator)
    linear = Linear("l", {"l.weight": weight, "l.weight_scale": torch.rand(16, generator=generator)})
    together = linear(x)
    assert all(torch.equal(linear(row[None])[0], together[i]) for i, row in enumerate(x))

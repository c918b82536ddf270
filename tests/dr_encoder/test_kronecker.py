"""The matrix-normal code: closed forms, what it falls back to, and that nothing large is formed."""

import numpy as np
import pytest
import torch

from dr_encoder.codecs.coordinate import CoordinateCodec
from dr_encoder.codecs.kronecker import KroneckerCodec, leading_directions, shrunk_variance
from dr_encoder.layout import AdapterLayout
from dr_encoder.priors import from_moments, from_public_gradients

pytestmark = pytest.mark.usefixtures("one_thread")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def orthonormal(size: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(size, size, generator=seeded(seed), dtype=torch.float64)).Q


def matrix_normal(left: torch.Tensor, right: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows whose second moment is exactly Kronecker: one a pair (i, j), sqrt(count left_i right_j) u_i v_j^T; and variances [p, q]."""
    one, other = orthonormal(len(left), seed), orthonormal(len(right), seed + 1)
    scale = (len(left) * len(right) * left[:, None] * right).sqrt()
    rows = torch.einsum("ij,pi,qj->ijpq", scale, one, other).flatten(0, 1).flatten(1)
    return rows.float(), left[:, None] * right


LEFT, RIGHT = torch.tensor([5.0, 2.0, 0.7, 0.1], dtype=torch.float64), 1.7 ** -torch.arange(9, dtype=torch.float64)


@pytest.mark.parametrize("code_size", [1, 5, 17, 36])
@pytest.mark.parametrize("wide", [True, False])
def test_a_matrix_normal_source_keeps_the_largest_products(code_size, wide):
    rows, variances = matrix_normal(*((LEFT, RIGHT) if wide else (RIGHT, LEFT)), seed=3)
    layout = AdapterLayout.of([("M", torch.zeros(variances.shape))])
    codec = KroneckerCodec.fit(from_public_gradients(layout, rows), layout, code_size, 0.0, 0)
    best = variances.flatten().sort(descending=True).values[:code_size]
    assert float(codec.encode(rows).double().square().sum()) / len(rows) == pytest.approx(float(best.sum()), rel=1e-4)
    assert torch.allclose(codec.variance.double().sort(descending=True).values, best, rtol=1e-3)
    # and each number's variance is that number's
    assert torch.allclose(codec.encode(rows).square().mean(0), codec.variance, rtol=1e-3)


def test_the_largest_over_all_factors_are_chosen():
    first, small = matrix_normal(LEFT, RIGHT, 1)
    second, large = matrix_normal(RIGHT, 3 * LEFT, 2)
    rows = torch.cat([first, torch.full((36, 3), 0.5), second], 1)
    rows[:, 36:38] = torch.tensor([0.0, 4.0])
    layout = AdapterLayout.of([("A", torch.zeros(4, 9)), ("bias", torch.zeros(3)), ("B", torch.zeros(9, 4))])
    codec = KroneckerCodec.fit(from_public_gradients(layout, rows), layout, 20, 0.0, 0)
    every = torch.cat([small.flatten(), large.flatten(), torch.tensor([0.0, 16.0, 0.25])]).sort(descending=True).values
    assert float(codec.encode(rows).double().square().sum()) / 36 == pytest.approx(float(every[:20].sum()), rel=1e-4)
    assert codec.coordinates.tolist() == [37]
    assert torch.allclose(codec.encode(rows).square().mean(0), codec.variance, rtol=1e-3)  # the single coordinate is last in both
    used = sum(block.rows * block.left + block.columns * block.right for block in codec.blocks)
    assert len(codec.left) + len(codec.right) == used
    for block in codec.blocks:  # only the columns that a pair uses are stored
        assert max(block.left, block.right) <= block.count <= block.left * block.right


def test_numbers_are_u_m_v_and_decoding_puts_them_back():
    rows = torch.randn(30, 32, generator=seeded(5))
    layout = AdapterLayout.of([("M", torch.zeros(4, 8))])
    codec = KroneckerCodec.fit(from_public_gradients(layout, rows), layout, 6, 0.0, 0)
    ((block, left, right, cells),) = codec._parts
    update = torch.randn(1, 32, generator=seeded(6))
    by_hand = [float(left[:, cell // block.right] @ update.view(4, 8) @ right[:, cell % block.right]) for cell in cells.tolist()]
    assert codec.encode(update)[0].tolist() == pytest.approx(by_hand, rel=1e-4, abs=1e-5)
    rebuilt = sum(
        number * torch.outer(left[:, cell // block.right], right[:, cell % block.right])
        for number, cell in zip(by_hand, cells.tolist(), strict=True)
    )
    assert torch.allclose(codec.decode(codec.encode(update)[0]).view(4, 8), rebuilt, atol=1e-5)


def test_it_has_more_numbers_than_rows_and_says_where_they_end():
    layout = AdapterLayout.of([("M", torch.zeros(4, 50)), ("unused", torch.zeros(50, 4))])
    rows = torch.zeros(3, 400)
    rows[:, :200] = torch.randn(3, 200, generator=seeded())
    codec = KroneckerCodec.fit(from_public_gradients(layout, rows), layout, 48, 0.0, 0)  # 4 left, 3 x 4 right
    assert len(codec.blocks) == 1
    kept = codec.decode(codec.encode(rows[:1])[0])
    assert torch.allclose(kept, rows[0], atol=1e-4)
    with pytest.raises(ValueError, match=r"^Expected code_size=49 <= 48, .* prior's 3 rows span$"):
        KroneckerCodec.fit(from_public_gradients(layout, rows), layout, 49, 0.0, 0)
    with pytest.raises(ValueError, match="max_columns=0 >= 1"):
        KroneckerCodec.fit(from_public_gradients(layout, rows), layout, 1, 0.0, 0, max_columns=0)


def test_max_columns_bounds_what_is_stored():
    layout = AdapterLayout.of([("M", torch.zeros(4, 50))])
    prior = from_public_gradients(layout, torch.randn(30, 200, generator=seeded()))
    codec = KroneckerCodec.fit(prior, layout, 20, 0.0, 0, max_columns=5)
    assert codec.blocks[0].right == 5
    with pytest.raises(ValueError, match="code_size=21 <= 20"):
        KroneckerCodec.fit(prior, layout, 21, 0.0, 0, max_columns=5)


def test_bases_made_again_are_the_same_code(monkeypatch):
    layout = AdapterLayout.of([("A", torch.zeros(4, 50)), ("b", torch.zeros(6)), ("B", torch.zeros(30, 4))])
    prior = from_public_gradients(layout, torch.randn(40, layout.size, generator=seeded()))
    kept = KroneckerCodec.fit(prior, layout, 60, 0.0, 0)
    monkeypatch.setattr("dr_encoder.codecs.kronecker.KEPT", 0)
    assert KroneckerCodec.fit(prior, layout, 60, 0.0, 0).fingerprint() == kept.fingerprint()


def test_a_diagonal_prior_or_one_without_matrices_is_a_choice_of_coordinates():
    layout = AdapterLayout.of([("A", torch.zeros(4, 5)), ("B", torch.zeros(5, 1))])
    diagonal = from_moments(layout, torch.zeros(2), torch.tensor([1.0, 2.0]))
    assert isinstance(KroneckerCodec.fit(diagonal, layout, 5, 0.0, 0), CoordinateCodec)
    vectors = AdapterLayout.of([("a", torch.zeros(7)), ("b", torch.zeros(1, 6)), ("c", torch.zeros(()))])
    prior = from_public_gradients(vectors, torch.randn(9, 14, generator=seeded()))
    codec = KroneckerCodec.fit(prior, vectors, 4, 0.0, 0)
    assert torch.equal(codec.coordinates, CoordinateCodec.fit(prior, vectors, 4, 0.0, 0).chosen)


def test_long_stacks_are_solved_by_iteration_as_well_as_exactly():
    """Beyond 512 samples and entries: against numpy's SVD."""
    spectrum = 1.05 ** -torch.arange(600.0)
    stack = torch.linalg.qr(torch.randn(700, 600, generator=seeded(1))).Q * spectrum
    stack = stack @ torch.linalg.qr(torch.randn(600, 600, generator=seeded(2))).Q
    basis, values = leading_directions(stack, 20, 0)
    exact = np.linalg.svd(stack.double().numpy(), compute_uv=False)[:20] ** 2
    assert values.numpy() == pytest.approx(exact, rel=0.02)
    assert (basis.T @ basis - torch.eye(20)).abs().max() < 1e-12
    assert float((stack.double() @ basis).square().sum()) > 0.99 * exact.sum()
    again, _ = leading_directions(stack, 20, 0)
    assert torch.equal(basis, again)


def test_shrinking_believes_the_rows_only_beyond_their_noise():
    product = torch.full((10, 40), 2.0, dtype=torch.float64)
    squares = torch.randn(30, 10, 40, generator=seeded(), dtype=torch.float64).square()
    assert (shrunk_variance(2 * squares.mean(0), product, 30) - product).abs().max() < 0.25 * (2 * squares.mean(0) - product).abs().max()
    truth = torch.rand(10, 40, generator=seeded(1), dtype=torch.float64) * 20  # far from the product form
    shrunk = shrunk_variance(truth * squares.mean(0), product, 30)
    assert (shrunk - truth).square().sum() < 0.2 * (product - truth).square().sum()
    assert torch.equal(shrunk_variance(product, product, 30), product)


def test_a_source_off_the_product_form_still_finds_its_energy():
    """Energy at the pairs (0, 1) and (1, 0) only: the product form would rank (0, 0) and (1, 1) alike."""
    rows = torch.zeros(200, 2, 2)
    rows[:, 0, 1], rows[:, 1, 0] = torch.randn(2, 200, generator=seeded()) * torch.tensor([[2.0], [1.9]])
    layout = AdapterLayout.of([("M", torch.zeros(2, 2))])
    codec = KroneckerCodec.fit(from_public_gradients(layout, rows.flatten(1)), layout, 2, 0.0, 0)
    assert float(codec.encode(rows.flatten(1)).square().sum() / rows.square().sum()) > 0.999

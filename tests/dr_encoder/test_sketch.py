"""The seeded projection: orthonormal by construction, unbiased, the same everywhere."""

import pytest
import torch

from dr_encoder.codecs.sketch import SketchCodec
from dr_encoder.layout import AdapterLayout

pytestmark = pytest.mark.usefixtures("one_thread")


PINNED = [-1.154701, -12.124355, 4.949748, 4.949748, -4.949748]


def fit(size: int, code_size: int, seed: int = 0) -> SketchCodec:
    return SketchCodec.fit(None, AdapterLayout.of([("v", torch.zeros(size))]), code_size, 0.0, seed)


@pytest.mark.parametrize(("size", "code_size"), [(1, 1), (7, 7), (100, 1), (100, 33), (100, 99), (640, 64), (1 << 17, 1000)])
def test_every_row_is_a_unit_vector_of_its_own_coordinates(size, code_size):
    codec = fit(size, code_size)
    back = codec.encode(torch.stack([codec.decode(code) for code in torch.eye(code_size)[:20]]))
    assert torch.allclose(back, torch.eye(code_size)[:20], atol=1e-6)
    counts = torch.stack([codec.decode(code) != 0 for code in torch.eye(code_size)[:20]]).sum(1)
    assert counts.min() >= size // code_size and counts.max() <= size // code_size + 1


def test_of_white_sources_it_keeps_k_of_n():
    codec = fit(3_000, 100)
    white = torch.randn(300, 3_000, generator=torch.Generator().manual_seed(1))
    kept = codec.encode(white).square().sum(1) / white.square().sum(1)
    assert float(kept.mean()) == pytest.approx(100 / 3_000, rel=0.03)


def test_of_any_source_it_keeps_k_of_n_on_average_over_seeds():
    """All energy in neighbouring coordinates of one sign, on which a plain sum of blocks would do very differently."""
    update = torch.zeros(1, 1_000)
    update[0, 100:400] = torch.linspace(1, 2, 300)
    kept = torch.tensor([float(fit(1_000, 50, seed).encode(update).square().sum() / update.square().sum()) for seed in range(200)])
    assert abs(float(kept.mean()) - 0.05) < 4 * float(kept.std()) / 200**0.5
    decoded = torch.stack([fit(1_000, 50, seed).decode(fit(1_000, 50, seed).encode(update)[0]) for seed in range(200)]).mean(0) * 20
    assert float((decoded - update[0]).norm() / update.norm()) < 0.5  # what remains is 200 draws' error


def test_the_projection_is_pinned():
    """A seed means the same on every machine and with every release: these numbers must never change."""
    codec = fit(12, 5, seed=7)
    assert codec.encode(torch.arange(12.0)[None])[0].tolist() == pytest.approx(PINNED)
    assert codec.state()[0] == {}


def test_seeds_differ():
    update = torch.randn(1, 200, generator=torch.Generator().manual_seed(2))
    codes = [fit(200, 20, seed).encode(update)[0] for seed in range(5)]
    assert all(float(torch.cosine_similarity(codes[0], other, 0)) < 0.9 for other in codes[1:])

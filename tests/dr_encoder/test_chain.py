"""Two codecs in a row are their parts by hand."""

import pytest
import torch

from dr_encoder.codecs import CODECS, load, save
from dr_encoder.codecs.chain import ChainCodec
from dr_encoder.codecs.coordinate import CoordinateCodec
from dr_encoder.codecs.linear import principal_subspace
from dr_encoder.layout import AdapterLayout
from dr_encoder.priors import from_public_gradients

pytestmark = pytest.mark.usefixtures("one_thread")

LAYOUT = AdapterLayout.of([("A", torch.zeros(8, 25)), ("head", torch.zeros(40))])
ROWS = torch.randn(30, 240, generator=torch.Generator().manual_seed(1)) * LAYOUT.spread(torch.tensor([1.0, 3.0]))
PRIOR = from_public_gradients(LAYOUT, ROWS)


def fit(code_size: int = 4, **options) -> ChainCodec:
    return ChainCodec.fit(PRIOR, LAYOUT, code_size, 0.01, 0, **options)


def test_coordinate_then_linear_by_hand():
    codec, update = fit(), torch.randn(2, 240, generator=torch.Generator().manual_seed(2))
    chosen = CoordinateCodec.fit(PRIOR, LAYOUT, 64, 0.0, 0).chosen
    basis, variance = principal_subspace(ROWS[:, chosen], 4)
    assert torch.allclose(codec.encode(update), update[:, chosen] @ basis.T, atol=1e-5)
    code = update[0, chosen] @ basis.T
    for noise in (0.0, 0.3):
        expected = torch.zeros(240)
        gain = CODECS["linear"](basis, variance).decode(code, noise)
        expected[chosen] = gain
        assert torch.allclose(codec.decode(code, noise), expected, atol=1e-5)
    assert codec.linear and codec.orthonormal and codec.summable


def test_the_default_is_sixteen_times_as_wide_and_never_wider_than_the_update():
    assert fit(4).outer.code_size == 64 and fit(20).outer.code_size == 240 and fit(4, inner_size=10).outer.code_size == 10


def test_the_claims_are_those_of_the_parts(tmp_path):
    lossy = fit(4, parts=("coordinate", "topk"))
    assert not (lossy.linear or lossy.orthonormal or lossy.summable)
    sketched = fit(4, parts=("sketch", "linear"), inner_size=100)
    assert sketched.linear and sketched.orthonormal
    nested = ChainCodec(sketched, CODECS["sketch"].fit(None, AdapterLayout.of([("c", torch.zeros(4))]), 2, 0.0, 0))
    save(nested, tmp_path / "codec.safetensors")
    back = load(tmp_path / "codec.safetensors")
    assert back.fingerprint() == nested.fingerprint() and torch.equal(back.encode(ROWS), nested.encode(ROWS))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parts": ("coordinate", "nothing")}, "parts="),
        ({"parts": ("coordinate",)}, "parts="),
        ({"parts": ("topk", "linear")}, "the first with codes that can be summed"),
        ({"inner_size": 3}, "code_size=4 <= inner_size=3 <= 240"),
        ({"inner_size": 241}, "inner_size=241 <= 240"),
    ],
)
def test_what_makes_no_chain_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        fit(4, **options)


def test_allocation_then_linear_is_the_principal_subspace_in_the_metric_of_an_adam_server():
    """A factor of large gradients does not take the whole code; in the scaled coordinates the code is an orthonormal projection."""
    generator = torch.Generator().manual_seed(2)
    layout = AdapterLayout.of([("head", torch.zeros(6)), ("lora", torch.zeros(40))])
    loud = 100 * torch.randn(80, 6, generator=generator) * 0.9 ** torch.arange(6)
    quiet = torch.randn(80, 40, generator=generator) * 0.5 ** torch.arange(40)
    updates = torch.cat([loud, quiet], 1)
    prior = from_public_gradients(layout, updates[:60])
    codec = CODECS["chain"].fit(prior, layout, 8, 0.0, 0, parts=("allocation", "linear"))
    plain = CODECS["linear"].fit(prior, layout, 6, 0.0, 0)
    held_out = updates[60:]

    def quiet_kept(codec):
        found = torch.stack([codec.decode(code) for code in codec.encode(held_out)])
        return float(1 - (found - held_out)[:, 6:].square().sum() / held_out[:, 6:].square().sum())

    assert quiet_kept(plain) < 0.1 < 0.6 < quiet_kept(codec)
    rms = torch.cat([loud[:60].square().mean().sqrt().expand(6), quiet[:60].square().mean().sqrt().expand(40)])
    scaled = codec.metric(held_out)
    by_hand = held_out / rms.sqrt()
    assert torch.allclose(scaled / scaled.norm(), by_hand / by_hand.norm(), atol=1e-5)
    basis, _ = principal_subspace(codec.metric(updates[:60]), 8)
    assert torch.allclose((scaled @ basis.T).norm(dim=1), codec.encode(held_out).norm(dim=1), rtol=1e-4)

"""AdapterLayout: names <-> one vector."""

import pytest
import torch

from dr_encoder.layout import AdapterLayout

NAMED = [("a.A", torch.arange(6.0).reshape(2, 3)), ("a.B", torch.arange(4.0).reshape(2, 2) + 10), ("head", torch.tensor([7.0]))]


@pytest.fixture
def layout():
    return AdapterLayout.of(NAMED)


def test_flatten_and_views_are_inverse(layout):
    flat = layout.flatten(dict(reversed(NAMED)))  # the layout's order, not the mapping's
    assert flat.tolist() == [0, 1, 2, 3, 4, 5, 10, 11, 12, 13, 7] and flat.dtype == torch.float32
    assert layout.size == 11
    for (name, tensor), (key, view) in zip(NAMED, layout.views(flat).items(), strict=True):
        assert name == key and torch.equal(view, tensor)


def test_views_of_a_batch_share_memory(layout):
    flat = torch.zeros(2, 5, layout.size)
    layout.views(flat)["a.B"][1, 4, 0, 1] = 3.0
    assert flat[1, 4, 7] == 3.0 and flat.sum() == 3.0
    assert layout.views(flat)["a.A"].shape == (2, 5, 2, 3)


def test_flatten_copies_and_detaches(layout):
    named = {name: tensor.clone().double().requires_grad_() for name, tensor in NAMED}
    flat = layout.flatten(named)
    flat += 1
    assert not flat.requires_grad and named["head"].item() == 7.0


def test_one_number_a_factor_spreads_over_its_coordinates(layout):
    assert layout.factor_ids().tolist() == [0] * 6 + [1] * 4 + [2]
    per_factor = torch.tensor([0.5, 2.0, -1.0])
    assert torch.equal(layout.spread(per_factor), per_factor[layout.factor_ids()])


def test_the_fingerprint_follows_names_shapes_and_order(layout):
    assert AdapterLayout.of(NAMED).fingerprint() == layout.fingerprint()
    others = [NAMED[::-1], [("a.A", torch.zeros(3, 2)), *NAMED[1:]], [("b.A", NAMED[0][1]), *NAMED[1:]], NAMED[:2]]
    prints = {AdapterLayout.of(other).fingerprint() for other in others}
    assert len(prints) == 4 and layout.fingerprint() not in prints


def test_what_makes_no_layout_is_refused(layout):
    with pytest.raises(ValueError, match="at least one trainable factor"):
        AdapterLayout.of([])
    with pytest.raises(ValueError, match="distinct"):
        AdapterLayout.of([NAMED[0], NAMED[0]])
    with pytest.raises(ValueError, match="flat vector of 11 numbers, got 10"):
        layout.views(torch.zeros(10))

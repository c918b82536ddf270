"""PowerSGD, top-k and error feedback: baselines without DP."""

import pytest
import torch

from dr_encoder.codecs import CODECS, topk
from dr_encoder.codecs.powersgd import PowerSGDCodec
from dr_encoder.codecs.topk import TopKCodec, digits_of
from dr_encoder.feedback import ErrorFeedback
from dr_encoder.layout import AdapterLayout

pytestmark = pytest.mark.usefixtures("one_thread")

LAYOUT = AdapterLayout.of([("A", torch.zeros(6, 20)), ("bias", torch.zeros(7)), ("B", torch.zeros(15, 6)), ("tiny", torch.zeros(2, 2))])
N = LAYOUT.size


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def updates(count: int, rank: int | None = None, seed: int = 1) -> torch.Tensor:
    """Updates whose matrices have the given rank."""
    rows = torch.randn(count, N, generator=seeded(seed))
    for view in LAYOUT.views(rows).values():
        if view.ndim == 3 and rank is not None:
            left = torch.randn(count, view.shape[1], rank, generator=seeded(seed + 1))
            view.copy_(left @ torch.randn(count, rank, view.shape[2], generator=seeded(seed + 2)))
    return rows


def powersgd(rank: int | None = None, code_size: int | None = None) -> PowerSGDCodec:
    return PowerSGDCodec.fit(None, LAYOUT, code_size, 0.0, 0, rank=rank)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_powersgd_is_exact_for_matrices_of_its_rank(rank):
    codec = powersgd(rank)
    assert codec.code_size == rank * (26 + 21) + 7 + 4
    for update in updates(4, rank):
        assert torch.allclose(codec.decode(codec.encode(update[None])[0]), update, atol=1e-4)
        codec = codec.warm_started(codec.encode(update[None])[0])


def test_powersgd_sends_whole_what_two_factors_would_not_shorten():
    codec = powersgd(5)
    assert [block.rank for block in codec.blocks] == [0, 0, 0, 0]  # 5 (6 + 20) > 120, 5 (6 + 15) > 90
    update = updates(1)
    assert codec.code_size == N and torch.equal(codec.decode(codec.encode(update)[0]), update[0])
    assert [block.rank for block in powersgd(4).blocks] == [4, 0, 4, 0]


def test_powersgd_takes_the_largest_rank_that_fits():
    assert powersgd().code_size == 58
    assert powersgd(code_size=58).code_size == 58 and powersgd(code_size=104).code_size == 58
    assert powersgd(code_size=105).code_size == 105
    with pytest.raises(ValueError, match="code_size=57 >= 58, what rank 1 takes"):
        powersgd(code_size=57)
    with pytest.raises(ValueError, match="code_size=60 >= 105, what rank 2 takes"):
        powersgd(2, 60)
    with pytest.raises(ValueError, match="rank=0 >= 1"):
        powersgd(0)


def test_powersgd_warm_starts_converge_to_the_best_rank():
    """Subspace iteration: on one and the same matrix the error falls to the best that rank 2 can do."""
    update, codec, errors = updates(1), powersgd(2), []
    for _ in range(60):
        code = codec.encode(update)[0]
        errors.append(float((codec.decode(code) - update[0]).square().sum()))
        codec = codec.warm_started(code)
    best = sum(float(torch.linalg.svdvals(LAYOUT.views(update[0])[name])[2:].square().sum()) for name in ("A", "B"))
    assert errors[0] > 1.05 * best and errors[-1] == pytest.approx(best, rel=1e-3)


def test_powersgd_a_zero_update_does_not_kill_the_warm_start():
    codec = powersgd(2)
    after = codec.warm_started(codec.encode(torch.zeros(1, N))[0])
    assert torch.equal(after.starts, codec.starts)


def test_topk_keeps_the_largest_and_where_they_were():
    rows = updates(5)
    codec = TopKCodec.fit(None, LAYOUT, 41, 0.0, 0)
    assert codec.kept == 20 and codec.code_size == 40
    for update, code in zip(rows, codec.encode(rows), strict=True):
        threshold = update.abs().sort(descending=True).values[19]
        assert torch.equal(codec.decode(code), torch.where(update.abs() >= threshold, update, 0.0))


def test_topk_of_an_update_with_few_values_keeps_them_all():
    update = torch.zeros(1, N)
    update[0, [0, 5]] = torch.tensor([3.0, -2.0])
    codec = TopKCodec.fit(None, LAYOUT, 20, 0.0, 0)
    assert torch.equal(codec.decode(codec.encode(update)[0]), update[0])


def test_topk_places_stay_exact_in_float32_however_large():
    assert [digits_of(size) for size in (1, 1 << 24, (1 << 24) + 1, 1 << 48, (1 << 48) + 1)] == [1, 1, 2, 2, 3]


def test_topk_with_two_digits(monkeypatch):
    monkeypatch.setattr(topk, "RADIX", 16)  # 16^2 = 256 > 221 numbers: the same arithmetic at a size that can be tested
    update = updates(1)
    codec = TopKCodec.fit(None, LAYOUT, 30, 0.0, 0)
    assert (codec.digits, codec.kept, codec.code_size) == (2, 10, 30)
    kept = codec.decode(codec.encode(update)[0])
    assert int((kept != 0).sum()) == 10 and torch.equal(kept[kept != 0], update[0][kept != 0])
    with pytest.raises(ValueError, match="code_size=2 >= 3: a value and its place"):
        TopKCodec.fit(None, LAYOUT, 2, 0.0, 0)


def test_topk_notices_a_mean_of_codes():
    codec = TopKCodec.fit(None, LAYOUT, 40, 0.0, 0)
    with pytest.raises(ValueError, match=f"one update's code: its places are not whole numbers below {N}"):
        codec.decode(codec.encode(updates(3)).mean(0))


LOSSY = [("topk", {"code_size": 40}), ("powersgd", {"code_size": 58})]


@pytest.mark.parametrize(("family", "options"), LOSSY)
def test_output_and_residual_make_the_input_at_every_step(family, options):
    codec = CODECS[family].fit(None, LAYOUT, options["code_size"], 0.0, 0)
    memory, sent = ErrorFeedback(codec), {0: torch.zeros(N), 3: torch.zeros(N)}
    rows = updates(20)
    for step, update in enumerate(rows):
        client = (0, 3)[step % 2]
        before = memory.residuals.get(client, torch.zeros(N))
        decoded = memory.codec.decode(memory.compress(client, update))
        assert torch.allclose(decoded + memory.residuals[client], update + before, atol=1e-5)
        sent[client] += decoded
        if family == "powersgd" and step % 5 == 4:
            memory.codec = memory.codec.warm_started(memory.codec.encode(update[None])[0])  # another codec: nothing owed is forgotten
    for client, own in ((0, rows[0::2]), (3, rows[1::2])):
        assert torch.allclose(sent[client] + memory.residuals[client], own.sum(0), atol=1e-4)


def test_what_is_owed_is_sent_in_the_end():
    """A constant update: with feedback the mean of what arrives tends to it, without it only ever the same part arrives."""
    update = updates(1)[0]
    codec = CODECS["topk"].fit(None, LAYOUT, 40, 0.0, 0)
    memory = ErrorFeedback(codec)
    arrived = torch.stack([codec.decode(memory.compress(1, update)) for _ in range(400)]).mean(0)
    assert (arrived - update).norm() < 0.05 * update.norm()
    assert (codec.decode(codec.encode(update[None])[0]) - update).norm() > 0.5 * update.norm()


def test_a_bad_update_leaves_the_memory_as_it_was_and_the_memory_can_be_saved():
    codec = CODECS["topk"].fit(None, LAYOUT, 40, 0.0, 0)
    memory = ErrorFeedback(codec)
    memory.compress(2, updates(1)[0])
    kept = memory.residuals[2].clone()
    spoiled = updates(1)[0].index_fill(0, torch.tensor([4]), float("nan"))
    for bad in (spoiled, torch.zeros(3)):
        with pytest.raises(ValueError, match=f"a finite update of {N} numbers from client 2"):
            memory.compress(2, bad)
    assert torch.equal(memory.residuals[2], kept)
    back = ErrorFeedback.from_state(codec, memory.state())
    assert torch.equal(back.compress(2, updates(1)[0]), memory.compress(2, updates(1)[0])) and back.residuals.keys() == {2}

"""scripts/scaling.py: what more ranks divide, and what they do not."""

import runpy
from pathlib import Path

import pytest

SCRIPT = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "scaling.py"))
WORK = SCRIPT["Work"](examples=128, public=64, width=10, messages=1e3, gradients=7e3, codec=2e3, adapter=1e3)


def test_one_rank_sends_nothing():
    found = SCRIPT["seconds"](WORK, 1, 100.0, 1e3, 0.5)
    assert found["gathered"] == found["broadcast"] == 0
    assert found["total"] == pytest.approx((128 + 64) * 10 / 100 + 0.5)


def test_ranks_divide_the_model_alone():
    found = SCRIPT["seconds"](WORK, 8, 100.0, 1e3, 0.5)
    assert found["local_training"] == pytest.approx(1.6) and found["public_gradients"] == pytest.approx(0.8)
    assert found["gathered"] == pytest.approx(7.0) and found["broadcast"] == pytest.approx(3.0) and found["serial"] == 0.5


def test_ranks_without_an_example_help_nobody():
    local = [SCRIPT["seconds"](WORK, ranks, 100.0, 1e3, 0.0)["local_training"] for ranks in (128, 1000)]
    assert local == [0.1, 0.1]

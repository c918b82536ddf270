"""Batches: every example once, padding masked, positions from each first token, the budget kept."""

import numpy as np
import pytest
import torch

from fedllm.data.batches import make_batches


def ragged(count: int = 200, longest: int = 60, seed: int = 0) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [list(map(int, generator.integers(1, 99, generator.integers(1, longest)))) for _ in range(count)]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("budget", [1, 64, 2048])
def test_each_example_comes_back_once_under_its_index(side, budget):
    tokens = ragged()
    seen = {}
    for batch in make_batches(tokens, None, budget, pad_id=0, side=side):
        rows, width = batch.input_ids.shape
        assert rows == 1 or rows * width <= budget
        assert int(batch.attention_mask.sum(1).max()) == width  # padded to the longest, no further
        for row, i in enumerate(batch.index):
            assert i not in seen
            kept = batch.attention_mask[row].bool()
            seen[int(i)] = batch.input_ids[row][kept].tolist()
            assert batch.position_ids[row][kept].tolist() == list(range(int(kept.sum())))
            assert bool(batch.attention_mask[row, -1 if side == "left" else 0])
            assert torch.all(batch.input_ids[row][~kept] == 0)
    assert seen == dict(enumerate(tokens))


def test_a_chosen_index_may_repeat_and_keeps_its_values():
    tokens = ragged(20)
    chosen = np.array([3, 3, 7, 19])
    index = np.concatenate([batch.index for batch in make_batches(tokens, chosen, 64)])
    assert sorted(index) == [3, 3, 7, 19]


def test_alike_lengths_share_a_batch():
    tokens = ragged(400)
    padded = sum(batch.input_ids.numel() for batch in make_batches(tokens, None, 512))
    assert padded < 1.1 * sum(map(len, tokens))


def test_nothing_gives_no_batch():
    assert list(make_batches([], None)) == []

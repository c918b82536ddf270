"""What a task asks of a model: the loss of each example, and whether it was right. One class a task kind."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedllm.data.batches import Batch


class Objective(Protocol):
    """Losses [batch] (differentiable) and correct [batch] (bool, or None where the task has no right answer)."""

    def __call__(self, model: nn.Module, batch: Batch, targets: Tensor) -> tuple[Tensor, Tensor | None]: ...


class LabelWords:
    """Which label word comes next: cross-entropy over the words' first tokens at the prompt's last position.

    Only the rows of the output embedding that belong to label words are multiplied: with 49 k tokens of vocabulary the rest would
    cost as much as a fifth of the model.
    """

    def __init__(self, word_ids: list[int]):
        self.word_ids = torch.tensor(word_ids)

    def __call__(self, model: nn.Module, batch: Batch, targets: Tensor) -> tuple[Tensor, Tensor]:
        return _choice(self.logits(model, batch), targets)

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Of each label [batch, labels], float32."""
        base = model.get_base_model()
        hidden = base.base_model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids, use_cache=False
        ).last_hidden_state[:, -1]
        head = base.get_output_embeddings()
        return F.linear(hidden.float(), head.weight[self.word_ids].float())


class ClassHead:
    """Cross-entropy of a sequence classifier. Rows are padded on the right, where the model's own positions hold (RoBERTa's begin at 2)."""

    def __call__(self, model: nn.Module, batch: Batch, targets: Tensor) -> tuple[Tensor, Tensor]:
        return _choice(self.logits(model, batch), targets)

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Of each label [batch, labels], float32."""
        return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.float()


class NextToken:
    """Mean cross-entropy of an example's next tokens."""

    def __call__(self, model: nn.Module, batch: Batch, targets: Tensor) -> tuple[Tensor, None]:
        logits = model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids, use_cache=False
        ).logits[:, :-1]
        mask = (batch.attention_mask[:, :-1] * batch.attention_mask[:, 1:]).float()
        losses = F.cross_entropy(logits.float().transpose(1, 2), batch.input_ids[:, 1:], reduction="none")
        return (losses * mask).sum(1) / mask.sum(1).clamp(min=1), None


def _choice(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return F.cross_entropy(logits, targets, reduction="none"), logits.argmax(1) == targets

"""Tiny random models of the architectures that configs name, and looking at them."""

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GlmConfig,
    GlmForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

IDS = torch.tensor([[5, 9, 2, 7], [1, 3, 3, 8]])


def tiny_llama(dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).to(dtype)


def tiny_gpt2(dtype: torch.dtype = torch.float32):
    """Learned positions, dropout in its config, and linear layers that hold their weight the other way round (Conv1D)."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=1)
    return GPT2LMHeadModel(config).to(dtype)


def tiny_glm(dtype: torch.dtype = torch.float32):
    """Rotation of half a head's numbers, one matrix for gate and up."""
    torch.manual_seed(0)
    config = GlmConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        pad_token_id=0,
        eos_token_id=1,
    )
    return GlmForCausalLM(config).to(dtype)


def tiny_bert(dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    config = BertConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_labels=3)
    return BertForSequenceClassification(config).to(dtype)


def tiny_roberta(dtype: torch.dtype = torch.float32):
    """Positions begin at the padding's index and one."""
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=40,
        pad_token_id=0,
        num_labels=3,
    )
    return RobertaForSequenceClassification(config).to(dtype)


def trainable(model) -> dict[str, torch.Tensor]:
    return {key: value for key, value in model.named_parameters() if value.requires_grad}


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits.float()

"""Text encoders and images that several families use."""

from __future__ import annotations

import string
from typing import Any

import torch
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    LlamaTokenizer,
    T5Config,
    T5EncoderModel,
)

IMAGE = Image.new("RGB", (32, 32), (200, 60, 30))


def video(frames: int, size: int) -> list[Image.Image]:
    return [Image.new("RGB", (size, size), (20 * i, 60, 200)) for i in range(frames)]


def t5(**changes: Any) -> T5EncoderModel:
    """Return an encoder of 32 channels for `tiny.tokenizer()`."""
    torch.manual_seed(1)
    settings = dict(
        vocab_size=64,
        d_model=32,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        relative_attention_num_buckets=8,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(T5Config(**(settings | changes))).eval()


def bytes_alphabet() -> list[str]:
    return sorted(ByteLevel.alphabet())


def clip_tokenizer() -> CLIPTokenizer:
    letters = bytes_alphabet()
    pieces = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={p: i for i, p in enumerate(pieces)}, merges=[], model_max_length=77)


def clip_text() -> CLIPTextModel:
    torch.manual_seed(1)
    config = CLIPTextConfig(
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=1,
        vocab_size=514,
        hidden_size=8,
        intermediate_size=16,
        num_attention_heads=2,
        num_hidden_layers=1,
        projection_dim=8,
    )
    return CLIPTextModel(config).eval()


LLAMA = dict(
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=3,
    vocab_size=400,
    hidden_size=16,
    intermediate_size=16,
    num_attention_heads=2,
    num_hidden_layers=2,
)


def llama_tokenizer() -> LlamaTokenizer:
    pieces = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
    pieces += [f"<0x{byte:02X}>" for byte in range(256)]
    pieces += ["\u2581", *string.ascii_letters, *string.digits, *string.punctuation]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = LlamaTokenizer(vocab=vocabulary, merges=[], pad_token="<pad>")
    tokenizer.padding_side = "right"
    return tokenizer

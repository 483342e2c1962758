"""A tiny CLIP model of transformers in a folder: random weights, a tokenizer of letters."""

from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def write_clip(folder: Path, seed: int = 0) -> Path:
    """Write the model to `folder`; the seed determines its weights."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={p: i for i, p in enumerate(pieces)}, merges=[], model_max_length=16)
    ends = {"bos_token_id": len(pieces) - 2, "eos_token_id": len(pieces) - 1, "pad_token_id": len(pieces) - 1}
    text = {**TOWER, **ends, "vocab_size": len(pieces), "max_position_embeddings": 16}
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        vision = {**TOWER, "image_size": 32, "patch_size": 16}
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder

"""Writes a checkpoint of the Qwen2.5-0.5B shape with random weights in bf16 (1 GB), for `gleaner bench --model DIR`: what
loading from a file takes. The tokenizer is the bundled model's, whose ids are few enough.

usage: random_checkpoint.py DIR      (needs torch and safetensors)
"""
import json
import pathlib
import shutil
import sys

import torch
from safetensors.torch import save_file

HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE, VOCAB = 896, 24, 14, 2, 64, 4864, 151936
bundled = pathlib.Path(__file__).parent.parent / "models/gleaner-demo-16m"
folder = pathlib.Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
torch.manual_seed(0)


def matrix(*shape):
    return (torch.randn(*shape) * 0.02).bfloat16()


def ones(width):
    return torch.ones(width, dtype=torch.bfloat16)


tensors = {"model.embed_tokens.weight": matrix(VOCAB, HIDDEN), "model.norm.weight": ones(HIDDEN)}
for layer in range(LAYERS):
    at = f"model.layers.{layer}."
    for name, rows in ("q", HEADS * HEAD_DIM), ("k", KV_HEADS * HEAD_DIM), ("v", KV_HEADS * HEAD_DIM):
        tensors[f"{at}self_attn.{name}_proj.weight"] = matrix(rows, HIDDEN)
        tensors[f"{at}self_attn.{name}_proj.bias"] = matrix(rows)
    tensors[f"{at}self_attn.o_proj.weight"] = matrix(HIDDEN, HEADS * HEAD_DIM)
    tensors[f"{at}mlp.gate_proj.weight"] = matrix(INTERMEDIATE, HIDDEN)
    tensors[f"{at}mlp.up_proj.weight"] = matrix(INTERMEDIATE, HIDDEN)
    tensors[f"{at}mlp.down_proj.weight"] = matrix(HIDDEN, INTERMEDIATE)
    tensors[f"{at}input_layernorm.weight"] = ones(HIDDEN)
    tensors[f"{at}post_attention_layernorm.weight"] = ones(HIDDEN)
save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
config = json.loads((bundled / "config.json").read_text())
config |= {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
           "num_key_value_heads": KV_HEADS, "intermediate_size": INTERMEDIATE, "vocab_size": VOCAB,
           "rope_theta": 1000000.0, "max_position_embeddings": 32768}
(folder / "config.json").write_text(json.dumps(config, indent=1))
for name in "tokenizer.json", "tokenizer_config.json", "generation_config.json":
    shutil.copy(bundled / name, folder)

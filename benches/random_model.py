"""Writes a model directory of a named shape with random weights, for benchmarks: timing depends on the shape alone.
The bundled tokenizer goes with it.

usage: random_model.py SHAPE OUT_DIR      (needs torch and transformers)
"""
import shutil
import sys
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

SHAPES = {
    "qwen2.5-0.5b": dict(hidden_size=896, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
                         intermediate_size=4864, vocab_size=151936, max_position_embeddings=32768,
                         tie_word_embeddings=True),
}

shape, out = sys.argv[1], Path(sys.argv[2])
torch.manual_seed(0)
Qwen2ForCausalLM(Qwen2Config(**SHAPES[shape])).to(torch.bfloat16).save_pretrained(out)
for name in ["tokenizer.json", "tokenizer_config.json"]:
    shutil.copy(Path("models/gleaner-demo-16m") / name, out)

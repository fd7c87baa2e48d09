"""Makes tests/golden/arch: small random models of every supported architecture, and what transformers computes with
them in fp32.

usage: make_arch.py OUT_DIR          (made with torch 2.15 and transformers 5.23)
"""
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM,
                          Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM)

SIZES = dict(hidden_size=128, num_hidden_layers=2, intermediate_size=128, vocab_size=256, num_attention_heads=2,
             num_key_value_heads=1, max_position_embeddings=4096)
LLAMA3 = dict(rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=256)
YARN = dict(rope_type="yarn", rope_theta=1000000.0, factor=4.0, original_max_position_embeddings=128)
LINEAR = dict(rope_type="linear", rope_theta=10000.0, factor=2.0)


def default(theta):
    return dict(rope_type="default", rope_theta=theta)


MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig, dict(rope_parameters=LINEAR, num_key_value_heads=2)),
    "llama31_rope": (LlamaForCausalLM, LlamaConfig, dict(rope_parameters=LLAMA3)),
    "mistral": (MistralForCausalLM, MistralConfig, dict(rope_parameters=default(10000.0), sliding_window=None)),
    "mistral_sliding": (MistralForCausalLM, MistralConfig, dict(rope_parameters=default(10000.0), sliding_window=64)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config,
              dict(rope_parameters=default(1000000.0), num_attention_heads=4, num_key_value_heads=2, hidden_size=256,
                   tie_word_embeddings=True)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config,
              dict(rope_parameters=default(1000000.0), head_dim=128, tie_word_embeddings=True)),
    "yarn": (Qwen2ForCausalLM, Qwen2Config, dict(rope_parameters=YARN)),
}


def main(out):
    for seed, (name, (model_class, config_class, settings)) in enumerate(MODELS.items()):
        torch.manual_seed(seed)
        folder = out / name
        model = model_class(config_class(**{**SIZES, **settings}))
        # The usual 0.02 would leave attention flat and every biased or normalised path unproven.
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.data = noise * 0.15 if parameter.dim() > 1 else parameter.data + 0.1 * noise
        model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="300KB" if name == "yarn" else "1GB")

        # Loaded anew: casting a model to bf16 and back leaves its rotary frequencies rounded.
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        input_ids = torch.randint(3, SIZES["vocab_size"], (1, 300))
        with torch.no_grad():
            result = model(input_ids, output_attentions=True, output_hidden_states=True)
        logit_rows = torch.arange(0, 300, 43)
        save_file({
            "input_ids": input_ids[0].int(),
            "hidden_last": result.hidden_states[-1][0, ::37].contiguous(),
            "logit_rows": logit_rows.int(),
            "logits": result.logits[0, logit_rows].contiguous(),
            "last_attention_head_sum": result.attentions[-1][0, :, -20:].sum(0).contiguous(),
        }, folder / "expected.safetensors")
        print(name, "logits up to", result.logits.abs().max().item(), "sum up to", result.attentions[-1][0, :, -20:].sum(0).max().item())


main(Path(sys.argv[1]))

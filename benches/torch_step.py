"""What PyTorch takes for a step's forward pass: a transformers model of a shape of `gleaner bench`, with random weights in
bf16, compiled and captured in a CUDA graph, the way PyTorch is fastest. It gives the last hidden states alone: no scores,
no selection, no next prompt.

usage: torch_step.py [M ...]      (needs torch, transformers and a GPU; the shape is Qwen2.5-0.5B)
"""
import statistics
import sys

import torch
from transformers import Qwen2Config, Qwen2Model

CONFIG = dict(hidden_size=896, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
              intermediate_size=4864, vocab_size=151936, max_position_embeddings=32768)
STEPS, RUNS = 20, 7

torch.manual_seed(0)
model = Qwen2Model(Qwen2Config(**CONFIG, attn_implementation="sdpa")).to("cuda", torch.bfloat16).eval()
print(f"torch {torch.__version__}, Qwen2.5-0.5B shape, ms a forward pass: median, least, most of {RUNS} runs of {STEPS}")


def milliseconds(forward, ids):
    """A pass, captured in a graph and replayed."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            forward(ids)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        forward(ids)
    runs = []
    for _ in range(RUNS + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(STEPS):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        runs.append(start.elapsed_time(end) / STEPS)
    return runs[1:]


with torch.inference_mode():
    plain = lambda ids: model(input_ids=ids, use_cache=False).last_hidden_state
    for length in [int(m) for m in sys.argv[1:]] or [1894, 2918, 4966]:
        ids = torch.randint(0, CONFIG["vocab_size"], (1, length), device="cuda")
        torch._dynamo.reset()
        for name, forward in [("graph", plain), ("compiled, graph", torch.compile(plain, dynamic=False))]:
            runs = milliseconds(forward, ids)
            print(f"{length:>6} {name:<16} {statistics.median(runs):8.3f} {min(runs):8.3f} {max(runs):8.3f}", flush=True)

"""How much of what the reference keeps in fp32 it keeps in bf16: the measure for readers that compute in bf16.

Each recorded step (NAME.json, NAME.safetensors, from infini-retri 0.0.3 in fp32) is run from its recorded input ids
through transformers in bf16 with eager attention, and scored the reference's way. Written for each recording: `kept`, the
larger number of kept sentences of the two, and `common`, those that both keep, over all steps.

usage: reference_bf16.py MODEL_DIR OUT.json RECORDING.safetensors...      (needs torch, transformers and safetensors)
"""
import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def head_sums(model, input_ids):
    """The last layer's probabilities, summed over heads in the model's type, as fp32 [tokens, tokens]."""
    ids = torch.from_numpy(input_ids.astype(np.int64))[None].to(DEVICE)
    attention = model(input_ids=ids, output_attentions=True, use_cache=False, logits_to_keep=1).attentions[-1]
    return attention[0].sum(0).float().cpu().numpy()


def filtered(rows, width):
    """The box filter of scipy's convolve2d(mode="same") in fp64: of an even width the odd tap lies on the left."""
    length = rows.shape[1]
    padded = np.pad(rows.astype(np.float64), ((0, 0), (width // 2, (width - 1) // 2)))
    return sum(padded[:, tap:tap + length] for tap in range(width))


def kept_starts(scores, first, starts, topk):
    """First tokens of the sentences that own one of the `topk` best; of equal scores the later token wins."""
    best = first + np.argsort(scores, kind="stable")[-topk:]
    return set(starts[np.searchsorted(starts, best, side="right") - 1].tolist())


def compare(model, path):
    recording, arrays = json.loads(path.with_suffix(".json").read_text(encoding="utf-8")), load_file(path)
    weights, kept, common = None, 0, 0
    for index, step in enumerate(recording["steps"]):
        sums = head_sums(model, arrays[f"{index}.input_ids"])
        first, end, question = step["prefix"], step["context_end"], step["question_start"]
        if weights is None:
            # Columns are added from left to right in fp32, and the sum is frozen, as in the reference.
            weights = sum(sums[question:, column] for column in range(question, len(sums))).astype(np.float64)[:, None]
        scores = (weights * (weights * filtered(sums[question:, first:end], recording["answer_length"]))).sum(0)
        ours = kept_starts(scores, first, arrays[f"{index}.sentence_starts"], recording["topk"])
        expected = set(arrays[f"{index}.kept_starts"].tolist())
        kept += max(len(ours), len(expected))
        common += len(ours & expected)
    print(f"{path.stem}: {100 * common / kept:.1f}% of {kept} kept sentences in common, {index + 1} steps", flush=True)
    return {"steps": index + 1, "kept": kept, "common": common}


@torch.inference_mode()
def main(model_dir, out, *recordings):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        model_dir, attn_implementation="eager", dtype=torch.bfloat16).eval().to(DEVICE)
    result = {
        "what": "transformers in bf16 with eager attention against the recorded fp32 reference, each step from the same input ids",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
        "recordings": {Path(path).stem: compare(model, Path(path)) for path in recordings},
    }
    Path(out).write_text(json.dumps(result, indent=1) + "\n")


main(*sys.argv[1:])

"""Records what the reference package does with a document, step by step, in fp32 on the CPU: NAME.safetensors (arrays)
and NAME.json (settings, lengths, answer) beside this script.

usage: make_document.py NAME QUESTION [WINDOW TOPK PHRASE]
(made with infini-retri 0.0.3 from PyPI, torch 2.15 and transformers 5.23; run from the repository's root)
"""
import json
import sys
from pathlib import Path

import numpy as np
import torch
from infini_retri import InfiniRetri
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

DOCUMENT = "examples/almanac.txt"
MODEL = "models/gleaner-demo-16m"


class Recorder:
    """Wraps the methods of the package that see token ids, scores and sentences, and keeps what passes through."""

    def __init__(self, model, package):
        self.arrays, self.steps, self.seen = {}, [], {}
        self.forward, model.forward = model.forward, self.on_forward
        thoughts = package.ir.retri.thoughts
        self.focus, thoughts.get_focus_index = thoughts.get_focus_index, self.on_focus
        self.select, package.ir.retri.select_sentence = package.ir.retri.select_sentence, self.on_select
        self.prompt, package.ir.retri.build_prompt = package.ir.retri.build_prompt, self.on_prompt

    def on_forward(self, *args, **kwargs):
        if kwargs.get("output_attentions"):
            self.seen["input_ids"] = kwargs["input_ids"][0].numpy().astype(np.int32)
        return self.forward(*args, **kwargs)

    def on_focus(self, **kwargs):
        focus, weights, scores, question = self.focus(**kwargs)
        self.seen.update(info=kwargs["process_info"], prefix=kwargs["PREFIX_PROMPT_TOKEN_NUM"],
                         scores=np.asarray(scores, np.float64), selected=np.array(sorted(focus), np.int32))
        return focus, weights, scores, question

    def on_select(self, focus, sentences):
        kept = self.select(focus, sentences)
        step, info = len(self.steps), self.seen["info"]
        starts = [sentence[0] for sentence in sentences if sentence] + [sentences[-1][-1] + 1]
        for name, array in dict(input_ids=self.seen["input_ids"], scores=self.seen["scores"],
                                selected=self.seen["selected"], sentence_starts=np.array(starts, np.int32),
                                kept_starts=np.array([sentence[0] for sentence in kept], np.int32)).items():
            self.arrays[f"{step}.{name}"] = array
        self.steps.append(dict(prefix=int(self.seen["prefix"]), context_end=int(info["context_end_index"]),
                               question_start=int(info["question_start_index"])))
        return kept

    def on_prompt(self, *args, **kwargs):
        self.retained_text = kwargs["data_dict"]["context"]
        return self.prompt(*args, **kwargs)


def main(name, question, window_length=1024, topk=300, answer_length=8):
    torch.set_num_threads(2)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, attn_implementation="eager", dtype=torch.float32).eval()
    model.generation_config.do_sample = False
    settings = dict(window_length=int(window_length), topk=int(topk), answer_length=int(answer_length))
    package = InfiniRetri(model, tokenizer, **settings)
    recorder = Recorder(model, package)
    document = Path(DOCUMENT).read_text(encoding="utf-8")
    answer = package.generate(context=document, question=question, max_new_tokens=48)

    target = Path(__file__).parent / name
    save_file(recorder.arrays, target.with_suffix(".safetensors"))
    record = dict(reference="infini-retri 0.0.3, fp32, eager attention, greedy", document=DOCUMENT, question=question,
                  **settings, answer=answer, retained_text=recorder.retained_text, steps=recorder.steps)
    target.with_suffix(".json").write_text(json.dumps(record, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    print(name, len(recorder.steps), "steps:", answer.strip())


main(*sys.argv[1:])

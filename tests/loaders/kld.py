"""Mean divergence, perplexities and agreement of two checkpoints on the same tokens, through transformers' own loader.

usage: kld.py REFERENCE MODEL TEXT WINDOW TOKENS
Windows do not overlap; the first token of each is not scored. Prints one JSON object, the figures of `drawknife compare`.
"""
import json
import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

reference, folder, text, window, tokens = *sys.argv[1:4], int(sys.argv[4]), int(sys.argv[5])


def load(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, device_map="cpu").eval()


p_model, q_model = load(reference), load(folder)
ids = AutoTokenizer.from_pretrained(reference)(open(text, encoding="utf-8").read(), return_tensors="pt").input_ids[0][:tokens]
ids = ids[: len(ids) // window * window].view(-1, window)
sums, divergences = torch.zeros(3, dtype=torch.float64), []
with torch.inference_mode():
    for row in ids:
        p, q = (torch.log_softmax(model(input_ids=row[None], use_cache=False).logits[0, :-1].double(), -1) for model in (p_model, q_model))
        divergences.append((p.exp() * (p - q)).sum(-1))
        taken = [-scores.gather(-1, row[1:, None]).sum() for scores in (p, q)]
        sums += torch.stack([*taken, (p.argmax(-1) == q.argmax(-1)).double().sum()])
divergences = torch.cat(divergences)
count = len(divergences)
print(json.dumps({
    "tokens": count,
    "reference_perplexity": (sums[0] / count).exp().item(),
    "perplexity": (sums[1] / count).exp().item(),
    "perplexity_ratio": ((sums[1] - sums[0]) / count).exp().item(),
    "kld_mean": divergences.mean().item(),
    "top1_agreement": (sums[2] / count).item(),
}))

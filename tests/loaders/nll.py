"""Mean negative log-likelihood of a text under a checkpoint, through transformers' own loader.

usage: nll.py FOLDER TOKENIZER_FOLDER TEXT WINDOW TOKENS [dequantize]
Windows do not overlap; the first token of each is not scored. A GGUF file in the folder is loaded as such.
"""
import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, tokenizer, text, window, tokens = *sys.argv[1:4], int(sys.argv[4]), int(sys.argv[5])
options = {"dtype": torch.float32}
if os.path.exists(os.path.join(folder, "model.gguf")):
    options["gguf_file"] = "model.gguf"
else:
    options["device_map"] = "cpu"
if "dequantize" in sys.argv[6:]:
    from transformers import CompressedTensorsConfig

    options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
lost = {key: sorted(names)[:3] for key, names in info.items() if names and key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
if lost:
    sys.exit(f"not all tensors were taken: {lost}")
model.eval()
ids = AutoTokenizer.from_pretrained(tokenizer)(open(text, encoding="utf-8").read(), return_tensors="pt").input_ids[0][:tokens]
ids = ids[: len(ids) // window * window].view(-1, window)
total, count = 0.0, 0
with torch.inference_mode():
    for row in ids:
        scores = torch.log_softmax(model(input_ids=row[None], use_cache=False).logits[0, :-1].float(), -1)
        taken = scores.gather(-1, row[1:, None])
        total, count = total - taken.double().sum().item(), count + taken.numel()
print(total / count)

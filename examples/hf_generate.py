"""SimSD inside transformers' own `generate`, with the built-in pair: python examples/hf_generate.py [PROMPT ...]"""

from __future__ import annotations

import sys

import torch
from transformers import TextStreamer

import simsd

target, draft = simsd.load("tiny-target"), simsd.load("tiny-draft")
tokenizer = target.tokenizer.backend
# With an SDAR checkpoint, AutoModelForCausalLM and AutoTokenizer give the same three objects (after `import simsd`).
simsd_settings = {"assistant_model": draft.model, "tokenizer": tokenizer}

prompts = sys.argv[1:] or ["What is the capital of France?", "Let x=[5,8,3]. What is max(x)?"]
chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
tokenizer.padding_side = "left"
inputs = tokenizer.apply_chat_template(
    chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
)

print("A padded batch, greedy, decoded side by side; the tokens are those of native decoding:")
settings = simsd_settings | {"max_new_tokens": 64, "return_dict_in_generate": True}
output = target.model.generate(**inputs, **settings)
native = target.model.generate(**inputs, **settings, verify="none")
assert torch.equal(output.sequences, native.sequences)
for prompt, ours, theirs in zip(prompts, output.results, native.results, strict=True):
    forwards = f"{ours.stats.target_forwards} target forwards, {theirs.stats.target_forwards} natively"
    print(f"  {prompt} -> {ours.text.strip()}")
    print(f"    {len(ours.tokens)} tokens, {forwards}")

print("\nStreamed:")
one = {name: tensor[:1] for name, tensor in inputs.items()}
target.model.generate(**one, **simsd_settings, max_new_tokens=64, streamer=TextStreamer(tokenizer, skip_prompt=True))

print("\nThree samples, the same for the same seed:")
torch.manual_seed(0)
samples = target.model.generate(
    **one, **simsd_settings, max_new_tokens=64, do_sample=True, temperature=1.0, num_return_sequences=3
)
for text in tokenizer.batch_decode(samples[:, one["input_ids"].shape[1] :], skip_special_tokens=True):
    print(f"  {text.strip()}")

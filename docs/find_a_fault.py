"""Trains a small GPT-2 with transformers and records a trace. There is a fault in it.

docs/find_a_fault.md finds it.
"""

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from jaxtrain.crosscheck.recorder import Recorder  # or a copy of the file beside yours

torch.manual_seed(0)
sizes = dict(vocab_size=256, n_positions=32, n_embd=64, n_layer=2, n_head=4)
model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=None))
model.eval()  # no dropout, which would be random
model.save_pretrained("start")  # jaxtrain starts from these weights

text = "".join(f"{i} times {i} is {i * i}. " for i in range(2_000))
data = torch.tensor(list(text.encode()))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
recorder = Recorder("theirs.jsonl", model)
for step in range(1, 6):
    rows = data[torch.randint(len(data) - 33, (8, 1)) + torch.arange(33)]
    x, y = rows[:, :-1], rows[:, 1:]
    loss = model(x, labels=y).loss
    loss.backward()
    recorder.before_step(x, y, loss)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    recorder.after_step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.4f}")
recorder.close()

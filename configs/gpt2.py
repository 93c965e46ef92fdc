"""Settings common to all GPT-2 sizes, with 524,288 tokens a step.

Source of the shapes: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"
"""

from configs import base


def get_config():
    config = base.get_config()
    config.steps = 5_000
    config.save_every = 500
    config.eval_every = 250
    config.eval_tokens = 10_485_760  # as in modded-nanogpt and llm.c
    config.keep_every = 2_500
    config.model.update(V=50_304, norm="layer", norm_eps=1e-5, bias=True, tied=True)
    config.model.update(position="learned", positions=1_024, mlp="gelu")
    # Nothing is recomputed where the device's memory allows that; the layers are then unrolled, as
    # a scan copies what it stores. docs/speed_log.md has the bounds.
    config.model.remat = "auto"
    # Each chunk of the loss adds to a gradient as large as the head. By jaxtrain.plan's bounds at
    # 124M, scanned with remat=attention (2026-11-25, not measured), 64 MiB cost 10 % on an A40, and
    # 256 MiB 1 % on an H100.
    config.loss.chunk_bytes = 512 << 20
    config.data.update(batch=512, seq_len=1_024, tokenizer="gpt2")
    config.optim.update(learning_rate=0.02, adam_learning_rate=6e-4, weight_decay=0.1)
    config.optim.update(warmup_steps=250)
    return config

"""Settings common to all GPT-2 sizes, with 524,288 tokens a step.

Source: of the shapes, Radford et al. 2019
"""

from configs import base


def get_config():
    config = base.get_config()
    config.steps = 5_000
    config.save_every = 500
    config.eval_every = 250
    config.eval_tokens = 10_485_760  # as modded-nanogpt and llm.c validate
    config.keep_every = 2_500
    config.model.update(V=50_304, norm="layer", norm_eps=1e-5, bias=True, tied=True)
    config.model.update(position="learned", positions=1_024, mlp="gelu")
    # On GPUs storing activations costs more than recomputing them, and each chunk of the loss adds
    # to a gradient as large as the head. jaxtrain.plan's bounds for an A40 at 124M, in tokens/s:
    # 66,000 without recomputation, 87,000 with chunks of 64 MiB, 97,000 with these settings; for an
    # H100 1 % more than with 256 MiB (2026-11-25). Not measured on a card.
    config.model.remat = "attention"
    config.loss.chunk_bytes = 512 << 20
    config.data.update(batch=512, seq_len=1_024, tokenizer="gpt2")
    config.optim.update(learning_rate=0.02, adam_learning_rate=6e-4, weight_decay=0.1)
    config.optim.update(warmup_steps=250)
    return config

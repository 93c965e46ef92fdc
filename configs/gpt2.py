"""Values that all GPT-2 configs share. Shapes: Radford et al. 2019. 524,288 tokens per step."""

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
    # On GPUs it costs more to store attention's activations than to recompute them. Each chunk of
    # logits adds to a gradient of the head's size, so few large chunks are faster. For 124M on an
    # A40, jaxtrain.plan's upper bound is 97 thousand tokens/s with these values, 66 without
    # recomputation, and 87 with chunks of 64 MiB; on an H100 it is 1 % above that with chunks of
    # 256 MiB (2026-11-25). Not measured on a GPU.
    config.model.remat = "attention"
    config.loss.chunk_bytes = 512 << 20
    config.data.update(batch=512, seq_len=1_024, tokenizer="gpt2")
    config.optim.update(learning_rate=0.02, adam_learning_rate=6e-4, weight_decay=0.1)
    config.optim.update(warmup_steps=250)
    return config

"""What the GPT-2 family shares. Shapes: Radford et al. 2019; recipe: 524,288 tokens a step."""

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
    config.data.update(batch=512, seq_len=1_024)
    config.optim.update(learning_rate=0.02, adam_learning_rate=6e-4, weight_decay=0.1)
    config.optim.update(warmup_steps=250)
    return config

r"""Track 3 of modded-nanogpt, its tuned Muon baseline: 162,354,816 parameters, target 3.28.

    python data/cached_fineweb10B.py 18
    jaxtrain train gpt_track3

The first command is modded-nanogpt's; it downloads data/fineweb10B. docs/study.md lists what
equals the benchmark and what differs.

Source: Jordan et al., https://github.com/KellerJordan/modded-nanogpt, result 36 of
    records/track_3_optimization/README.md
"""

from configs import base

TOKENS = 512 * 1_024  # of a step


def get_config():
    config = base.get_config()
    config.workdir = "runs/gpt_track3"
    config.steps = 3_250
    config.save_every = 1_000
    config.keep_last = 1
    config.eval_every = 125
    config.eval_tokens = 20 * TOKENS

    model = config.model
    model.update(L=12, D=768, H=6, G=6, K=128, F=3_072, V=50_304)
    model.update(norm_eps=2.0**-23, embed_norm=True, qk_norm=True, qk_norm_gain=False)
    # The 32 rotating pairs of a head turn by 1024^(-i/31) radians a token.
    model.update(rope_fraction=0.5, rope_theta=1_024.0 ** (32 / 31), attention_scale=0.12)
    model.update(mlp="relu2", bias=True, head_bias=True)
    model.update(logit_softcap=15.0, logit_softcap_form="sqrt")
    std = (0.33 / 768) ** 0.5
    model.init_std = f"embed=1,q={std},k={std},v={std},o=0,up={std},down=0,head=0"

    config.data.update(shards="data/fineweb10B", tokenizer="gpt2", batch=512, seq_len=1_024)
    config.accumulation = 8  # for one GPU
    config.loss.chunk_bytes = 512 << 20

    optim = config.optim
    optim.update(name="muon", learning_rate=0.025, momentum=0.95, weight_decay=0.05)
    optim.update(ns_coefficients="convergent", ns_form="standard", clip_norm=0.0)
    optim.update(embedding_learning_rate=0.7, head_learning_rate=0.004)
    optim.update(vector_learning_rate=0.015, adam_weight_decay=0.001)
    # The benchmark adds 1e-10 to roots of gradients that are summed over the tokens of a step.
    optim.update(adam_b1=0.8, adam_b2=0.95, adam_eps=1e-10 / TOKENS)
    optim.decay_groups = "matrices,embedding,head,vectors"
    optim.update(schedule="wsd", warmup_steps=0, decay_fraction=0.7)
    config.sample.tokens = 0
    return config

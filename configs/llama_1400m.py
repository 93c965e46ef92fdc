r"""Llama with GQA 16:4: 1,378,461,696 parameters, vocabulary padded to 50304.

    jaxtrain train llama_1400m --data.shards=DIR

One step on a CPU, which needs 20 GiB:

    jaxtrain train llama_1400m --steps=1 \
        --accumulation=1 --data.batch=1 --data.seq_len=64 \
        --data.text=README.md
"""

from configs import llama


def get_config():
    config = llama.get_config()
    config.workdir = "runs/llama_1400m"
    config.model.update(L=26, D=2_048, H=16, G=4, K=128, F=5_632, V=50_304)
    config.data.update(batch=256, seq_len=2_048, tokenizer="gpt2")
    # On an A40, with attention's results stored, 8 parts would need 39.0 GiB, not 30.2, and XLA
    # would recompute more to fit. On an H100 nothing need be recomputed in 32 parts.
    config.accumulation = 16
    return config

"""The shapes of bench's contests."""

from typing import NamedTuple


class Sizes(NamedTuple):
    """The shapes of all contests; by default those that the shipped models need.

    They are gpt_124m, which most measurements are of, and then in the order of D: llama_135m,
    gpt_350m, gpt_774m, gpt_1558m and llama_1400m. The GPT models share a shape of attention, whose
    speed does not depend on the number of heads.
    """

    attention: tuple = (  # B, T, H, G, K
        (8, 1_024, 12, 12, 64),
        (4, 2_048, 16, 4, 128),
        (8, 2_048, 9, 3, 64),
    )
    documents: tuple = attention  # attention masked between documents
    # Attention of no shipped model: its shape, and its windows (0: none).
    longer: tuple = (((2, 4_096, 16, 4, 128), (0, 1_024)),)
    norm: tuple = tuple((8_192, D) for D in (768, 576, 1_024, 1_280, 1_600, 2_048))  # N, D
    # N, D of layer norm with all biases, as gpt_124m trains it; its row is that of this D
    layer_norm: tuple = ((32_768, 768),)
    qk_rope: tuple = ((8, 1_024, 12, 64), (4, 2_048, 16, 128))  # B, T, H, K
    # N, F of the GPT models: more than an L2 cache holds, as in training
    gelu: tuple = tuple((16_384, F) for F in (3_072, 4_096, 5_120, 6_400))
    head: tuple = (  # N, D, V
        (1_024, 768, 50_304),
        (1_024, 576, 49_152),
        *((1_024, D, 50_304) for D in (1_024, 1_280, 1_600, 2_048)),
    )
    square: tuple = (  # X, M, N
        (12, 768, 768),
        (30, 576, 576),
        (24, 1_024, 1_024),
        (36, 1_280, 1_280),
        (48, 1_600, 1_600),
        (26, 2_048, 2_048),
    )


TINY = Sizes(
    ((1, 128, 2, 1, 64),),
    ((1, 128, 2, 1, 64),),
    (((1, 128, 2, 1, 64), (40,)),),
    ((64, 128),),
    ((20, 192),),
    ((2, 32, 2, 64),),
    ((32, 96),),
    ((64, 64, 256),),
    ((1, 64, 64),),
)

"""Trains small tokenizer.json files of the families that are common on the Hugging Face hub."""

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

TEXT = "Hello, world! The quick brown fox\n\n  naïve 你好 🦊\tend <|endoftext|> <s>Bad</s> [UNK]"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level(path, text=TEXT, **prefix):
    """Writes one like GPT-2's: every byte has a token."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(**{"add_prefix_space": False} | prefix)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    return _trained(tokenizer, trainer, path, text)


def clip(path, text=TEXT):
    """Writes one like CLIP's: lower case, bytes as letters, a suffix at the end of each word."""
    tokenizer = tokenizers.Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    return _trained(tokenizer, trainer, path, text)


def sentencepiece(path, text=TEXT):
    """Writes one like Llama 2's: spaces become another letter, rare characters become bytes."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    rewrite = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(rewrite)
    special = ["<unk>", "<s>", "</s>", *BYTES]
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, show_progress=False)
    return _trained(tokenizer, trainer, path, text)


def word_piece(path, text=TEXT):
    """Writes one like BERT's: lower case, no whitespace, unknown words are lost."""
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=["[UNK]", "[BOS]"], show_progress=False
    )
    return _trained(tokenizer, trainer, path, text)


def unigram(path, text=TEXT):
    """Writes one like T5's: its vocabulary contains the special tokens as if they were words."""
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300,
        special_tokens=["<unk>", "<s>", "</s>"],
        unk_token="<unk>",
        show_progress=False,
    )
    return _trained(tokenizer, trainer, path, text)


FAMILIES = {f.__name__: f for f in (byte_level, clip, sentencepiece, word_piece, unigram)}


def _trained(tokenizer, trainer, path, text):
    tokenizer.train_from_iterator([text] * 20, trainer)
    tokenizer.save(str(path))
    return str(path)


def changed(path, change):
    """Applies `change` to a copy of the file's tokenizer and returns the copy's path."""
    tokenizer = tokenizers.Tokenizer.from_file(path)
    change(tokenizer)
    tokenizer.save(path + ".changed")
    return path + ".changed"

"""Tokenizer files and special tokens of a Hugging Face folder.

transformers must read text exactly as the run did: the same ids, behind the token that starts each
document, and generation must stop where the next document would start.
"""

import json
from pathlib import Path
from typing import NamedTuple

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from jaxtrain.data.tokenizer import Tokenizer, gpt2_ranks
from jaxtrain.data.tokenizer_file import byte_letters
from jaxtrain.files import strict_json, write_atomic
from jaxtrain.interop import InteropError
from jaxtrain.interop.hf import json_of

FILE = "tokenizer.json"
HUB_FILES = ("tokenizer_config.json", "generation_config.json")
END = "<|endoftext|>"  # eot's name where the tokenizer has none of its own
PADDING = ("<|padding|>", "<|pad|>", "<pad>", "[PAD]")
# Texts whose ids are compared: code, prose, white space, numbers, scripts, emoji, controls.
SAMPLES = (
    "def main(argv=None):\n    return {'a': [1, 22, 333]}\t# it's  THE end\r\n\n\n",
    "I'll see we've 3.14159 (of 1,000,000); a@b.c  \n \n\t x        y",
    "Größe, naïve, e\u0301, Москва, 東京, हिन्दी, عربى",
    "👩‍👩‍👧 \u200b\xa0\x01\x7f",
)


class Special(NamedTuple):
    """Ids of special tokens; None and () where they are not known."""

    bos: int | None = None  # starts each document
    eos: tuple[int, ...] = ()  # each ends a text
    pad: int | None = None

    def fields(self) -> dict:
        """Returns config.json's fields."""
        eos = self.eos[0] if len(self.eos) == 1 else list(self.eos) or None
        return {"bos_token_id": self.bos, "eos_token_id": eos, "pad_token_id": self.pad}


def declared_tokens(folder) -> Special:
    """Returns the special tokens that the files of a Hugging Face folder name.

    generation_config.json comes before config.json, as in transformers; what neither names is
    taken from tokenizer_config.json.

    Raises:
        InteropError: one of the files is damaged.
    """
    folder, bos, eos, pad = Path(folder), None, [], None
    for name in ("generation_config.json", "config.json"):
        config = json_of(folder / name) if (folder / name).is_file() else {}
        bos = config.get("bos_token_id") if bos is None else bos
        pad = config.get("pad_token_id") if pad is None else pad
        listed = config.get("eos_token_id")
        eos = eos or (listed if isinstance(listed, list) else [] if listed is None else [listed])
    if (folder / FILE).is_file() and (folder / "tokenizer_config.json").is_file():
        named = json_of(folder / "tokenizer_config.json")
        ids = _vocabulary(folder / FILE)
        known = {
            key: ids.get(value["content"] if isinstance(value, dict) else value)
            for key, value in named.items()
            if key in ("bos_token", "eos_token", "pad_token") and value
        }
        bos = known.get("bos_token") if bos is None else bos
        pad = known.get("pad_token") if pad is None else pad
        eos = eos or [known[key] for key in ("eos_token",) if known.get(key) is not None]
    return Special(bos, tuple(eos), pad)


def special_tokens(tokenizer: Tokenizer | None, data_eot=-1, homes=()) -> Special:
    """Returns the special tokens of a run.

    Args:
        tokenizer: of the run's text; None where it is not known.
        data_eot: data.eot, the token that starts documents in the run's shards; -1 is not set.
        homes: folders that the tokenizer or the weights came from; where one holds this tokenizer,
            the ends of text that it names count too, before our own.

    Raises:
        InteropError: a file of such a folder is damaged.
    """
    eot = [] if data_eot < 0 else [data_eot]
    if tokenizer is None:
        return Special(eot[0], tuple(eot)) if eot else Special()
    eos, pad, path = [tokenizer.eot, *eot], None, Path(tokenizer.name)
    if path.is_file():
        ids = _vocabulary(path)
        pad = next((ids[name] for name in PADDING if name in ids), None)
        for home in dict.fromkeys((path.parent, *homes)):
            hub = any((home / name).is_file() for name in HUB_FILES)
            if hub and (home / FILE).is_file() and _vocabulary(home / FILE) == ids:
                declared = [token for token in declared_tokens(home).eos if token in ids.values()]
                eos = declared + eos
    return Special(tokenizer.eot, tuple(dict.fromkeys(eos)), pad)


def build_tokenizer_json(tokenizer: Tokenizer) -> dict:
    """Returns a tokenizer.json that reads text as the run's tokenizer does, behind its eot.

    Raises:
        InteropError: the run's own tokenizer.json is damaged.
    """
    if tokenizer.name == "bytes":
        letters = byte_letters()
        # Byte 0 is eot and stands in no text, so that its name takes the place of its letter.
        vocabulary = {letter: byte for letter, byte in letters.items() if byte} | {END: 0}
        data = _byte_level(vocabulary, [], use_regex=False)
    elif tokenizer.name == "gpt2":
        letter_of = {byte: letter for letter, byte in byte_letters().items()}
        ranks = gpt2_ranks()
        spell = lambda token: "".join(letter_of[byte] for byte in token)
        merges = [(spell(a), spell(b)) for a, b in _merges(ranks)]
        vocabulary = {spell(token): rank for token, rank in ranks.items()}
        data = _byte_level(vocabulary | {END: tokenizer.eot}, merges, use_regex=True)
    else:
        data = json_of(Path(tokenizer.name)) | {"truncation": None, "padding": None}
    return _behind_eot(data, tokenizer)


def _byte_level(vocabulary, merges, use_regex) -> dict:
    """tokenizer.json of byte-pair encoding over UTF-8 bytes, with END as its special token."""
    built = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens([AddedToken(END, special=True, normalized=False)])
    return json.loads(built.to_str())


def _merges(ranks):
    """Yields the pair that makes each token: the two parts that the merges before it leave."""
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            joined = [ranks.get(a + b, rank) for a, b in zip(parts, parts[1:], strict=False)]
            best = min(range(len(joined)), key=joined.__getitem__)
            assert joined[best] < rank, f"no merges make {token!r}"
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        if len(parts) == 2:
            yield tuple(parts)


def _behind_eot(data, tokenizer) -> dict:
    """tokenizer.json whose special tokens are one eot at the start, as in training."""
    loaded = _load(data)
    name = loaded.id_to_token(tokenizer.eot)
    plain = loaded.encode(SAMPLES[0], add_special_tokens=False).ids
    if loaded.encode(SAMPLES[0]).ids == [tokenizer.eot, *plain]:
        return data
    piece = {"SpecialToken": {"id": name, "type_id": 0}}
    text = [{"Sequence": {"id": letter, "type_id": 0}} for letter in "AB"]
    template = {
        "type": "TemplateProcessing",
        "single": [piece, text[0]],
        "pair": [piece, text[0], piece, text[1]],
        "special_tokens": {name: {"id": name, "ids": [tokenizer.eot], "tokens": [name]}},
    }
    own = data.get("post_processor") or {}
    if own.get("type") == "ByteLevel":  # adds no token; trims the offsets of words
        template = {"type": "Sequence", "processors": [own, template]}
    return data | {"post_processor": template}


def write_tokenizer(folder, tokenizer: Tokenizer, special: Special, longest: int) -> None:
    """Writes tokenizer.json and tokenizer_config.json, and reads text through them.

    Args:
        longest: tokens of a text that the model was made for.

    Raises:
        InteropError: what was written gives other ids than the run's tokenizer.
    """
    folder, data = Path(folder), build_tokenizer_json(tokenizer)
    loaded = _load(data)
    names = {
        "bos_token": loaded.id_to_token(tokenizer.eot),
        "eos_token": loaded.id_to_token(special.eos[0]),
        "pad_token": loaded.id_to_token(special.eos[0] if special.pad is None else special.pad),
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # tokenizer.json as it stands
        **names,
        "model_max_length": longest,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }
    write_atomic(folder / FILE, json.dumps(data, ensure_ascii=False, indent=1) + "\n")
    write_atomic(folder / "tokenizer_config.json", strict_json(config, indent=2) + "\n")
    _check(tokenizers.Tokenizer.from_file(str(folder / FILE)), tokenizer)


def _check(loaded, tokenizer) -> None:
    way_out = "Set --tokenizer=none to export without one."
    for sample in SAMPLES:
        ours, theirs = tokenizer.encode(sample).tolist(), loaded.encode(sample).ids
        if theirs != [tokenizer.eot, *ours]:
            raise InteropError(
                f"the exported tokenizer.json must give the ids of the run's tokenizer "
                f"{tokenizer.name}; got {theirs}, not {[tokenizer.eot, *ours]}, of {sample!r}. "
                f"{way_out}"
            )
        text, expected = loaded.decode(ours, skip_special_tokens=False), tokenizer.decode(ours)
        if text != expected:
            raise InteropError(
                f"the exported tokenizer.json must decode as the run's tokenizer {tokenizer.name}; "
                f"got {text!r}, not {expected!r}. {way_out}"
            )


def write_generation_config(folder, special: Special, tokenizer: Tokenizer | None, V: int) -> None:
    """Writes generation_config.json: where a text ends, and the ids that stand for no token.

    Args:
        V: rows of the vocabulary, with the padding that no tokenizer makes and no sample may hold.
    """
    config = special.fields()
    if config["pad_token_id"] is None and special.eos:
        config["pad_token_id"] = special.eos[0]
    if tokenizer is not None and tokenizer.vocab_size < V:
        config["suppress_tokens"] = list(range(tokenizer.vocab_size, V))
    text = strict_json(config, indent=None) + "\n"
    write_atomic(Path(folder) / "generation_config.json", text)


def _load(data) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(json.dumps(data, ensure_ascii=False))


def _vocabulary(path) -> dict[str, int]:
    try:
        loaded = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise InteropError(f"{path} must be a readable tokenizer.json; got {error}.") from None
    return loaded.get_vocab(with_added_tokens=True)

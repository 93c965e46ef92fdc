"""Writes the tokenizer files and special tokens of a Hugging Face folder.

transformers must encode text exactly as the run did: the same ids, after the token that starts each
document. Generation must stop where the next document would start.
"""

import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from jaxtrain.data.tokenizer import Tokenizer, gpt2_ranks
from jaxtrain.data.tokenizer_file import byte_letters
from jaxtrain.files import strict_json, write_atomic
from jaxtrain.interop import InteropError
from jaxtrain.interop.hf_files import read_json_object

FILE = "tokenizer.json"
HUB_FILES = ("tokenizer_config.json", "generation_config.json")
END = "<|endoftext|>"  # name of the end-of-text token if the tokenizer does not name it
PADDING = ("<|padding|>", "<|pad|>", "<pad>", "[PAD]")
# Texts whose ids are compared: code, prose, whitespace, numbers, scripts, emoji, controls.
SAMPLES = (
    "def main(argv=None):\n    return {'a': [1, 22, 333]}\t# it's  THE end\r\n\n\n",
    "I'll see we've 3.14159 (of 1,000,000); a@b.c  \n \n\t x        y",
    "Größe, naïve, e\u0301, Москва, 東京, हिन्दी, عربى",
    "👩‍👩‍👧 \u200b\xa0\x01\x7f",
)


class SpecialTokens(NamedTuple):
    """Ids of special tokens; None and () if they are not known."""

    bos: int | None = None  # starts each document
    eos: tuple[int, ...] = ()  # each ends a text
    pad: int | None = None

    def fields(self) -> dict[str, Any]:
        """Returns the fields of config.json."""
        eos = self.eos[0] if len(self.eos) == 1 else list(self.eos) or None
        return {"bos_token_id": self.bos, "eos_token_id": eos, "pad_token_id": self.pad}


def declared_tokens(folder: Path | str) -> SpecialTokens:
    """Returns the special tokens that the files of a Hugging Face folder name.

    generation_config.json overrides config.json, as in transformers; tokens that neither names are
    taken from tokenizer_config.json.

    Raises:
        InteropError: one of the files is damaged.
    """
    folder, bos, eos, pad = Path(folder), None, [], None
    for name in ("generation_config.json", "config.json"):
        config = read_json_object(folder / name) if (folder / name).is_file() else {}
        bos = config.get("bos_token_id") if bos is None else bos
        pad = config.get("pad_token_id") if pad is None else pad
        listed = config.get("eos_token_id")
        eos = eos or (listed if isinstance(listed, list) else [] if listed is None else [listed])
    if (folder / FILE).is_file() and (folder / "tokenizer_config.json").is_file():
        config = read_json_object(folder / "tokenizer_config.json")
        ids = _vocabulary(folder / FILE)
        known = {}
        for key in ("bos_token", "eos_token", "pad_token"):
            if value := config.get(key):
                token = value.get("content") if isinstance(value, dict) else value
                if not isinstance(token, str):
                    raise InteropError(
                        f"{folder / 'tokenizer_config.json'} must name a token in {key}; got "
                        f"{value!r}."
                    )
                known[key] = ids.get(token)
        bos = known.get("bos_token") if bos is None else bos
        pad = known.get("pad_token") if pad is None else pad
        eos = eos or [known[key] for key in ("eos_token",) if known.get(key) is not None]
    return SpecialTokens(bos, tuple(eos), pad)


def special_tokens(
    tokenizer: Tokenizer | None, data_eot: int = -1, source_folders: Sequence[Path] = ()
) -> SpecialTokens:
    """Returns the special tokens of a run.

    Args:
        tokenizer: of the run's text; None if it is not known.
        data_eot: data.eot, the token that starts documents in the run's shards; -1 if unset.
        source_folders: where the tokenizer or the weights came from. If one contains this same
            tokenizer, the ends of text that it declares come before our own.

    Raises:
        InteropError: a file of such a folder is damaged.
    """
    eot = [] if data_eot < 0 else [data_eot]
    if tokenizer is None:
        return SpecialTokens(eot[0], tuple(eot)) if eot else SpecialTokens()
    eos, pad, path = [tokenizer.eot, *eot], None, Path(tokenizer.name)
    if path.is_file():
        ids = _vocabulary(path)
        pad = next((ids[name] for name in PADDING if name in ids), None)
        for folder in dict.fromkeys((path.parent, *source_folders)):
            is_hub_folder = any((folder / name).is_file() for name in HUB_FILES)
            own = folder / FILE
            if is_hub_folder and own.is_file() and _vocabulary(own) == ids:
                declared = [id for id in declared_tokens(folder).eos if id in ids.values()]
                eos = declared + eos
    return SpecialTokens(tokenizer.eot, tuple(dict.fromkeys(eos)), pad)


def build_tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns a tokenizer.json that encodes text as the run does: its eot, then the text's ids.

    Raises:
        InteropError: the run's own tokenizer.json is damaged.
    """
    if tokenizer.name == "bytes":
        letters = byte_letters()
        # Byte 0 is eot and never occurs in text, so eot's name replaces the letter of byte 0.
        vocabulary = {letter: byte for letter, byte in letters.items() if byte} | {END: 0}
        data = _byte_level(vocabulary, [], use_regex=False)
    elif tokenizer.name == "gpt2":
        vocabulary, merges = _gpt2_pieces()
        data = _byte_level(vocabulary | {END: tokenizer.eot}, merges, use_regex=True)
    else:
        data = read_json_object(Path(tokenizer.name)) | {"truncation": None, "padding": None}
    return _with_leading_eot(data, tokenizer)


@functools.cache  # takes 4 s
def _gpt2_pieces() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Returns GPT-2's vocabulary and merges, in the letters of byte-level BPE."""
    letter_of = {byte: letter for letter, byte in byte_letters().items()}
    ranks = gpt2_ranks()
    to_letters = lambda token: "".join(letter_of[byte] for byte in token)
    merges = [(to_letters(a), to_letters(b)) for a, b in _merges(ranks)]
    return {to_letters(token): rank for token, rank in ranks.items()}, merges


def _byte_level(vocabulary: dict[str, int], merges: list, use_regex: bool) -> dict[str, Any]:
    """Returns a tokenizer.json of byte-level BPE, with END as its special token."""
    built = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens([AddedToken(END, special=True, normalized=False)])
    return json.loads(built.to_str())


def _merges(ranks: dict[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """Yields the pair that merges into each token, in order of rank.

    tiktoken stores ranks only. Applying all merges of lower rank to a token leaves two parts.
    """
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            joined = [ranks.get(a + b, rank) for a, b in zip(parts, parts[1:], strict=False)]
            best = min(range(len(joined)), key=joined.__getitem__)
            assert joined[best] < rank, f"no merges make {token!r}"
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        if len(parts) == 2:
            yield parts[0], parts[1]


def _with_leading_eot(data: dict[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns a tokenizer.json that adds one special token, eot at the start, as in training."""
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
    if own.get("type") == "ByteLevel":  # kept: it only trims the offsets of words
        template = {"type": "Sequence", "processors": [own, template]}
    return data | {"post_processor": template}


def write_tokenizer(
    folder: Path | str, tokenizer: Tokenizer, special: SpecialTokens, longest: int
) -> None:
    """Writes tokenizer.json and tokenizer_config.json; checks that they encode as the run does.

    Args:
        longest: tokens of the longest text that the model supports.

    Raises:
        InteropError: the files give other ids than the run's tokenizer.
    """
    folder, data = Path(folder), build_tokenizer_json(tokenizer)
    loaded = _load(data)
    names = {
        "bos_token": loaded.id_to_token(tokenizer.eot),
        "eos_token": loaded.id_to_token(special.eos[0]),
        "pad_token": loaded.id_to_token(special.eos[0] if special.pad is None else special.pad),
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # uses tokenizer.json unchanged
        **names,
        "model_max_length": longest,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }
    write_atomic(folder / FILE, json.dumps(data, ensure_ascii=False, indent=1) + "\n")
    write_atomic(folder / "tokenizer_config.json", strict_json(config, indent=2) + "\n")
    _check_encoding(tokenizers.Tokenizer.from_file(str(folder / FILE)), tokenizer)


def _check_encoding(loaded: tokenizers.Tokenizer, tokenizer: Tokenizer) -> None:
    """Raises InteropError if the exported tokenizer encodes or decodes SAMPLES differently."""
    advice = "Set --tokenizer=none to export without one."
    for sample in SAMPLES:
        ids, exported_ids = tokenizer.encode(sample).tolist(), loaded.encode(sample).ids
        if exported_ids != [tokenizer.eot, *ids]:
            raise InteropError(
                f"the exported tokenizer.json must give the ids of the run's tokenizer "
                f"{tokenizer.name}; got {exported_ids}, not {[tokenizer.eot, *ids]}, for "
                f"{sample!r}. {advice}"
            )
        text, expected = loaded.decode(ids, skip_special_tokens=False), tokenizer.decode(ids)
        if text != expected:
            raise InteropError(
                f"the exported tokenizer.json must decode as the run's tokenizer {tokenizer.name}; "
                f"got {text!r}, not {expected!r}. {advice}"
            )


def write_generation_config(
    folder: Path | str, special: SpecialTokens, tokenizer: Tokenizer | None, V: int
) -> None:
    """Writes generation_config.json: which tokens end a text, and which are never generated.

    Args:
        V: the model's vocabulary; ids that only pad the tokenizer's to V are never generated.
    """
    config = special.fields()
    if config["pad_token_id"] is None and special.eos:
        config["pad_token_id"] = special.eos[0]
    if tokenizer is not None and tokenizer.vocab_size < V:
        config["suppress_tokens"] = list(range(tokenizer.vocab_size, V))
    text = strict_json(config, indent=None) + "\n"
    write_atomic(Path(folder) / "generation_config.json", text)


def _load(data: dict[str, Any]) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(json.dumps(data, ensure_ascii=False))


def _vocabulary(path: Path) -> dict[str, int]:
    """Returns {token: id} of a tokenizer.json, special tokens included."""
    try:
        loaded = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise InteropError(f"{path} must be a readable tokenizer.json; got {error}.") from None
    return loaded.get_vocab(with_added_tokens=True)

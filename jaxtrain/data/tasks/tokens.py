"""Turns the examples of tasks into tokens, or reads them as tokens from llm.c's files."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxtrain.data.tasks.examples import Example
from jaxtrain.data.tokenizer import Tokenizer

LLMC_MAGIC, LLMC_VERSION, LLMC_HEADER = 20240522, 1, 256  # header: int32, of which 3 are used
LLMC_START = 65_535  # precedes each example
GPT2_ENTRIES, GPT2_START = 50_257, 50_256  # vocabulary, and the token that starts documents


class TokenExample(NamedTuple):
    """One example as tokens.

    Attributes:
        context: [C] int32; the first choice's tokens follow its last one.
        choices: [tokens] int32 each.
        answer: index of the right choice.
        sizes: what each choice's nats are divided by for the normalised accuracy.
        answer_bytes: of text that the right choice's tokens stand for; 0 if that is unknown.
    """

    context: np.ndarray
    choices: tuple[np.ndarray, ...]
    answer: int
    sizes: tuple[int, ...]
    answer_bytes: int


class Piece(NamedTuple):
    """Tokens for the model to read, and how many of the last ones are scored."""

    tokens: np.ndarray  # [n] int32, n at most the context length + 1
    scored: int


def encode_pair(tokenizer: Tokenizer, context: str, text: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the tokens of a context and of its continuation, int32 each.

    Both are encoded together, because a token may contain the last character of a word and what
    follows. As in lm_eval, spaces at the end of the context belong to the continuation, and the
    continuation's tokens are those after as many as the context has by itself.
    """
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, text = context[:-spaces], context[-spaces:] + text
    ids = np.asarray(tokenizer.encode(context), np.int32)
    both = np.asarray(tokenizer.encode(context + text), np.int32)
    if len(both) <= len(ids):  # merged with the context: nothing would be left to score
        return ids, np.asarray(tokenizer.encode(text), np.int32)
    return both[: len(ids)], both[len(ids) :]


def encode_example(example: Example, tokenizer: Tokenizer, start_token: bool) -> TokenExample:
    """Returns an example as tokens.

    Args:
        start_token: whether the token that starts documents precedes the context; it does in any
            case if there is no context, because the first token could not be scored otherwise.
    """
    pairs = [encode_pair(tokenizer, example.context, choice) for choice in example.choices]
    context = pairs[0][0]
    if start_token or not len(context):
        context = np.append(np.int32(tokenizer.eot), context)
    return TokenExample(
        context.astype(np.int32),
        tuple(ids for _, ids in pairs),
        example.answer,
        # As lm_eval's acc_bytes: bytes of the choice without the space before it.
        tuple(len(choice.removeprefix(" ").encode()) or 1 for choice in example.choices),
        len(example.choices[example.answer].encode()),
    )


def read_llmc(path: Path) -> list[TokenExample]:
    """Returns the examples of a file that llm.c's dev/data/hellaswag.py writes.

    They have no text, so `sizes` are counts of tokens, as llm.c normalises by.
    Source: https://github.com/karpathy/llm.c/blob/master/dev/data/data_common.py, write_evalfile

    Raises:
        ValueError: the file is cut off or damaged; the error names the example.
    """
    data = path.read_bytes()
    header = np.frombuffer(data[: 4 * LLMC_HEADER], "<i4")
    if len(header) < LLMC_HEADER or tuple(header[:2]) != (LLMC_MAGIC, LLMC_VERSION):
        raise ValueError(
            f"{path} must start with llm.c's header of evaluation files, {LLMC_MAGIC} "
            f"{LLMC_VERSION}; got {' '.join(map(str, header[:2]))}. Set --eval.tasks."
        )
    body = data[4 * LLMC_HEADER :]
    stream, examples, at = np.frombuffer(body[: len(body) // 2 * 2], "<u2"), [], 0
    for number in range(int(header[2])):
        stop = at + int(stream[at + 1]) // 2 if at + 1 < len(stream) else len(stream) + 1
        fields = stream[at:stop].astype(np.int32)
        if stop > len(stream):
            raise _llmc_error(path, number, f"the file ends before it; it has {len(data)} bytes")
        if len(fields) < 6 or fields[0] != LLMC_START or fields[2] != number:
            raise _llmc_error(path, number, f"its first numbers are {fields[:3].tolist()}")
        examples.append(_parse_llmc(path, number, fields))
        at = stop
    if not examples or at * 2 != len(body):
        raise ValueError(
            f"{path} must contain as many examples as its header says; got {header[2]} and "
            f"{len(body) - 2 * at} bytes after them. Set --eval.tasks."
        )
    return examples


def _parse_llmc(path: Path, number: int, fields: np.ndarray) -> TokenExample:
    answer, count = int(fields[3]), int(fields[4])
    sequences, at = [], 5
    while at < len(fields):
        stop = at + 1 + int(fields[at])
        sequences.append(fields[at + 1 : stop])
        at = stop
    whole = at == len(fields) and len(sequences) == count + 1
    if not whole or not all(map(len, sequences)) or not answer < count:
        raise _llmc_error(path, number, f"its label is {answer} of {count} completions")
    context, *choices = sequences
    return TokenExample(context, tuple(choices), answer, tuple(map(len, choices)), 0)


def _llmc_error(path: Path, number: int, reason: str) -> ValueError:
    return ValueError(f"{path}, example {number}, must be one of llm.c's: {reason}.")


def add_bytes(example: TokenExample, token_bytes: np.ndarray) -> TokenExample:
    """Returns an example with the bytes that the right choice's tokens stand for."""
    return example._replace(answer_bytes=int(token_bytes[example.choices[example.answer]].sum()))


def cut_pieces(context: np.ndarray, choice: np.ndarray, context_length: int) -> Iterator[Piece]:
    """Yields the pieces to score so that each token of a choice is scored once.

    There is one, except where the choice is longer than the model's context. As in lm_eval, what
    does not fit is cut off on the left.

    Args:
        context_length: tokens that the model reads at most; one more is predicted.
    """
    tokens = np.concatenate([context, choice]).astype(np.int32)
    end, left = len(tokens), len(choice)
    while left:
        scored = min(left, context_length)
        yield Piece(tokens[max(0, end - context_length - 1) : end], scored)
        end, left = end - scored, left - scored

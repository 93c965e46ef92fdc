"""A run's model as functions of texts: likelihoods of continuations, and continuations."""

from collections.abc import Sequence

import jax
import numpy as np

from jaxtrain.data.tasks.tokens import Piece, cut_pieces, encode_pair
from jaxtrain.data.tokenizer import Tokenizer
from jaxtrain.optim.acceleration import eval_params
from jaxtrain.training.run import Run
from jaxtrain.training.sampling import draw_tokens
from jaxtrain.training.scoring import Scorer
from jaxtrain.training.step import TrainState


class TextModel:
    """Scores and continues texts with the weights that evaluation uses.

    Texts are encoded and cut as lm_eval does with Hugging Face's models.

    Args:
        run, state: from restore_run.
        tokenizer: the run's.
        start_token: whether the token that starts documents precedes each text; it does in any
            case where there is no context.

    Attributes:
        context_length: tokens that the model reads at most.
    """

    def __init__(self, run: Run, state: TrainState, tokenizer: Tokenizer, start_token=False):
        self.tokenizer, self._start_token = tokenizer, start_token
        self._params = eval_params(state.opt_state, state.params)
        self._scorer, self._model = Scorer(run), run.model
        self.context_length = self._scorer.context_length
        # Prompts are read in parts whose lengths are powers of two: with parts of any length, each
        # length of a prompt would compile a program.
        self._extend = jax.jit(self._read_part)

    def _start(self, ids: np.ndarray) -> np.ndarray:
        if self._start_token or not len(ids):
            ids = np.append(self.tokenizer.eot, ids)
        return ids.astype(np.int32)

    def log_likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Returns, for each (context, continuation), its log-likelihood and whether it is greedy.

        The log-likelihood is in nats. A continuation is greedy if each token is the likeliest one.
        """
        pieces, owners = [], []
        for i, (context, continuation) in enumerate(pairs):
            ids, scored = encode_pair(self.tokenizer, context, continuation)
            own = list(cut_pieces(self._start(ids), scored, self.context_length))
            pieces, owners = pieces + own, owners + [i] * len(own)
        nats, greedy = self._score(pieces, owners, len(pairs))
        return [(-n, bool(g)) for n, g in zip(nats.tolist(), greedy, strict=True)]

    def rolling_log_likelihoods(self, texts: Sequence[str]) -> list[float]:
        """Returns the log-likelihood of each whole text in nats.

        A long text is scored in windows that do not overlap; only the last one has more context.
        """
        pieces, owners, T = [], [], self.context_length
        for i, text in enumerate(texts):
            tokens = np.append(self.tokenizer.eot, self.tokenizer.encode(text)).astype(np.int32)
            for start in range(0, len(tokens) - 1, T):
                end = min(start + T, len(tokens) - 1)
                pieces.append(Piece(tokens[max(0, end - T) : end + 1], end - start))
                owners.append(i)
        return (-self._score(pieces, owners, len(texts))[0]).tolist()

    def _score(self, pieces: list[Piece], owners: list[int], texts: int):
        """Returns the nats of each text, [texts] float64, and whether all pieces are greedy."""
        scored = self._scorer.score(self._params, pieces)
        assert scored is not None  # None only after a signal; none is listened for
        nats, greedy = np.zeros(texts), np.ones(texts, bool)
        np.add.at(nats, owners, scored[0])
        np.logical_and.at(greedy, owners, scored[1])
        return nats, greedy

    def generate(
        self,
        context: str,
        until: Sequence[str] = (),
        max_tokens: int = 256,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> str:
        """Returns a continuation, up to the first of `until` or to the end of the document.

        Context and continuation together have at most context_length tokens; the start of a longer
        context is cut off.
        """
        max_tokens = min(max_tokens, self.context_length - 1)
        ids = self._start(np.asarray(self.tokenizer.encode(context)))
        ids = ids[-(self.context_length - max_tokens) :]
        cache, at, logits_BV = self._model.init_cache(1, self.context_length), 0, None
        while at < len(ids):
            size = 1 << ((len(ids) - at).bit_length() - 1)
            logits_BV, cache = self._extend(self._params, cache, ids[None, at : at + size], at)
            at += size
        assert logits_BV is not None, "there is at least the start token"
        keys, drawn, text = jax.random.split(jax.random.key(seed), max_tokens), [], ""
        for key in keys:
            logits_BV = logits_BV[:, : self.tokenizer.vocab_size]
            token = int(draw_tokens(logits_BV, key, temperature, 0)[0])
            if token == self.tokenizer.eot:
                break
            drawn.append(token)
            text = self.tokenizer.decode(drawn)
            if stops := [text.index(stop) for stop in until if stop and stop in text]:
                return text[: min(stops)]
            if len(drawn) < max_tokens:
                part = np.full((1, 1), token, np.int32)
                logits_BV, cache = self._extend(self._params, cache, part, at)
                at += 1
        return text

    def _read_part(self, params, cache, tokens_BT, start):
        """Returns (logits of the last token [B,V], cache with these tokens)."""
        h_BTD, cache = self._model.extend(params, cache, tokens_BT, start)
        return self._model.logits(params, h_BTD[:, -1:])[:, 0], cache

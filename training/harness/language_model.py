"""A checkpoint as a model of lm_eval, EleutherAI's lm-evaluation-harness."""

from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from configs.errors import InputError
from data_pipeline.tokenizer import Tokenizer
from training.evaluation.progress import EvaluationProgress
from training.harness.scoring import PairScore, PairScorer, TokenPair, score_pairs
from training.harness.stopping_text import continue_until, task_sampling

NEW_TOKENS = 256  # where a task does not say: what the harness's own models take


class CheckpointLM(TemplateLM):
    """Answers the harness's requests with a checkpoint's model.

    Token ids of context and continuation are those of the harness's own `hf` model (`TemplateLM`). A text starts after
    the end-of-document token, as documents do in training.

    Attributes:
        max_length: Inputs of the model at most.
        cut: Requests so far that lost the beginning of their context.
    """

    def __init__(self, model: PairScorer, tokenizer: Tokenizer, *, max_length: int, seed: int) -> None:
        """Wrap a model.

        Args:
            model: The model.
            tokenizer: Its tokenizer.
            max_length: Inputs of the model at most.
            seed: Seed of the first text that is drawn; each has its own.
        """
        super().__init__()
        self._model, self._tokens_of, self._seed = model, tokenizer, seed
        self.max_length, self.cut = max_length, 0

    @property
    def eot_token_id(self) -> int:
        """Return the token that ends a document and stands before the first one."""
        return self._tokens_of.end_of_document

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """Return the token ids of a text, with nothing added."""
        return self._tokens_of.encode(string)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Return log-likelihood of each continuation, and whether greedy decoding would give it."""
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return answers

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **_: object
    ) -> list[tuple[float, bool]]:
        start = [self.eot_token_id]  # of a context that was nothing but spaces
        pairs = [TokenPair(tuple(context or start), tuple(continuation)) for _, context, continuation in requests]
        self.cut += sum(len(pair.context) + len(pair.continuation) > self.max_length + 1 for pair in pairs)
        return [(score.log_likelihood, score.is_greedy) for score in self._scores(pairs, "continuations")]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Return the log-likelihood of each text: windows of `max_length` that do not overlap, but for the last one."""
        windows: list[TokenPair] = []
        counts: list[int] = []
        for request in requests:
            pairs = [
                make_disjoint_window(window)
                for window in get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
            ]
            windows += [TokenPair(tuple(context), tuple(predicted)) for context, predicted in pairs]
            counts.append(len(pairs))
        scores = iter(self._scores(windows, "windows of text"))
        return [sum(next(scores).log_likelihood for _ in range(count)) for count in counts]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Return the text that follows each context, up to a stop string."""
        asked = [
            (request.args[0], normalize_gen_kwargs(request.args[1], default_max_gen_toks=NEW_TOKENS))
            for request in requests
        ]
        texts = []
        with EvaluationProgress(inputs=len(asked), measurements=1) as progress:
            progress.begin(f"{len(asked):,} texts")
            for number, (context, settings) in enumerate(asked):
                texts.append(self._text(context, dict(settings), number=number))
                progress.advance(1)
            progress.finish("generated")
        return texts

    def _text(self, context: str, settings: dict[str, Any], *, number: int) -> str:
        tokens, stop = int(settings.pop("max_gen_toks")), settings.pop("until")
        room = self.max_length - tokens
        if room < 1:
            raise InputError(
                f"a task generates up to {tokens} tokens, which leave no room for its prompt in {self.max_length}: use "
                f"--max-length {4 * tokens}"
            )
        ids = self.tok_encode(context) or [self.eot_token_id]
        self.cut += len(ids) > room
        sampling = task_sampling(settings, seed=self._seed).of_prompt(number)
        return continue_until(self._model, self._tokens_of, ids[-room:], sampling=sampling, tokens=tokens, stop=stop)

    def _scores(self, pairs: Sequence[TokenPair], kind: str) -> list[PairScore]:
        total = sum(min(len(pair.context) + len(pair.continuation), self.max_length + 1) for pair in pairs)
        with EvaluationProgress(inputs=total, measurements=1) as progress:
            progress.begin(f"{len(pairs):,} {kind}")
            scores = score_pairs(self._model, pairs, max_length=self.max_length, progress=progress.advance)
            progress.finish("scored")
        return scores

"""POST /v1/completions: several prompts, echo, fill in the middle, the best of several choices."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from osmium.engine.engine import Engine
from osmium.engine.request import Event, Finish, SamplingParams, Token, check_prompt
from osmium.errors import RequestError
from osmium.server.choices import Choices
from osmium.server.fields import unknown_fields
from osmium.server.limits import MAX_PROMPT_IDS, check_scores
from osmium.server.logprobs import echoed_logprobs
from osmium.server.prepare import Prepared, encode_prompt, prepare_runs, stream_options
from osmium.server.response_writer import Handle, StreamEvent, stream_event
from osmium.server.schema import CompletionRequest, parse, prompts, sampling_params
from osmium.text.tokenizer import Tokenizer

__all__ = ["CompletionWriter", "prepare_completion"]

FIM_PREFIX, FIM_SUFFIX, FIM_MIDDLE = "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"
"""Tokens before the text, before the suffix and before the response, as in Qwen's tokenizers."""

FIM_ENDS = (FIM_PREFIX, FIM_SUFFIX, FIM_MIDDLE, "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>")
"""Tokens that end a response which fills a gap: another file or gap begins."""


def prepare_completion(engine: Engine, name: str, raw: bytearray) -> Prepared:
    """Prepare a body of /v1/completions.  Raises: RequestError, for any of its prompts."""
    body = parse(raw, CompletionRequest, max_ids=MAX_PROMPT_IDS)
    ignored = unknown_fields(raw, CompletionRequest.__struct_fields__)
    params = sampling_params(body, engine.defaults)
    each = prompts(body)
    encoded: list[list[int]] = []
    for i, prompt in enumerate(each):
        try:
            ids = _ids(engine, prompt, body.suffix, params)
            check_prompt(ids, params, engine.config.vocab_size, engine.context)
        except RequestError as error:
            raise _named(error, i if len(each) > 1 else None) from None
        encoded.append(ids)
    choices, best = body.best_of or body.n or 1, body.n or 1
    shown = params.logprobs if body.echo else None
    shares = [one for one in (shown, params.prompt_logprobs) if one is not None]
    scored = max(shares, default=None)
    if scored is not None:
        check_scores(sum(map(len, encoded)) * choices, scored)
    run_params = replace(params, prompt_logprobs=scored)
    if choices > best and params.logprobs is None:
        run_params = replace(run_params, logprobs=0)
    if body.suffix:
        run_params = replace(run_params, stop_token_ids=_fim_ends(engine, params))
    texts = [_text(engine, prompt) for prompt in each] if body.echo else None
    writer = CompletionWriter(
        name, engine.tokenizer, texts=texts, logprobs=params.logprobs, best=best,
        num_prompts=len(each), num_prompt_logprobs=params.prompt_logprobs,
        **{**stream_options(body), "count": choices},
    )  # fmt: skip
    return prepare_runs(engine, body, encoded, run_params, writer, ignored, choices)


def _ids(
    engine: Engine, prompt: str | list[int], suffix: str | None, params: SamplingParams
) -> list[int]:
    """A prompt's token ids; with a suffix, those that fill in the middle.  Raises: RequestError."""
    if engine.tokenizer is None:
        if isinstance(prompt, str):
            raise RequestError(f"{engine.name} has no tokenizer; send token ids.", param="prompt")
        if suffix:
            raise _no_suffix(engine, "it has no tokenizer")
        return prompt
    ids = prompt if isinstance(prompt, list) else encode_prompt(engine, prompt, params)
    if not suffix:
        return ids
    before, behind, middle = (
        _fim_token(engine, text) for text in (FIM_PREFIX, FIM_SUFFIX, FIM_MIDDLE)
    )
    return [before, *ids, behind, *encode_prompt(engine, suffix, params), middle]


def _fim_token(engine: Engine, text: str) -> int:
    token: int | None = engine.tokenizer.id_of(text)
    if token is None:
        raise _no_suffix(engine, f"its tokenizer has no {text}")
    return token


def _no_suffix(engine: Engine, reason: str) -> RequestError:
    return RequestError(
        f"suffix is not supported by {engine.name}: {reason}. Omit it.",
        param="suffix",
        code="unsupported_value",
    )


def _fim_ends(engine: Engine, params: SamplingParams) -> tuple[int, ...]:
    ends = [token for text in FIM_ENDS if (token := engine.tokenizer.id_of(text)) is not None]
    return (*params.stop_token_ids, *ends)


def _text(engine: Engine, prompt: str | list[int]) -> str:
    """A prompt's text."""
    if isinstance(prompt, str):
        return prompt
    return str(engine.tokenizer.decode(prompt, specials=True)) if engine.tokenizer else ""


def _named(error: RequestError, index: int | None) -> RequestError:
    """The error of a prompt, with its place among several."""
    if error.param in (None, "messages", "prompt"):
        error.param = "prompt" if index is None else f"prompt[{index}]"
        if index is not None:
            error.args = (f"prompt[{index}]: {error}",)
    return error


class CompletionWriter(Choices):
    """Choices behind their echoed prompts; the best ones of each prompt are returned."""

    def __init__(
        self,
        name: str,
        tokenizer: Tokenizer | None,
        *,
        texts: Sequence[str] | None,
        logprobs: int | None,
        best: int,
        **options: Any,
    ) -> None:
        """`texts` are the prompts to echo.  `logprobs`: alternatives of each token; None hides
        log-probabilities.  `best` choices of each prompt are returned, those with the highest mean.

        `options` are those of Choices.
        """
        super().__init__(name, tokenizer, chat=False, **options)
        self._texts, self._num_logprobs, self._best = texts, logprobs, best
        self._echoed = [texts is None] * len(self.builders)
        """Whether a stream has the prompt of each choice."""
        self._scores = [[0.0, 0] for _ in self.builders]
        """Sum of log-probabilities and number of tokens of each choice."""
        for builder in self.builders:
            builder.text_start = len(self._text(builder.index))
            builder.shows_end = texts is not None

    def _text(self, index: int) -> str:
        """The text before a choice."""
        return self._texts[index // self.count] if self._texts is not None else ""

    def first(self) -> list[StreamEvent]:
        """See ResponseWriter: the prompts, unless their log-probabilities come with them."""
        if self._texts is None or self._num_logprobs is not None:
            return []
        return [stream_event(self._echo(index)) for index in range(len(self.builders))]

    def _echo(self, index: int, handle: Handle | None = None) -> dict[str, Any]:
        """The chunk with a choice's prompt."""
        self._echoed[index] = True
        return self.builders[index].chunk(self._text(index), logprobs=self._echoed_logprobs(handle))

    def _echoed_logprobs(self, handle: Handle | None) -> dict[str, Any] | None:
        found = None if handle is None else handle.prompt_logprobs
        if found is None or self._num_logprobs is None or self._texts is None:
            return None
        return echoed_logprobs(found, self._num_logprobs, self.tokenizer)

    def _chunks(self, index: int, event: Event, handles: Sequence[Handle]) -> list[dict[str, Any]]:
        """See Choices."""
        end = event if isinstance(event, Token) else event.end
        if end is not None and end.logprob is not None:
            self._scores[index][0] += end.logprob
            self._scores[index][1] += 1
        failed = isinstance(event, Finish) and event.error is not None
        before = [] if self._echoed[index] or failed else [self._echo(index, handles[index])]
        return before + super()._chunks(index, event, handles)

    def body(self, handles: Sequence[Handle]) -> dict[str, Any]:
        """See ResponseWriter."""
        whole = super().body(handles)
        whole.pop("prompt_logprobs", None)
        choices: list[dict[str, Any]] = []
        for first in range(0, len(self.builders), self.count):
            found = list(range(first, first + self.count))
            if self._best < self.count:
                found = sorted(found, key=self._mean, reverse=True)[: self._best]
            for index in found:
                choice = self._choice(whole["choices"][index], index, handles[index])
                choices.append({**choice, "index": len(choices)})
        return {**whole, "choices": choices}

    def _mean(self, index: int) -> float:
        """The mean log-probability of a choice's tokens."""
        total, tokens = self._scores[index]
        return total / tokens if tokens else 0.0

    def _choice(self, choice: dict[str, Any], index: int, handle: Handle) -> dict[str, Any]:
        """A whole choice, behind its prompt."""
        choice = {**choice, "text": self._text(index) + choice["text"]}
        if self._num_logprobs is None:
            choice["logprobs"] = None
        echoed, own = self._echoed_logprobs(handle), choice["logprobs"]
        if echoed is not None:
            choice["logprobs"] = {key: echoed[key] + (own[key] if own else []) for key in echoed}
        found = self._prompt_logprobs(handle)
        return choice if found is None else {**choice, "prompt_logprobs": found}

"""OpenAI's JSON in: request bodies as types, and from them prompts and sampling parameters.

No HTTP and no engine here.  Errors for wrong types name their path; fields.py reports fields that
are not here.
"""

import re
from typing import Any, Literal, TypeVar

import msgspec

from osmium.engine.request import MAX_INT, SamplingParams
from osmium.errors import RequestError
from osmium.server.field_types import (
    MAX_CHOICES,
    BestOf,
    Budget,
    Choices,
    CompletionTokens,
    Count,
    Effort,
    FrequencyPenalty,
    LogitBias,
    Messages,
    MinP,
    MinTokens,
    NamedTools,
    NumTokens,
    PresencePenalty,
    PromptScores,
    Reasoning,
    RepetitionPenalty,
    ResponseFormat,
    StopText,
    StopTexts,
    Structured,
    Temperature,
    Thinking,
    TokenId,
    ToolMode,
    Tools,
    TopK,
    TopLogprobs,
    TopP,
)
from osmium.server.limits import MAX_PROMPTS, check_count, check_stop, shown
from osmium.server.messages import check_messages
from osmium.server.structured import constraint
from osmium.server.surrogates import replace_surrogates
from osmium.server.tools import check_tools, tool_choice
from osmium.text.json_shape import MAX_VALUES, check_json_shape

__all__ = [
    "MAX_CHOICES", "ChatRequest", "CompletionRequest", "check_request", "decode", "parse",
    "prompt_logprobs", "prompts", "sampling_params",
]  # fmt: skip


class StreamOptions(msgspec.Struct):
    """Options of a stream."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    """No event has padding, whatever the value."""


class BaseRequest(msgspec.Struct, kw_only=True):
    """Fields of both kinds of request."""

    model: str | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: MinP | None = None
    presence_penalty: PresencePenalty | None = None
    frequency_penalty: FrequencyPenalty | None = None
    repetition_penalty: RepetitionPenalty | None = None
    repeat_penalty: RepetitionPenalty | None = None
    """llama-server's name of repetition_penalty."""
    seed: int | None = None
    stop: StopText | StopTexts | None = None
    stop_token_ids: list[TokenId] | None = None
    max_tokens: NumTokens | None = None
    min_tokens: MinTokens | None = None
    logit_bias: LogitBias | None = None
    ignore_eos: bool | None = None
    n: Count | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_progress: bool | None = None
    timings_per_token: bool | None = None
    user: str | None = None
    response_format: ResponseFormat | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    guided_grammar: str | None = None
    structured_outputs: Structured | None = None
    json_schema: str | dict[str, Any] | None = None
    """llama-server's name of guided_json; SGLang's, too."""
    grammar: str | None = None
    """llama-server's name of guided_grammar."""
    regex: str | None = None
    ebnf: str | None = None
    """SGLang's names of guided_regex and guided_grammar."""
    prompt_logprobs: PromptScores | bool | None = None
    """vLLM's: likeliest tokens returned at each position of the prompt; false is null."""


class ChatRequest(BaseRequest, kw_only=True):
    """POST /v1/chat/completions"""

    messages: Messages
    max_completion_tokens: NumTokens | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    tools: Tools | None = None
    tool_choice: ToolMode | NamedTools | None = None
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    enable_thinking: bool | None = None
    reasoning_effort: Effort | None = None
    thinking: Thinking | bool | None = None
    """{"type": "enabled" | "adaptive" | "disabled"} of Anthropic, DeepSeek and others."""
    reasoning: Reasoning | None = None
    """{"effort", "enabled", "exclude"} of OpenRouter and of OpenAI's responses."""
    thinking_token_budget: Budget | None = None
    reasoning_budget_tokens: Budget | None = None
    thinking_budget: Budget | None = None
    include_reasoning: bool | None = None


class CompletionRequest(BaseRequest, kw_only=True):
    """POST /v1/completions"""

    prompt: str | list[str | TokenId | list[TokenId]]
    """A text, token ids, or a list of texts or of lists of token ids."""
    max_tokens: CompletionTokens | None = None
    """Most tokens of the response; 0 computes the prompt alone."""
    logprobs: TopLogprobs | None = None
    echo: bool | None = None
    """Whether the response begins with the prompt; with logprobs also those of its tokens."""
    suffix: str | None = None
    """The text behind the gap that the response fills."""
    best_of: BestOf | None = None
    """Choices that are generated; the `n` likeliest per token are returned."""


Body = TypeVar("Body", bound=msgspec.Struct)
Parsed = TypeVar("Parsed", bound=BaseRequest)


def parse(body: bytes | bytearray, kind: type[Parsed], max_ids: int = 0) -> Parsed:
    """Decode and check a body, as `decode` does.  Raises: RequestError."""
    request = decode(body, kind, max_ids)
    _check(request)
    return request


def check_request(request: BaseRequest) -> None:
    """Check a request that another API's body was converted to, as `parse` does.

    Raises: RequestError.
    """
    if isinstance(request, ChatRequest):
        _check_chat(request)
    _check(request)


def decode(body: bytes | bytearray, kind: type[Body], max_ids: int = 0) -> Body:
    """Decode a body, with at most `max_ids` token ids beside its other values.

    A chat's messages and tools are checked, too.  Half a surrogate pair becomes U+FFFD.
    Raises: RequestError that names the path of the wrong value, or the limit.
    """
    hint = f" A prompt has at most {max_ids} token ids." if max_ids else ""
    check_json_shape(body, MAX_VALUES + max_ids, hint=hint)
    try:
        request = _decode(body, kind)
    except msgspec.ValidationError as error:
        text = str(error)
        path = re.search(r" - at `\$\.?(.*?)`$", text)
        missing = re.search(r"missing required field `(\w+)`", text)
        param = missing[1] if missing else path[1] if path else None
        raise RequestError(
            f"{param or 'The body'}: {text.split(' - at ')[0]}.", param=param, code="invalid_type"
        ) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(f"The body is not JSON: {error}.", code="invalid_json") from None
    if isinstance(request, ChatRequest):
        _check_chat(request)
    return request


def _decode(body: bytes | bytearray, kind: type[Body]) -> Body:
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        if "got `float`" not in str(error):
            raise
        plain = replace_surrogates(body)
    except msgspec.DecodeError:
        plain = replace_surrogates(body)
        if plain == body:
            raise
    return msgspec.convert(_with_integers(msgspec.json.decode(plain)), kind)


def _with_integers(value: Any) -> Any:
    """A value with integers for its numbers such as 1.0, which JSON does not tell from 1."""
    if isinstance(value, float) and value.is_integer() and abs(value) < MAX_INT:
        return int(value)
    if isinstance(value, list):
        return [_with_integers(item) for item in value]
    if isinstance(value, dict):
        return {key: _with_integers(item) for key, item in value.items()}
    return value


def _check(request: BaseRequest) -> None:
    """Raises: RequestError for options that Osmium does not have, and for too many items.

    No option is ignored.
    """
    check_stop(request.stop)
    constraint(request)
    if request.n is not None and not 1 <= request.n <= MAX_CHOICES:
        raise _unsupported("n", request.n, f"a request has 1 to {MAX_CHOICES} choices")
    scores = prompt_logprobs(request)
    if scores is not None and request.stream:
        raise _unsupported("prompt_logprobs", scores, "omit stream", " in a stream")
    if isinstance(request, CompletionRequest):
        _check_completion(request)


def _check_completion(request: CompletionRequest) -> None:
    """Raises: RequestError for fields that exclude each other."""
    if request.echo and request.suffix:
        raise _unsupported("echo", True, "omit one of them", " beside suffix")
    if request.best_of is None:
        return
    least = request.n or 1
    if not least <= request.best_of <= MAX_CHOICES:
        rule = f"an integer from n, which is {least}, to {MAX_CHOICES}"
        raise _invalid("best_of", request.best_of, rule)
    if request.best_of > least and request.stream:
        raise _unsupported("best_of", request.best_of, "omit stream", ", above n, in a stream")


def _check_chat(request: ChatRequest) -> None:
    """Raises: RequestError for messages, tools or a tool choice of a wrong form."""
    messages = request.messages
    check_tools(request.tools)
    tool_choice(request.tool_choice, request.tools)
    if messages is None:  # a TokenizeRequest with a prompt
        return
    check_messages(messages)


def prompts(request: CompletionRequest) -> list[str | list[int]]:
    """A completion's prompts, each text or token ids.  Raises: RequestError for too many."""
    prompt = request.prompt
    if isinstance(prompt, str):
        return [prompt]
    ids = [item for item in prompt if isinstance(item, int)]
    if len(ids) == len(prompt):
        return [ids]
    others = [item for item in prompt if not isinstance(item, int)]
    if ids:
        raise RequestError(
            f"prompt has {len(ids)} token ids beside {len(others)} texts or lists; it must be a "
            "text, token ids, or a list of texts or of lists of token ids.",
            param="prompt",
            code="invalid_type",
        )
    check_count("prompt", len(others), MAX_PROMPTS)
    return others


def prompt_logprobs(request: BaseRequest) -> int | None:
    """Alternatives at each token of the prompt; None without them.  Raises: RequestError."""
    count = request.prompt_logprobs
    if count is True:
        raise _invalid("prompt_logprobs", count, "an integer from 0 to 20")
    return None if count is False else count


def _invalid(name: str, value: object, rule: str) -> RequestError:
    return RequestError(
        f"{name} is {shown(value)}; it must be {rule}.", param=name, code="invalid_value"
    )


def _unsupported(name: str, value: object, fix: str, where: str = "") -> RequestError:
    return RequestError(
        f"{name} is {shown(value)}{where}, which is not supported: {fix}.",
        param=name,
        code="unsupported_value",
    )


_PASSED_ON: tuple[
    Literal["temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
            "repetition_penalty", "seed"], ...
] = ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
     "repetition_penalty", "seed")  # fmt: skip


def sampling_params(request: BaseRequest, defaults: dict[str, Any]) -> SamplingParams:
    """Sampling parameters: the request's values, else the model's defaults.

    Raises: RequestError.
    """
    given: dict[str, Any] = {
        name: getattr(request, name) for name in _PASSED_ON if getattr(request, name) is not None
    }
    if request.stop is not None:
        given["stop"] = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop)
    if request.stop_token_ids is not None:
        given["stop_token_ids"] = tuple(request.stop_token_ids)
    if request.max_tokens is not None:
        given["max_tokens"] = request.max_tokens
    if request.min_tokens is not None:
        given["min_tokens"] = request.min_tokens
    names: dict[str | None, str] = {}
    """The client's name of each parameter that the engine names differently."""
    if request.repeat_penalty is not None and request.repetition_penalty is None:
        given["repetition_penalty"] = request.repeat_penalty
        names["repetition_penalty"] = "repeat_penalty"
    if isinstance(request, ChatRequest):
        if request.max_completion_tokens is not None:
            given["max_tokens"] = request.max_completion_tokens
            names["max_tokens"] = "max_completion_tokens"
        if request.logprobs:
            given["logprobs"] = request.top_logprobs or 0
            names["logprobs"] = "top_logprobs"
        elif request.top_logprobs:
            raise RequestError(
                "top_logprobs needs logprobs to be true.",
                param="top_logprobs",
                code="invalid_value",
            )
    elif isinstance(request, CompletionRequest):
        given["logprobs"] = request.logprobs
    if (scores := prompt_logprobs(request)) is not None:
        given["prompt_logprobs"] = scores
    most = given.get("max_tokens", 1)
    if most < 1 and not isinstance(request, CompletionRequest):
        raise _invalid(names.get("max_tokens", "max_tokens"), most, "an integer of at least 1")
    if request.ignore_eos:
        given["ignore_eos"] = True
    if request.logit_bias:
        given["logit_bias"] = {_token_id(key): bias for key, bias in request.logit_bias.items()}
    try:
        return SamplingParams(**{**defaults, **given})
    except RequestError as error:
        name = names.get(error.param)
        if name is None:
            raise
        text = str(error).replace(str(error.param), name, 1)
        raise RequestError(text, param=name, code=error.code) from None


def _token_id(key: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", key):
        raise RequestError(
            f"logit_bias has the key {shown(key)}; keys are token ids.",
            param="logit_bias",
            code="invalid_value",
        )
    return int(key)

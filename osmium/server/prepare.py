"""From a body's bytes to what the engine runs: parsing, the chat template, tokenizing.

Everything here runs on a worker thread, as it takes time that grows with the body.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from osmium.engine.engine import Engine
from osmium.engine.request import SamplingParams, TokenMask, context_error
from osmium.errors import RequestError
from osmium.server.chat_prompt import ChatPrompt, render_chat
from osmium.server.choices import Choices
from osmium.server.fields import unknown_fields
from osmium.server.response_writer import ResponseWriter, StreamEvent
from osmium.server.schema import (
    BaseRequest,
    ChatRequest,
    CompletionRequest,
    one_prompt,
    parse,
    sampling_params,
)
from osmium.server.structured import constraint, mask_factory
from osmium.server.thinking import shows_reasoning
from osmium.text.reasoning import END_OF_REASONING

__all__ = [
    "ChatWriter", "Prepare", "Prepared", "prepare_chat", "prepare_completion", "prepare_messages",
]  # fmt: skip


@dataclass
class Prepared:
    """A request that the engine can run."""

    stream: bool
    ids: list[int]
    params: list[SamplingParams]
    """One for each choice."""
    writer: ResponseWriter
    token_mask: Callable[[], TokenMask] | None = None
    """Makes the token mask of one choice; None for any text."""
    ignored: tuple[str, ...] = field(default=())
    """Names of fields that have no effect."""
    shows_progress: bool = False
    """Whether a stream has events of the prefill's progress."""
    ping: StreamEvent | None = None
    """An event that is sent with each comment of a stream."""


Prepare = Callable[[Engine, str, bytearray], Prepared]
"""From the engine, the served model's name and a body.  Raises: RequestError."""


ChatWriter = Callable[[ChatPrompt], ResponseWriter]
"""Makes the writer of a response to a rendered prompt."""


def prepare_chat(engine: Engine, name: str, raw: bytearray) -> Prepared:
    """Prepare a body of /v1/chat/completions.  Raises: RequestError."""
    body = parse(raw, ChatRequest)
    ignored = unknown_fields(raw, ChatRequest.__struct_fields__)

    def writer(prompt: ChatPrompt) -> Choices:
        return Choices(
            name, engine.tokenizer, chat=True, thinking=prompt.thinking, tools=prompt.tools,
            tool_format=engine.template.tool_format,
            parallel_calls=body.parallel_tool_calls is not False,
            shows_reasoning=shows_reasoning(body), **_stream_options(body),
        )  # fmt: skip

    return prepare_messages(engine, body, writer, ignored)


def prepare_messages(
    engine: Engine, body: ChatRequest, writer: ChatWriter, ignored: tuple[str, ...] = ()
) -> Prepared:
    """Prepare a checked chat of any API, with `writer` for its response.  Raises: RequestError."""
    params = sampling_params(body, engine.defaults)
    prompt = render_chat(engine, body)
    ids = _encode(engine, prompt.text)
    prompt.num_tokens = len(ids)
    if prompt.thinking:
        params = replace(params, stop_after=END_OF_REASONING)
    return _prepared(engine, body, ids, params, writer(prompt), ignored)


def prepare_completion(engine: Engine, name: str, raw: bytearray) -> Prepared:
    """Prepare a body of /v1/completions.  Raises: RequestError."""
    body = parse(raw, CompletionRequest, max_ids=engine.context)
    ignored = unknown_fields(raw, CompletionRequest.__struct_fields__)
    params = sampling_params(body, engine.defaults)
    prompt = one_prompt(body)
    if isinstance(prompt, list):
        ids = prompt
    elif engine.tokenizer is None:
        raise RequestError(f"{engine.name} has no tokenizer; send token ids.", param="prompt")
    else:
        ids = _encode(engine, prompt)
    writer = Choices(name, engine.tokenizer, chat=False, **_stream_options(body))
    return _prepared(engine, body, ids, params, writer, ignored)


def _stream_options(body: BaseRequest) -> dict[str, Any]:
    """Options of Choices that chats and completions share."""
    usage = bool(body.stream_options and body.stream_options.include_usage)
    timings = bool(body.timings_per_token)
    return {"count": body.n or 1, "stream_usage": usage, "timings_per_token": timings}


def _prepared(
    engine: Engine,
    body: BaseRequest,
    ids: list[int],
    params: SamplingParams,
    writer: ResponseWriter,
    ignored: tuple[str, ...],
) -> Prepared:
    """With a seed, each choice has the seed after the one before."""
    count, seed = body.n or 1, params.seed
    each = [params if seed is None else replace(params, seed=seed + i) for i in range(count)]
    tools = isinstance(body, ChatRequest) and bool(body.tools) and body.tool_choice != "none"
    mask = mask_factory(engine, constraint(body), params, len(ids), bool(params.stop_after), tools)
    return Prepared(
        bool(body.stream), ids, each, writer, mask, ignored,
        shows_progress=bool(body.return_progress),
    )  # fmt: skip


def _encode(engine: Engine, prompt: str) -> list[int]:
    """A prompt's token ids.  Raises: RequestError, mostly before tokenizing a text too long."""
    least: int = engine.tokenizer.min_tokens(prompt, engine.context)
    if least >= engine.context:
        raise context_error(engine.context, f"{least} tokens or more")
    return list(engine.tokenizer.encode(prompt))

"""From a body's bytes to what the engine runs: parsing, the chat template, tokenizing.

Everything here runs on a worker thread, as it takes time that grows with the body.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from osmium.engine.engine import Engine
from osmium.engine.request import SamplingParams, TokenMask, context_error
from osmium.errors import RequestError
from osmium.server.openai import ResponseBuilder
from osmium.server.schema import (
    ChatRequest,
    CompletionRequest,
    one_prompt,
    parse,
    sampling_params,
    template_options,
)
from osmium.server.structured import constraint, mask_factory
from osmium.text.reasoning import END_OF_REASONING, starts_in_reasoning

__all__ = ["Prepare", "Prepared", "prepare_chat", "prepare_completion"]


@dataclass
class Prepared:
    """A request that the engine can run."""

    stream: bool
    usage: bool
    """Whether a stream ends with the usage."""
    ids: list[int]
    params: SamplingParams
    response: ResponseBuilder
    token_mask: Callable[[], TokenMask] | None = None
    """Makes the token mask of one response; None for any text."""


Prepare = Callable[[Engine, str, bytearray], Prepared]
"""From the engine, the served model's name and a body.  Raises: RequestError."""


def prepare_chat(engine: Engine, name: str, raw: bytearray) -> Prepared:
    """Prepare a body of /v1/chat/completions.  Raises: RequestError."""
    body = parse(raw, ChatRequest)
    if engine.tokenizer is None or engine.template is None:
        raise RequestError(f"{engine.name} has no chat template; use /v1/completions.",
                           param="messages", code="no_chat_template")  # fmt: skip
    params = sampling_params(body, engine.defaults)
    tools = None if body.tool_choice == "none" else body.tools
    prompt = engine.template.render(body.messages, tools, **template_options(body))
    ids = _encode(engine, prompt)
    thinking = starts_in_reasoning(prompt)
    if thinking:
        params = replace(params, stop_after=END_OF_REASONING)
    mask = mask_factory(engine, constraint(body), params, len(ids), thinking)
    response = ResponseBuilder(name, engine.tokenizer, chat=True, thinking=thinking)
    return Prepared(bool(body.stream), _wants_usage(body), ids, params, response, mask)


def prepare_completion(engine: Engine, name: str, raw: bytearray) -> Prepared:
    """Prepare a body of /v1/completions.  Raises: RequestError."""
    body = parse(raw, CompletionRequest, max_ids=engine.context)
    params = sampling_params(body, engine.defaults)
    prompt = one_prompt(body)
    if isinstance(prompt, list):
        ids = prompt
    elif engine.tokenizer is None:
        raise RequestError(f"{engine.name} has no tokenizer; send token ids.", param="prompt")
    else:
        ids = _encode(engine, prompt)
    mask = mask_factory(engine, constraint(body), params, len(ids))
    response = ResponseBuilder(name, engine.tokenizer, chat=False)
    return Prepared(bool(body.stream), _wants_usage(body), ids, params, response, mask)


def _encode(engine: Engine, prompt: str) -> list[int]:
    """A prompt's token ids.  Raises: RequestError, mostly before tokenizing a text too long."""
    least: int = engine.tokenizer.min_tokens(prompt, engine.context)
    if least >= engine.context:
        raise context_error(engine.context, f"{least} tokens or more")
    return list(engine.tokenizer.encode(prompt))


def _wants_usage(body: ChatRequest | CompletionRequest) -> bool:
    return bool(body.stream_options and body.stream_options.include_usage)

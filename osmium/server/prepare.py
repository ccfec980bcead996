"""From a body's bytes to what the engine runs: parsing, the chat template, tokenizing.

Everything here runs on a worker thread, as it takes time that grows with the body.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from osmium.engine.engine import Engine
from osmium.engine.request import SamplingParams, TokenMask, context_error
from osmium.server.chat_prompt import ChatPrompt, render_chat, unused_variables
from osmium.server.choices import Choices
from osmium.server.fields import unknown_fields
from osmium.server.limits import check_scores
from osmium.server.response_writer import ResponseWriter, StreamEvent
from osmium.server.schema import (
    BaseRequest,
    ChatRequest,
    parse,
    prompt_logprobs,
    sampling_params,
)
from osmium.server.thinking import shows_reasoning
from osmium.server.token_masks import token_masks
from osmium.text.reasoning import END_OF_REASONING

__all__ = [
    "ChatWriter", "Prepare", "Prepared", "Run", "encode_prompt", "prepare_chat",
    "prepare_messages", "prepare_runs", "stream_options",
]  # fmt: skip


@dataclass
class Run:
    """One choice, as the engine runs it."""

    ids: list[int]
    """The prompt."""
    params: SamplingParams
    token_mask: Callable[[], TokenMask] | None = None
    """Makes the token mask; None for any text."""


@dataclass
class Prepared:
    """A request that the engine can run."""

    stream: bool
    runs: list[Run]
    """One for each choice; those of a prompt follow each other."""
    writer: ResponseWriter
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
    ignored = unknown_fields(raw, ChatRequest.__struct_fields__) + unused_variables(engine, body)

    def writer(prompt: ChatPrompt) -> Choices:
        return Choices(
            name, engine.tokenizer, chat=True, thinking=prompt.thinking, tools=prompt.tools,
            tool_format=engine.template.tool_format,
            parallel_calls=body.parallel_tool_calls is not False,
            shows_reasoning=shows_reasoning(body), num_prompt_logprobs=prompt_logprobs(body),
            **stream_options(body),
        )  # fmt: skip

    return prepare_messages(engine, body, writer, ignored)


def prepare_messages(
    engine: Engine, body: ChatRequest, writer: ChatWriter, ignored: tuple[str, ...] = ()
) -> Prepared:
    """Prepare a checked chat of any API, with `writer` for its response.  Raises: RequestError."""
    params = sampling_params(body, engine.defaults)
    prompt = render_chat(engine, body)
    ids = encode_prompt(engine, prompt.text, params)
    prompt.num_tokens = len(ids)
    if prompt.thinking:
        params = replace(params, stop_after=END_OF_REASONING)
    if params.prompt_logprobs is not None:
        check_scores(len(ids) * (body.n or 1), params.prompt_logprobs)
    return prepare_runs(engine, body, [ids], params, writer(prompt), ignored, body.n or 1)


def stream_options(body: BaseRequest) -> dict[str, Any]:
    """Options of Choices that chats and completions share."""
    usage = bool(body.stream_options and body.stream_options.include_usage)
    timings = bool(body.timings_per_token)
    return {"count": body.n or 1, "stream_usage": usage, "timings_per_token": timings}


def prepare_runs(
    engine: Engine,
    body: BaseRequest,
    prompts: Sequence[list[int]],
    params: SamplingParams,
    writer: ResponseWriter,
    ignored: tuple[str, ...],
    count: int,
) -> Prepared:
    """`count` choices of each prompt.  With a seed, each choice has the seed after the one before.

    Raises: RequestError.
    """
    seed = params.seed
    each = [params if seed is None else replace(params, seed=seed + i) for i in range(count)]
    runs = []
    for ids in prompts:
        mask = None
        if params.max_tokens != 0:
            mask = token_masks(engine, body, params, len(ids), bool(params.stop_after))
        runs += [Run(ids, one, mask) for one in each]
    return Prepared(
        bool(body.stream), runs, writer, ignored, shows_progress=bool(body.return_progress)
    )


def encode_prompt(engine: Engine, prompt: str, params: SamplingParams) -> list[int]:
    """A prompt's token ids.  Raises: RequestError, mostly before tokenizing a text too long."""
    most = engine.context - (params.max_tokens != 0)
    least: int = engine.tokenizer.min_tokens(prompt, most + 1)
    if least > most:
        raise context_error(engine.context, f"{least} tokens or more")
    return list(engine.tokenizer.encode(prompt))

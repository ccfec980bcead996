"""POST /tokenize and /detokenize, with vLLM's fields."""

from collections.abc import Sequence
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from osmium.engine.engine import Engine
from osmium.engine.request import check_ids
from osmium.errors import RequestError
from osmium.server.answer import work_on_body
from osmium.server.chat_prompt import render_chat, unused_variables
from osmium.server.field_types import Messages, TokenId
from osmium.server.fields import unknown_fields
from osmium.server.response_types import DetokenizeResponse, TokenizeResponse
from osmium.server.route import ApiRoute, Operation
from osmium.server.schema import BaseRequest, ChatRequest, decode
from osmium.text.tokenizer import Tokenizer

__all__ = ["TOKEN_ROUTES", "DetokenizeRequest", "TokenizeRequest"]


class TokenizeRequest(ChatRequest, kw_only=True):
    """POST /tokenize: a prompt, or the messages of a chat with the fields that its prompt uses."""

    prompt: str | None = None
    messages: Messages | None = None  # type: ignore[assignment]
    add_special_tokens: bool | None = None
    """No effect: no model of these adds tokens such as BOS, and completions add none either."""
    return_token_strs: bool | None = None


TOKENIZE_FIELDS = set(TokenizeRequest.__struct_fields__) - set(BaseRequest.__struct_fields__) - {
    "max_completion_tokens",
    "logprobs",
    "top_logprobs",
    "response_format",
} | {"model"}
"""Fields that change a prompt's tokens, and those of /tokenize."""


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    """POST /detokenize"""

    model: str | None = None
    tokens: list[TokenId]


Result = tuple[dict[str, Any], tuple[str, ...]]
"""A body, and the names of the request's unknown fields."""


def tokenize_body(engine: Engine, name: str, raw: bytearray) -> Result:
    """The token ids of a prompt or of messages.  Raises: RequestError."""
    body = decode(raw, TokenizeRequest)
    ignored = unknown_fields(raw, TOKENIZE_FIELDS, chat_only={}) + unused_variables(engine, body)
    tokenizer = _tokenizer(engine)
    if (body.prompt is None) == (body.messages is None):
        raise RequestError(
            "The body has both or neither of prompt and messages; send one of them.",
            param="prompt",
            code="invalid_value",
        )
    if body.prompt is not None:
        ids = tokenizer.encode(body.prompt)
    else:
        ids = tokenizer.encode(render_chat(engine, body).text)
    strings = [_name(tokenizer, token) for token in ids] if body.return_token_strs else None
    result = {"count": len(ids), "max_model_len": engine.context, "tokens": ids}
    return {**result, "token_strs": strings}, ignored


def detokenize_body(engine: Engine, name: str, raw: bytearray) -> Result:
    """The text of token ids, with that of special tokens.  Raises: RequestError."""
    body = decode(raw, DetokenizeRequest, max_ids=engine.context)
    tokenizer = _tokenizer(engine)
    if body.tokens:
        _check_tokens(body.tokens, engine)
    return {"prompt": tokenizer.decode(body.tokens, specials=True)}, unknown_fields(
        raw, DetokenizeRequest.__struct_fields__
    )


def _check_tokens(tokens: Sequence[int], engine: Engine) -> None:
    """Raises: RequestError for an id that is not in the vocabulary."""
    try:
        check_ids(list(tokens), engine.config.vocab_size)
    except RequestError as error:
        error.param = "tokens"
        raise


def _tokenizer(engine: Engine) -> Tokenizer:
    if engine.tokenizer is None:
        raise RequestError(f"{engine.name} has no tokenizer.", code="no_tokenizer")
    tokenizer: Tokenizer = engine.tokenizer
    return tokenizer


def _name(tokenizer: Tokenizer, token: int) -> str:
    return tokenizer.token_bytes(token).decode("utf-8", errors="replace")


async def tokenize(request: Request) -> Response:
    """POST /tokenize"""
    return _respond(request, await work_on_body(request, tokenize_body))


async def detokenize(request: Request) -> Response:
    """POST /detokenize"""
    return _respond(request, await work_on_body(request, detokenize_body))


def _respond(request: Request, result: Result) -> Response:
    body, ignored = result
    return JSONResponse(body, headers=request.app.state.ignored.headers(ignored))


ONE_INPUT = {
    "anyOf": [
        {
            "properties": {name: {"not": {"type": "null"}}, other: {"type": "null"}},
            "required": [name],
        }
        for name, other in (("prompt", "messages"), ("messages", "prompt"))
    ]
}
"""Either a prompt or messages."""

TOKEN_ROUTES = [
    ApiRoute(
        "/tokenize",
        tokenize,
        Operation(
            TokenizeRequest, fields=TOKENIZE_FIELDS, rules=(ONE_INPUT,), response=TokenizeResponse
        ),
    ),
    ApiRoute("/detokenize", detokenize, Operation(DetokenizeRequest, response=DetokenizeResponse)),
]

"""Fields of a body that have no effect: refused by name, or reported as ignored.

No field vanishes.  One that would change the answer is refused; one that the server does not know
is named in the header `x-osmium-ignored` and in the log, with the known field it may stand for.
"""

import difflib
import logging
from collections.abc import Collection, Iterable, Mapping
from typing import Any
from urllib.parse import quote

import msgspec

from osmium.errors import RequestError
from osmium.server.limits import shown
from osmium.server.surrogates import replace_surrogates

__all__ = ["IgnoredFields", "unknown_fields"]

log = logging.getLogger("osmium.server")

MAX_NAMES = 16
"""Most names in a header; further ones are counted."""

MAX_NAME_CHARS = 64

MAX_LOGGED = 256
"""Names that are logged, each once, so that clients cannot fill the log."""

_STRUCTURED = "use response_format or structured_outputs"
_SAMPLING = "use temperature, top_p, top_k or min_p"
_ONLY_TEXT = "only text is supported"
_WHOLE = "send the whole conversation"
_CHAT_ONLY = "use /v1/chat/completions"

REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "functions": (([],), "use tools"),
    "function_call": (("none", "auto"), "use tool_choice"),
    "guided_whitespace_pattern": ((), _STRUCTURED),
    "structural_tag": ((), _STRUCTURED),
    "format": (("",), "use response_format"),
    "audio": ((), _ONLY_TEXT),
    "modalities": ((["text"], []), _ONLY_TEXT),
    "web_search_options": ((), "give the model a tool"),
    "use_beam_search": ((False,), "omit it"),
    "length_penalty": ((1,), "beam search is not supported"),
    "early_stopping": ((False,), "beam search is not supported"),
    "bad_words": (([],), "use logit_bias"),
    "allowed_token_ids": ((), "use logit_bias"),
    "include_stop_str_in_output": ((False,), "a stop text is never returned"),
    "no_stop_trim": ((False,), "a stop text is never returned"),
    "skip_special_tokens": ((True,), "special tokens are never returned"),
    "spaces_between_special_tokens": ((True, False), "special tokens are never returned"),
    "truncate_prompt_tokens": ((), "shorten the prompt"),
    "logits_processors": (([],), "omit it"),
    "stop_regex": ((), "use stop"),
    "typical_p": ((1,), _SAMPLING),
    "tfs_z": ((1,), _SAMPLING),
    "top_a": ((0,), _SAMPLING),
    "top_n_sigma": ((-1, 0), _SAMPLING),
    "xtc_probability": ((0,), _SAMPLING),
    "dry_multiplier": ((0,), _SAMPLING),
    "mirostat": ((0,), _SAMPLING),
    "dynatemp_range": ((0,), _SAMPLING),
    "samplers": ((), _SAMPLING),
    "n_probs": ((0,), "use logprobs and top_logprobs"),
    "documents": (([],), "write them in a message"),
    "chat_template": ((), "the model's own is used; start the server with another one"),
    "return_token_ids": ((False,), "use /tokenize"),
    "return_tokens_as_token_ids": ((False,), "use /tokenize"),
    "lora": (([],), "serve the merged model"),
    "lora_path": ((), "serve the merged model"),
    "separate_reasoning": ((True,), "reasoning is always separate"),
    "stream_reasoning": ((True,), "reasoning is always streamed"),
    "reasoning_format": (("auto", "deepseek"), "reasoning is always separate"),
    "kv_transfer_params": ((), "omit it"),
    "mm_processor_kwargs": (({},), _ONLY_TEXT),
    "media_io_kwargs": (({},), _ONLY_TEXT),
    "images": (([],), _ONLY_TEXT),
    "image_data": (([],), _ONLY_TEXT),
    "video_data": (([],), _ONLY_TEXT),
    "audio_data": (([],), _ONLY_TEXT),
    "multi_modal_data": (({},), _ONLY_TEXT),
    "prompt_embeds": ((), "use prompt"),
    "input_embeds": ((), "use prompt"),
    "return_hidden_states": ((False,), "omit it"),
    "custom_logit_processor": ((), "use logit_bias"),
    "input": ((), "use messages or prompt"),
    "previous_response_id": ((), _WHOLE),
    "thread": ((), _WHOLE),
    "compaction": ((), "shorten the conversation"),
}
"""Fields that would change the answer: the values that ask for nothing, and what to do instead."""

CHAT_ONLY: dict[str, tuple[Any, ...]] = {
    "tools": ([],), "tool_choice": ("none", "auto"),
    "chat_template_kwargs": ({},), "enable_thinking": (), "thinking": (),
    "reasoning": ({},), "reasoning_effort": (), "thinking_token_budget": (),
    "reasoning_budget_tokens": (), "thinking_budget": (), "continue_final_message": (False,),
    "top_logprobs": (0,), "max_completion_tokens": (),
}  # fmt: skip
"""Fields of a chat, refused in a completion."""

HINTS: dict[str, tuple[Any, ...] | None] = {
    "store": (False,),
    "service_tier": ("auto", "default"),
    "priority": (0,),
    "metadata": None,
    "user": None,
    "safety_identifier": None,
    "prompt_cache_key": None,
    "prompt_cache_retention": None,
    "prompt_cache_options": None,
    "client_metadata": None,
    "prediction": None,
    "cache_prompt": None,
    "guided_decoding_backend": None,
    "request_id": None,
    "parallel_tool_calls": None,
}
"""Fields that change no answer: the values that ask for nothing, None for all of them."""

NESTED = {"stream_options": ("include_usage", "include_obfuscation")}
"""Known fields of objects."""

OPTIONS = [f"{name}.{key}" for name, keys in NESTED.items() for key in keys]

ALIASES = {
    "num_predict": "max_tokens", "n_predict": "max_tokens", "max_new_tokens": "max_tokens",
    "max_output_tokens": "max_tokens", "max_length": "max_tokens", "min_new_tokens": "min_tokens",
    "stop_sequences": "stop", "think": "enable_thinking", "n_cmpl": "n",
    "num_return_sequences": "n",
    "rep_pen": "repetition_penalty", "random_seed": "seed", "system": "messages",
    "system_prompt": "messages", "effort": "reasoning_effort", "extra_body": "chat_template_kwargs",
}  # fmt: skip
"""Other programs' names."""


def unknown_fields(
    body: bytes | bytearray,
    known: Collection[str],
    *,
    refused: Mapping[str, tuple[tuple[Any, ...], str]] = REFUSED,
    chat_only: Mapping[str, tuple[Any, ...]] = CHAT_ONLY,
    nested: Mapping[str, Collection[str]] = NESTED,
) -> tuple[str, ...]:
    """The names of a body's fields that have no effect; `known` ones have been decoded.

    `chat_only` are refused where they are not known.  `nested` are the known fields of fields that
    are objects.  A field that is null is absent.
    Raises: RequestError for refused ones.
    """
    given = _items(body)
    ignored = []
    for name, raw in given.items():
        if name in known or bytes(raw) == b"null":
            continue
        if name in refused:
            harmless, fix = refused[name]
            _refuse_unless(name, _value(raw), harmless, fix)
        elif name in chat_only:
            _refuse_unless(name, _value(raw), chat_only[name], _CHAT_ONLY)
        elif name in HINTS:
            values = HINTS[name]
            if values is not None and not _is_any(_value(raw), values):
                ignored.append(name)
        else:
            ignored.append(name)
    for name, options in nested.items():
        if name in given and name in known:
            ignored += [f"{name}.{key}" for key in _items(given[name]) if key not in options]
    return tuple(ignored)


def _items(body: Any) -> Mapping[str, msgspec.Raw]:
    """The fields of an object, not decoded themselves.  Raises: RequestError."""
    fields: Mapping[str, msgspec.Raw] = _decoded(body, dict[str, msgspec.Raw] | None) or {}
    return fields


def _value(raw: msgspec.Raw) -> Any:
    return _decoded(raw, Any)


def _decoded(raw: Any, kind: Any) -> Any:
    """JSON that was skipped before.  Raises: RequestError, as for bytes that are not UTF-8."""
    try:
        return msgspec.json.decode(raw, type=kind)
    except msgspec.DecodeError:
        pass
    try:
        return msgspec.json.decode(replace_surrogates(bytearray(raw)), type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(f"The body is not JSON: {error}.", code="invalid_json") from None


def _is_any(value: Any, values: tuple[Any, ...]) -> bool:
    """Whether the value is one of these; True is not 1."""
    return any(value == one and isinstance(value, bool) is isinstance(one, bool) for one in values)


def _refuse_unless(name: str, value: Any, harmless: tuple[Any, ...], fix: str) -> None:
    if _is_any(value, harmless):
        return
    raise RequestError(
        f"{name} is {shown(value)}, which is not supported: {fix}.",
        param=name,
        code="unsupported_value",
    )


class IgnoredFields:
    """Reports ignored fields: in a header, and each name once in the log."""

    def __init__(self, known: Iterable[str], aliases: Mapping[str, str] | None = None) -> None:
        """`aliases` are other APIs' names of the known fields; None for those of OpenAI's API."""
        shared = {*REFUSED, *HINTS, *CHAT_ONLY, *OPTIONS} if aliases is None else ()
        self._known = sorted({*known, *shared})
        self._aliases = ALIASES if aliases is None else aliases
        self._logged: set[str] = set()

    def headers(self, names: tuple[str, ...]) -> dict[str, str]:
        """The headers of a response to a request with these ignored fields; logs new ones."""
        if not names:
            return {}
        # a header must not end in a space, so that an empty name is shown as two quotes
        listed = [quote(name[:MAX_NAME_CHARS], safe="") or '""' for name in names[:MAX_NAMES]]
        suggestions = [
            f"{shown_name} -> {known}"
            for name, shown_name in zip(names, listed, strict=False)
            if (known := self.suggestion(name))
        ]
        self._log(names, listed)
        if len(names) > MAX_NAMES:
            listed.append(f"and {len(names) - MAX_NAMES} more")
        headers = {"x-osmium-ignored": ", ".join(listed)}
        if suggestions:
            headers["x-osmium-did-you-mean"] = ", ".join(suggestions)
        return headers

    def suggestion(self, name: str) -> str | None:
        """The known field that a name may stand for; None if there is none."""
        name = name[:MAX_NAME_CHARS]
        if name in self._known:
            return None
        alias = self._aliases.get(name)
        if alias:
            return alias
        plain = name.strip().lower().replace("-", "_")
        same_depth = [known for known in self._known if ("." in known) is ("." in plain)]
        return next(iter(difflib.get_close_matches(plain, same_depth, 1, 0.8)), None)

    def _log(self, names: tuple[str, ...], listed: list[str]) -> None:
        new = [
            f"{text} (did you mean {known}?)" if (known := self.suggestion(name)) else text
            for name, text in zip(names, listed, strict=False)
            if text not in self._logged
        ]
        if not new or len(self._logged) >= MAX_LOGGED:
            return
        self._logged.update(listed)
        log.warning("Ignoring fields of a request: %s", ", ".join(new))

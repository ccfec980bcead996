"""The grammar compiler of each engine: made once, in the background after the model is loaded."""

import logging
import threading
from weakref import WeakKeyDictionary

from osmium.engine.engine import Engine
from osmium.errors import RequestError
from osmium.text.grammar import GrammarCompiler

__all__ = ["grammar_compiler", "warm_up"]

log = logging.getLogger("osmium.server")

_COMPILERS: "WeakKeyDictionary[Engine, GrammarCompiler]" = WeakKeyDictionary()
_LOCK = threading.Lock()
"""Held while a compiler is made, so that requests wait for it."""


def grammar_compiler(engine: Engine, param: str) -> GrammarCompiler:
    """The engine's compiler.  Raises: RequestError for a model without a tokenizer or an end."""
    if not _has_grammars(engine):
        lacking = "tokenizer" if engine.tokenizer is None else "end token"
        raise RequestError(
            f"{engine.name} has no {lacking}, which {param} needs. Omit it.",
            param=param,
            code="unsupported_value",
        )
    with _LOCK:
        compiler = _COMPILERS.get(engine)
        if compiler is None:
            config = engine.config
            compiler = GrammarCompiler(engine.tokenizer, config.vocab_size, config.eos_token_ids)
            _COMPILERS[engine] = compiler
    return compiler


def warm_up(engine: Engine) -> None:
    """Make the engine's compiler, where it can have one: two seconds for 248,000 tokens."""
    if not _has_grammars(engine):
        return
    try:
        grammar_compiler(engine, "response_format")
    except Exception as error:  # a request that needs it gets the error
        log.warning("Structured output is not available: %r", error)


def _has_grammars(engine: Engine) -> bool:
    return engine.tokenizer is not None and bool(engine.config.eos_token_ids)

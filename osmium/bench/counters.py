"""The expert counters of an engine, and their checks."""

from osmium.engine.engine import Engine

__all__ = ["check_routed", "difference", "expert_counters", "hit_rate"]


def expert_counters(engine: Engine) -> dict[str, int]:
    """The expert counters.  Raises: AssertionError if they do not add up."""
    counters: dict[str, int] = engine.status()["experts"]
    if counters["routed"] != counters["hit"] + counters["missed"]:
        raise AssertionError(f"the expert counters do not add up: {counters}")
    return counters


def difference(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    """Counts between two readings."""
    return {name: after[name] - before[name] for name in after}


def check_routed(engine: Engine, experts: dict[str, int], tokens: int) -> None:
    """Raises: AssertionError if the counters have fewer routed experts than `tokens` need."""
    expected = tokens * engine.config.num_layers * engine.config.top_k
    if experts["routed"] < expected:
        raise AssertionError(
            f"{tokens} tokens route to {expected} experts; the counters have {experts}"
        )


def hit_rate(experts: dict[str, int]) -> float:
    """Hits per routed pair; 0 without a pair."""
    return experts["hit"] / max(1, experts["routed"])

"""The rows that `osmium bench` measures, and how."""

from dataclasses import dataclass, replace

from osmium.engine.request import SamplingParams

__all__ = ["BenchConfig"]


@dataclass(frozen=True)
class BenchConfig:
    """The rows to measure, and how."""

    depths: tuple[str, ...] = ("1k",)
    """Tokens of context, as 1k, or a fraction of the KV cache, as 90%."""
    tokens: int = 256
    """Timed tokens of each repeat."""
    repeats: int = 3
    """Repeats of each row; the median is the result."""
    warm_up: int = 256
    """Untimed tokens of a decode row before its repeats."""
    parallel: tuple[int, ...] = (1,)
    """Sequences of a decode row."""
    prompts: tuple[int, ...] = ()
    """Prompt tokens of the prefill rows."""
    turns: tuple[tuple[int, int], ...] = ()
    """Tokens in the state, and new tokens, of the turn rows."""
    beside: tuple[int, ...] = ()
    """Prompt tokens of the rows with a decode stream beside."""
    temperature: float = 0.0
    """Temperature of decode rows; above 0 with top-k 20 and top-p .95, usual defaults of models."""

    @property
    def short_run(self) -> int:
        """Tokens of the cold start, and of the warm start."""
        return min(64, self.warm_up, self.tokens)

    def sampling(self, tokens: int) -> SamplingParams:
        """Sampling parameters of a request for `tokens` tokens."""
        greedy = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        if self.temperature == 0:
            return greedy
        return replace(greedy, temperature=self.temperature, top_k=20, top_p=0.95, seed=1)

"""Routed experts: host memory, expert cache, prefetch, routing traces and the expert runner."""

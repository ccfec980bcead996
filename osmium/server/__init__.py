"""The HTTP server: OpenAI's API, /health and /metrics."""

"""Benchmarks: throughput, kernels, the profile of a token, and cache policies."""

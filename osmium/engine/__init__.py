"""Serving: requests, scheduling, decode steps, sampling, statistics and the memory plan."""

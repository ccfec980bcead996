"""Osmium: a Mixture-of-Experts inference engine for one consumer GPU."""

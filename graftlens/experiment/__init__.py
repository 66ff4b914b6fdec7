"""Experiments: one file says what to train, what to graft and what to show of it."""

"""Sweeps: many grafts over many prompts, each distinct thing computed once, nothing lost."""

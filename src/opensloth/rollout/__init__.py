"""Completions for training and evaluation: sampled by noise that depends on nothing but where a token stands."""

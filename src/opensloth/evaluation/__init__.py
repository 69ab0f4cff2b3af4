"""Scoring a model on problems that it has not seen."""

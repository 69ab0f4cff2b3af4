"""Processes: which devices a run uses, starting its workers, and what becomes of their failures."""

"""OpenSloth: from a raw data set to a trained LoRA adapter.

The commands (`os-train`, `os-data`, `os-sft`) live in `opensloth.cli`; `docs/design.md` is the plan of the house.
"""

__version__ = "0.1.0"

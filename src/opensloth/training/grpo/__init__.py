"""GRPO: completions of prompts, compared within their groups."""

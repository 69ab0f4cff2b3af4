"""From raw data to prepared data: sources, messages, the prompt contract, token rows, packs and shards.

No training happens here and no model is loaded; a tokenizer is all that this room needs.
"""

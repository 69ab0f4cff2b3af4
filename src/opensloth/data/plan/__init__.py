"""Which rows lie in which pack, on which shard, in which optimizer step: from lengths and a seed alone."""

"""The training processes: what happens between prepared data and an adapter."""

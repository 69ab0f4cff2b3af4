"""Every setting, said once: type, bound, default, one sentence of help. Options, files and docs derive from it."""

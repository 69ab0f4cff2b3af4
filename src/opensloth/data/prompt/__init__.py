"""The prompt contract: how a conversation becomes text, in training, evaluation and serving alike."""

"""Which model is meant, and its tokenizer; weights are the business of the engines."""

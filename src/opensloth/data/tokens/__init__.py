"""From text to token ids and labels."""

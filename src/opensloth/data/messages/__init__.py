"""From a row of any known format to a conversation."""

"""SFT: packs of rows, and the mean loss over their trained tokens."""

"""The directory of prepared data: written by `prepare`, read by training."""

"""`os-data show`: a look into prepared data, in the terminal or as one HTML file."""

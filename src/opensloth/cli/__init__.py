"""The programs: they parse, call the rooms below and print. Nothing here loads torch to show its help."""

"""What is judged: one diagnosis = one file, each ending in a record ``DIAGNOSIS``."""

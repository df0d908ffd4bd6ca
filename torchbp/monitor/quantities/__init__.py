"""What is measured: one quantity = one file, each ending in a record ``QUANTITY``."""

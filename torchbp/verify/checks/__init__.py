"""One check = one file, each ending in the record ``CHECK``."""

"""Ops that are random omission. One op = one file."""

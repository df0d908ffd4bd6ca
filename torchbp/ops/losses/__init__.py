"""Ops that are scalar objectives. One op = one file."""

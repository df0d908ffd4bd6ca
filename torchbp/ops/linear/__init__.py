"""Ops that are affine maps. One op = one file."""

"""Ops that are mean, variance and scale. One op = one file."""

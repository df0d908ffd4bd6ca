"""Ops that are elementwise (or nearly) non-linearities. One op = one file."""

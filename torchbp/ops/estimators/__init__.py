"""Layers whose point is their backward, which is not the derivative of their forward. One op = one file."""

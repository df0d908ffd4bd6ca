"""``torchbp.watch`` inside frameworks that own the training loop; each file needs its framework only."""

"""One mechanical change at a time to the hand-written backward passes of torchbp: how many does gradcheck see?

Nobody chose these faults, so the score is not that of the faults one thinks of. `sources.py` finds the functions that
compute gradients, `changes.py` changes one of their expressions, `running.py` runs gradcheck on the changed op in a
process of its own, and `sweep.py` says of what gradcheck passes whether it differs from the right op at all.
"""

"""lean: train the same network, to the same bits, in far less memory. Recipes are kept instead of tensors.

A tensor's way: ``_scope`` hands to ``_graph`` what an op wants to keep; that finds, by the note of an op of torchbp, by
a rule of ``_torch``, how it is made again, where nobody has written to what that takes (``_leaves``), and a budget
lets it go (``_budget``). In its place stands one of ``_kept``: the tensor, or a recipe, which backward opens. ``_lean``
is the public face, ``_memory`` the accounts of it all, by what is alive (``_live``) in which layer (``_layer``).
"""

from torchbp.recompute._lean import lean as lean
from torchbp.recompute._lean import lean_scope as lean_scope
from torchbp.recompute._lean import revert as revert
from torchbp.recompute._memory import memory as memory

__all__ = ["lean", "lean_scope", "memory", "revert"]

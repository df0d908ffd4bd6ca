"""lean: train the same network, to the same bits, in far less memory. Recipes are kept instead of tensors."""

from torchbp.recompute._lean import lean as lean
from torchbp.recompute._lean import lean_scope as lean_scope
from torchbp.recompute._lean import revert as revert
from torchbp.recompute._memory import memory as memory

__all__ = ["lean", "lean_scope", "memory", "revert"]

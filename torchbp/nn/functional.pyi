# For type checkers alone: at run time torchbp.nn.functional is torchbp.functional.
from torchbp.functional import *

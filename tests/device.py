"""Where the tests compute: what ``--device`` says, the CPU by default. Set before any test module is imported."""

DEVICE = "cpu"

"""COMPUTE: one op = one file; how such a file reads is in README.md beside this one."""

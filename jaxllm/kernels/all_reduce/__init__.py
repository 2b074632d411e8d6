"""Sums over the GPUs of one process, through memory that each of them lets the others write to."""

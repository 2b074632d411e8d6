"""The choice of experts."""

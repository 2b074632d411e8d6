"""What lies between products: residual, norm, act(gate) * up, and their quantisation, a row at a time."""

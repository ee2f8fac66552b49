"""The hot operators behind one interface; `reference` runs them with stock PyTorch."""

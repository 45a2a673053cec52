"""The parts of src/attacks.py: contract and gradients, balls, Auto-PGD, FAB, Square and others."""

"""What src/attacks.py is made of: the contract and gradients, balls, Auto-PGD, Square."""

"""What clients may ask for: one handler an operation, and the way of a submit from its request to its answer."""

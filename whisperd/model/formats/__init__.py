"""Kinds of model files: each module here reads one kind into `Weights`."""

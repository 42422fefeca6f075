"""The lanes: copying, decoding, the model. Each turns what waits into helper messages, and answers into store calls."""

"""`whisperd setup`: the first five minutes of somebody without root."""

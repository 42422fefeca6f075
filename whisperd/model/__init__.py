"""The model helper: the only part of whisperd that imports torch and whisper."""

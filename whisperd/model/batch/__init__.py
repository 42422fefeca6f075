"""Many windows through one model at once, each with the words that openai-whisper would have found alone."""

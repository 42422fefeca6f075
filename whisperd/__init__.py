"""whisperd: one daemon that owns the GPU, so that every program on the machine can have Whisper."""

__version__ = "0.1.0"

"""The helpers that touch users' audio: the copier and the decoder. Only the decoder's modules import av."""

"""The loop and its memory: no torch, no av, no yt_dlp."""

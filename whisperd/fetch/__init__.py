"""The fetch helper: downloads by yt-dlp. The only importer of yt_dlp, and the only code that touches the network."""

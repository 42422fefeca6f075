"""First on the path of a daemon under test, this makes YouTube's extractor find every video on the test's own server.

All else is yt-dlp's: the address is recognised, the extractor chosen, the media downloaded, errors told by it.
"""

from __future__ import annotations

import os
import sys
from typing import Any

if "whisperd.fetch.fetcher" in sys.orig_argv:
    # As the fetcher itself does before it imports yt-dlp.
    os.environ["YTDLP_NO_PLUGINS"] = "1"
    sys.modules["curl_cffi"] = None  # type: ignore[assignment]
    from yt_dlp.extractor.youtube import YoutubeIE

    def _real_extract(self: Any, url: str) -> dict[str, Any]:
        video_id = self._match_id(url)
        media = f"{os.environ['TEST_YOUTUBE']}/{video_id}.wav"
        return {"id": video_id, "title": f"Video {video_id}", "url": media, "ext": "wav", "vcodec": "none"}

    YoutubeIE._real_extract = _real_extract

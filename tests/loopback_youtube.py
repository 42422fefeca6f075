"""The fetch helper, whose YouTube is a server on loopback: `python -m tests.loopback_youtube --fd N`.

yt-dlp's own extractor as it is, but for the one request that asks YouTube's player for a video: that goes to
$YOUTUBE_URL/<id>. What becomes of the answer, and what is said of it, is yt-dlp's and ours.
"""

from __future__ import annotations

import os
from typing import Any

from whisperd.fetch import fetcher  # first: it says how yt-dlp is to be imported

from yt_dlp.extractor.youtube import YoutubeIE as RealYoutubeIE  # isort: skip
from yt_dlp.extractor import gen_extractor_classes  # isort: skip
from yt_dlp.globals import extractors  # isort: skip


class YoutubeIE(RealYoutubeIE):  # type: ignore[misc]
    """yt-dlp's, asking one player that needs neither a web page nor JavaScript."""

    def _get_requested_clients(self, *args: Any) -> list[str]:
        return ["visionos"]

    def _download_initial_webpage(self, *args: Any) -> None:
        return None

    def _download_initial_data(self, *args: Any) -> dict[str, Any]:
        return {}

    def _download_ytcfg(self, *args: Any) -> dict[str, Any]:
        return {}

    def _extract_player_response(self, client: str, video_id: str, **_: Any) -> Any:
        return self._download_json(f"{os.environ['YOUTUBE_URL']}/{video_id}", video_id)


def main() -> None:
    """Run the helper until its daemon ends."""
    gen_extractor_classes()  # fills the table
    extractors.value["YoutubeIE"] = YoutubeIE
    fetcher.main()


if __name__ == "__main__":
    main()

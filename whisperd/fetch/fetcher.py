"""The fetch helper's process: one download at a time, of a recording or a model, for as long as its daemon lives."""

from __future__ import annotations

import datetime
import logging
import os
import resource
import sys
from pathlib import Path
from typing import Any

from whisperd.protocol.catalogue import Checkpoint
from whisperd.protocol.errors import ErrorCode, WhisperdError
from whisperd.protocol.helper_messages import (
    Fetch,
    Fetched,
    FetchFailed,
    FetchWeights,
    HelperMessage,
    WeightsFetched,
)
from whisperd.protocol.helpers import start
from whisperd.protocol.tasks import Perform, Task, serve

log = logging.getLogger("whisperd.fetch")

# Read when yt-dlp is imported: whatever code lies in somebody's plugin folder, it is not run here.
os.environ["YTDLP_NO_PLUGINS"] = "1"
# A library that connects in C, where the guard cannot look. yt-dlp uses it if it is there, and does without it.
sys.modules["curl_cffi"] = None  # type: ignore[assignment]

from whisperd.fetch.download import Fetcher, Settings  # noqa: E402
from whisperd.fetch.explain import explain  # noqa: E402
from whisperd.fetch.guard import Guard, is_anything, is_public  # noqa: E402
from whisperd.fetch.runtime import describe, find_programs  # noqa: E402
from whisperd.fetch.weights import WeightsFetcher  # noqa: E402


def main() -> None:
    """Run the helper until its daemon ends."""
    link = start("fetcher")
    given: dict[str, Any] = dict(link.settings)
    # A core would hold somebody's cookies.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    programs = find_programs()
    allowed = is_anything if given.pop("fetch_allow_private") else is_public
    guard = Guard(allowed=allowed, programs=programs.values())
    guard.install()
    about = describe(programs, datetime.date.today())
    link.gauges = lambda: about
    link.beat()  # a short download may be over before the next one
    settings = Settings(**given | {"spool": Path(given["spool"]), "cache_dir": Path(given["cache_dir"])})
    fetcher, weights_fetcher = Fetcher(settings, guard, programs), WeightsFetcher(settings, guard, os.environ)

    def fetch(task: Task, order: Fetch, descriptors: list[int]) -> HelperMessage:
        found = fetcher.fetch(order.source, uid=order.uid, folder=order.folder, checkpoint=task.checkpoint)
        return Fetched(
            run=order.run,
            generation=order.generation,
            sha256=found.sha256,
            size_bytes=found.size_bytes,
            title=found.title,
        )

    def fetch_weights(task: Task, order: FetchWeights, descriptors: list[int]) -> HelperMessage:
        wanted = Checkpoint(file_name=order.file_name, sha256=order.sha256)
        path = weights_fetcher.fetch(wanted, task.checkpoint)
        return WeightsFetched(run=order.run, generation=order.generation, path=str(path))

    serve(link, {Fetch: telling_why(fetch), FetchWeights: telling_why(fetch_weights)})


def telling_why(perform: Perform) -> Perform:
    """Return `perform` with its failures told as `FetchFailed`, which says whether to try again."""

    def explained(task: Task, order: Any, descriptors: list[int]) -> HelperMessage:
        try:
            return perform(task, order, descriptors)
        except WhisperdError as error:
            if error.code == ErrorCode.CANCELLED:
                raise
            why = explain(error)  # also of a disk, of which the spool's functions speak
            log.info("run=%d code=%s message=%s", order.run, why.code, why.message)
            return FetchFailed(
                run=order.run,
                generation=order.generation,
                code=why.code,
                message=why.message,
                transient=why.transient,
                wait_s=why.wait_s,
            )

    return explained


if __name__ == "__main__":
    main()

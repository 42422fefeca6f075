"""The model helper's process: loaded, unloaded, watched and started again. What it works on is the model lane's matter.

Says `model` in `health`. Restarts a helper that died, with growing pauses; gives up on a model that does not load until
an administrator asks again.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from whisperd.daemon.config import Config
from whisperd.daemon.helpers.helper import ExitReason, Helper
from whisperd.daemon.lanes.arrival import Arrival
from whisperd.daemon.lanes.weights import WeightsLane
from whisperd.daemon.loop import Loop, Timer
from whisperd.protocol.catalogue import CHECKPOINTS, Checkpoint
from whisperd.protocol.errors import WhisperdError
from whisperd.protocol.helper_messages import Heartbeat, HelperMessage, ModelStatus, SampleTried, TrySample

log = logging.getLogger("whisperd.model")

_MAX_FAILED_LOADS = 3
_MODEL_FILES = ("model.bin", "*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json")


class ModelProcess:
    """One model helper after the other.

    `on_status` is called when the status has changed, `on_message` for what the helper says of runs, `on_gone(died)`
    when it has ended; `died` is False where we ended it ourselves. `is_busy` says whether it has work: then it must
    show progress. `on_sample(well)` tells how the sample went, after `try_sample`. `make_helper` is there for tests.
    """

    def __init__(
        self,
        loop: Loop,
        config: Config,
        *,
        spool: Path,
        env: Mapping[str, str],
        weights: WeightsLane,
        on_status: Callable[[], None],
        on_message: Callable[[HelperMessage], None],
        on_gone: Callable[[bool], None],
        on_sample: Callable[[bool], None],
        is_busy: Callable[[], bool],
        make_helper: Callable[..., Helper] = Helper,
    ) -> None:
        self._loop, self._config, self._spool, self._env = loop, config, spool, env
        self._on_status, self._on_message, self._on_gone, self._is_busy = on_status, on_message, on_gone, is_busy
        self._on_sample, self._make_helper = on_sample, make_helper
        self._to_try = False  # the next process is ready only once it has got through the sample
        self._loaded: ModelStatus | None = None  # it tries the sample; this is its status when it gets through
        self._sick = ""  # why it did not
        self.helper: Helper | None = None
        self.status = self._no_status("unloaded")
        self._loading_overdue: Timer | None = None
        self._restart: Timer | None = None
        self._failed_loads = 0
        self._last_beat = -1
        self._last_beat_at = 0.0
        self._ending = ""  # why we end the helper ourselves; such an end is nobody's fault
        self._stuck = False  # it was killed, and does not end
        self.left: Callable[[], None] = lambda: None  # the process has gone, and none comes after it
        self.held = False  # unloaded by an administrator: stays so until he loads it
        self.asleep = False  # unloaded for want of work: the next job loads it
        self.identity: list[Any] = []  # what tells this model's results from another's
        self.starts = 0
        self.crashes = 0
        self.gauges: dict[str, Any] = {}
        self.arrival = Arrival(weights, config.model, on_status, self._arrived)
        weights.fetched = self._weights_fetched

    def show(self) -> dict[str, Any]:
        """Return `model` as `health` shows it."""
        status = self.status
        return {
            "name": status.name,
            "state": status.state,
            "device": status.device,
            "dtype": status.dtype,
            "error": status.error,
            "progress": self.arrival.progress,
        }

    @property
    def ready(self) -> Helper | None:
        """The helper, while it takes work."""
        helper = self.helper
        takes_work = helper is not None and helper.alive and self.status.state == "ready" and not self._ending
        return helper if takes_work else None

    # -- loading and unloading -------------------------------------------------------------------------------------

    def load(self) -> None:
        """Start the helper, unless it is there."""
        self.held = self.asleep = False
        if self._restart is not None:
            self._restart.cancel()
            self._restart = None
        self._failed_loads = 0
        if self.helper is None:
            self._spawn()
        elif self._ending or self.status.state == "failed":
            # `_on_exit` starts the next one.
            self._set_status(self._no_status("loading"))
            self.end("loading again")

    def unload(self) -> None:
        """End the helper, which gives all its memory back."""
        self.held, self.asleep = True, False
        self.arrival.give_up()
        self._set_status(self._no_status("unloaded"))
        if self._restart is not None:
            self._restart.cancel()
            self._restart = None
        if self.helper is not None:
            self.end("unloaded")

    def fall_asleep(self) -> None:
        """Unload for want of work."""
        self.asleep = True
        self._set_status(self._no_status("unloaded"))
        self.end("nothing to do")

    def stop(self) -> None:
        """The daemon stops: end the helper."""
        self.held, self.asleep = True, False
        if self.helper is not None:
            self.end("the daemon stops")

    def end(self, reason: str) -> None:
        """End the helper, by nobody's fault; unless it is to stay away, another takes its place."""
        self._ending = reason
        assert self.helper is not None
        self.helper.kill(reason)

    def try_sample(self) -> None:
        """Let the next process transcribe the shipped sample first: one that dies of that is no recording's fault."""
        self._to_try = True

    def _arrived(self, error: WhisperdError | None) -> None:
        if error is None:
            self._spawn()
        else:
            self._set_status(self._no_status("failed", error.message))

    def _weights_fetched(self, wanted: Checkpoint) -> None:
        """A model's file has come: the one that was missing or damaged here is tried again."""
        if self.status.state == "failed" and wanted == self.arrival.wanted:
            self.load()

    def _spawn(self) -> None:
        self.identity = model_identity(self._config, self.arrival.wanted)
        if self.arrival.is_needed():
            self._set_status(self._no_status("downloading"))
            self.arrival.begin()
            return
        self.starts += 1
        self._ending = ""
        self._last_beat, self._last_beat_at = -1, self._loop.time()
        config = self._config
        self._set_status(self._no_status("loading"))
        try:
            self.helper = helper = self._start_helper()
        except OSError as error:  # no descriptor is left
            self._start_again_later(f"could not be started: {error}", was_ready=False)
            return
        self._loading_overdue = self._loop.call_later(
            config.model_load_timeout_s, lambda: helper.kill(f"did not load in {config.model_load_timeout_s:g} s")
        )

    def _start_helper(self) -> Helper:
        config = self._config
        return self._make_helper(
            self._loop,
            role="model",
            module="whisperd.model.main",
            settings={
                "spool": str(self._spool),
                "cache_dir": str(config.cache_dir),
                "model": self.arrival.path or config.model,
                "device": config.device,
                "threads": config.threads,
                "dtype": config.dtype,
                "open_runs": config.open_runs,
                "fast_windows": config.fast_windows,
                "batch_windows": config.batch_windows,
                "device_memory_mb": config.device_memory_mb,
                "interactive_windows_in_a_row": config.interactive_windows_in_a_row,
            },
            nice=config.helper_nice,
            log_level=config.log_level,
            env=self._env,
            on_message=self._hear,
            on_exit=self._on_exit,
            on_stuck=self._on_stuck,
            heartbeat_timeout_s=config.heartbeat_timeout_s,
        )

    def _no_status(self, state: str, error: str | None = None) -> ModelStatus:
        return ModelStatus(state=state, name=self._config.model, error=error)

    def _set_status(self, status: ModelStatus) -> None:
        if status.state != self.status.state:
            log.info("model=%s state=%s device=%s error=%s", status.name, status.state, status.device, status.error)
        self.status = status
        if status.state != "loading" and self._loading_overdue is not None:
            self._loading_overdue.cancel()
            self._loading_overdue = None
        self._on_status()

    # -- life and death --------------------------------------------------------------------------------------------

    def _hear(self, helper: Helper, message: HelperMessage) -> None:
        if helper is not self.helper or self._ending:
            return
        match message:
            case ModelStatus():
                if message.state == "ready":
                    self._failed_loads = 0
                if message.state == "ready" and self._to_try:
                    log.info("model: the sample is tried pid=%d", helper.pid)
                    self._loaded = message
                    helper.send(TrySample())
                else:
                    self._set_status(message)
            case SampleTried():
                self._sample_tried(helper, message)
            case Heartbeat():
                self._check_beat(message)
            case _:
                self._on_message(message)

    def _sample_tried(self, helper: Helper, tried: SampleTried) -> None:
        if tried.error:
            self._sick = tried.error
            helper.kill(f"the sample failed: {tried.error}")
        elif self._loaded is not None:
            status, self._loaded, self._to_try = self._loaded, None, False
            self._on_sample(True)
            self._set_status(status)

    def _check_beat(self, heartbeat: Heartbeat) -> None:
        """A helper whose work stands still is dead, however well its heart beats."""
        self.gauges = heartbeat.gauges
        now = self._loop.time()
        if heartbeat.beat != self._last_beat or not (self._is_busy() or self._loaded):
            self._last_beat, self._last_beat_at = heartbeat.beat, now
        elif now - self._last_beat_at > self._config.stall_timeout_s and self.helper is not None:
            self.helper.kill(f"no progress for {self._config.stall_timeout_s:g} s")

    def _on_stuck(self, helper: Helper) -> None:
        """It is of no use any more: what it had goes back to the queue. Should it end after all, another one comes."""
        if helper is not self.helper:
            return
        if not self._stuck:
            self._stuck = True
            self._on_gone(not self._ending)
        self._set_status(
            self._no_status(
                "failed", f"its process {helper.pid} cannot be ended (its driver or a disk hangs): restart the machine"
            )
        )

    def _on_exit(self, helper: Helper, reason: ExitReason) -> None:
        if helper is not self.helper:
            return
        self.helper = None
        ours = bool(self._ending)
        was_ready = self.status.state == "ready"
        at_the_sample, self._loaded = self._loaded is not None, None
        if not ours:
            self.crashes += 1
            log.error("model helper died reason=%s", reason.reason)
        self.gauges = {}
        if not self._stuck:
            self._on_gone(not ours)
        self._ending, self._stuck = "", False
        if self.held or self.asleep:
            self._set_status(self._no_status("unloaded"))
            self.left()
        elif ours:
            self._spawn()
        elif at_the_sample:
            self._on_sample(False)
            self._rest(self._sick or reason.reason)
        else:
            self._start_again_later(reason.reason, was_ready=was_ready)
        self._sick = ""

    def _rest(self, reason: str) -> None:
        """The device is sick: work on nothing for a while, then try the sample again."""
        rest_s = self._config.sick_rest_s
        self._set_status(
            self._no_status(
                "failed",
                f"its process died of whisperd's own sample ({reason}): the device, its driver or the memory is at "
                f"fault, and no job is blamed; see the daemon's log and `nvidia-smi`. It is tried again after "
                f"{rest_s:g} s, or with `whisperctl model load`",
            )
        )
        self._restart = self._loop.call_later(rest_s, self._spawn_again)

    def _start_again_later(self, reason: str, *, was_ready: bool) -> None:
        self._failed_loads = 0 if was_ready else self._failed_loads + 1
        if self._failed_loads >= _MAX_FAILED_LOADS:
            self._set_status(
                self._no_status(
                    "failed",
                    f"the model process ended {self._failed_loads} times while loading ({reason}): see the "
                    "daemon's log, free memory or choose a smaller model, then `whisperctl model load`",
                )
            )
            return
        self._set_status(self._no_status("loading"))
        config = self._config
        delay_s = min(config.helper_backoff_max_s, config.helper_backoff_s * 2**self._failed_loads)
        self._restart = self._loop.call_later(delay_s, self._spawn_again)

    def _spawn_again(self) -> None:
        self._restart = None
        if self.helper is None and not self.held:
            self._spawn()


def model_identity(config: Config, named: Checkpoint | None) -> list[Any]:
    """Return what tells one model's results from another's: its name and type, and its files' sizes and ages.

    As of the helper's start: a file that is replaced under a loaded model does not change what that answers. The type
    as it is set: what `auto` comes to is known once the model is loaded, and jobs are accepted before.
    """
    identity: list[Any] = [config.model, config.dtype]
    if named is not None:  # a name of the configuration's own list may come to mean another file
        return identity if config.model in CHECKPOINTS else [*identity, named.sha256]
    # Not a path but a name; `~` of somebody unknown; or it cannot be read: the helper says what is wrong.
    with contextlib.suppress(OSError, RuntimeError):
        path = Path(config.model).expanduser()
        for file in _files_of(path) if path.is_dir() else [path]:
            status = file.stat()
            identity += [status.st_size, status.st_mtime_ns]
    return identity


def _files_of(folder: Path) -> list[Path]:
    """Return the files that a model's folder is read from, in CTranslate2's or in Hugging Face's format."""
    return sorted(file for pattern in _MODEL_FILES for file in folder.glob(pattern))

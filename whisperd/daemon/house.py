"""The house: the parts of the daemon, put together once, and the few questions that concern them all."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

from whisperd.daemon.admission import Admission
from whisperd.daemon.config import Config, admin_uids
from whisperd.daemon.lanes.copying import CopyLane
from whisperd.daemon.lanes.decoding import DecodeLane
from whisperd.daemon.lanes.fetching import FetchLane
from whisperd.daemon.lanes.modelling import ModelLane
from whisperd.daemon.lanes.pool import Pool
from whisperd.daemon.lanes.weights import WeightsLane
from whisperd.daemon.loop import Loop
from whisperd.daemon.metrics import Metrics
from whisperd.daemon.scheduler import Turns
from whisperd.daemon.state.board import Board
from whisperd.daemon.state.disk import Disk
from whisperd.daemon.state.housekeeping import ClockGuard, Housekeeping, doubt_at, seen_at
from whisperd.daemon.state.inventory import Inventory
from whisperd.daemon.state.ledger import Ledger
from whisperd.daemon.state.spool import Spool
from whisperd.daemon.state.telling import Teller
from whisperd.daemon.store import DAY_S, Retention, Store
from whisperd.daemon.store.database import Database
from whisperd.daemon.store.opening import StateError
from whisperd.daemon.store.rows import Change
from whisperd.daemon.underway import UnderWay
from whisperd.daemon.uploads import Uploads
from whisperd.daemon.watchers import Watchers
from whisperd.daemon.wire.server import Peer
from whisperd.protocol.errors import ErrorCode, WhisperdError
from whisperd.protocol.systemd import child_environment

log = logging.getLogger("whisperd")

_LEAST_GRACE_S = 1.0


class House:
    """Everything the handlers reach: loop, configuration, ledger, lanes."""

    def __init__(self, loop: Loop, config: Config, database: Database) -> None:
        self.loop, self.config = loop, config
        self.started_at = loop.time()
        self.stopping = False
        self.connections: Callable[[], int] = lambda: 0  # the server's count, once there is a server
        self._admins = admin_uids(config)
        store = Store(
            Retention(
                jobs_s=config.retention_days * DAY_S,
                keys_s=config.key_retention_days * DAY_S,
                failed_audio_s=config.keep_failed_audio_hours * 3600,
                jobs_per_user=config.jobs_per_user,
                unlimited=self.is_admin,
            )
        )
        self.board, self.metrics = Board(self._turns()), Metrics()
        self.watchers = Watchers(most_per_user=config.watches_per_user, unlimited=self.is_admin)
        mark, grace_s = config.state_dir / "whisperd.lock", config.clock_grace_hours * 3600
        guard = ClockGuard(grace_s=grace_s, seen_at=seen_at(mark), doubt=doubt_at(mark))
        self.ledger = Ledger(
            database=database,
            store=store,
            board=self.board,
            watchers=self.watchers,
            teller=Teller(loop, self.board, self.watchers),
            spool=Spool(config.state_dir / "spool"),
            metrics=self.metrics,
            clock=guard.date,
        )
        self.database = database
        self.inventory = Inventory(loop, self.ledger, str(database.path))
        env = child_environment()
        self.copying = self._copy_lane("copier", config.copiers, config.copy_timeout_s, env)
        # A receiver also waits for its client, whose time is kept by the upload itself.
        receive_timeout_s = config.copy_timeout_s + config.upload_timeout_s
        self.receiving = self._copy_lane("receiver", config.receivers, receive_timeout_s, env)
        self.uploads = Uploads()
        self.decoding = DecodeLane(
            lambda freed: self._pool("decoder", config.decoders, config.decode_timeout_s, env, freed),
            self.ledger,
            loop,
            ahead=config.decode_ahead,
            full_disk_pause_s=config.full_disk_pause_s,
            room=lambda: self.disk.free_bytes - config.decoding_free_bytes,
            turns=self._turns(),
        )
        self.weights = WeightsLane(
            lambda freed: self._pool("fetcher", 1, config.fetch_timeout_s, env, freed), loop, config, env
        )
        self.modelling = ModelLane(loop, config, self.ledger, env, self.weights)
        self.model = self.modelling.process  # what is to be known of the model
        self.fetching = FetchLane(
            lambda freed: self._pool("fetcher", config.fetchers, config.fetch_timeout_s, env, freed),
            self.ledger,
            loop,
            config,
            lambda: self.model.identity,
            lambda: self.modelling.paused,
            lambda: self.disk.free_bytes - config.kept_free_bytes,
        )
        self.disk = Disk(loop, config, self.ledger, database.ballast, lambda: self._changed(Change()))
        self.housekeeping = Housekeeping(loop, self.ledger, guard, mark)
        self.admission = Admission(config, self.board, self.disk, self.is_admin)
        self.under_way = UnderWay()
        self.ledger.when_changed.append(self._changed)

    def _copy_lane(self, role: str, size: int, silent_s: float, env: dict[str, str]) -> CopyLane:
        return CopyLane(
            lambda freed: self._pool(role, size, silent_s, env, freed),
            self.ledger.spool,
            self.loop,
            limit_s=self.config.copy_limit_s,
            per_user=self.config.copies_per_user,
            unlimited=self.is_admin,
            turns=self._turns(),
        )

    def _turns(self) -> Turns:
        """Return the memory of one lane, of who had his turn."""
        return Turns(self.config.interactive_in_a_row)

    def _pool(self, role: str, size: int, silent_s: float, env: dict[str, str], freed: Callable[[], None]) -> Pool:
        config = self.config
        settings: dict[str, Any] = {"spool": str(self.ledger.spool.path), "min_free_bytes": config.kept_free_bytes}
        address = None
        if role == "decoder":
            settings["min_free_bytes"] = config.decoding_free_bytes
        if role == "fetcher":
            settings |= {"spool": str(self.ledger.spool.downloads), "cache_dir": str(config.cache_dir)}
            address = Path(config.fetch_socket) if config.fetch_socket else None
        names = {
            "copier": ("max_source_bytes",),
            "receiver": (),
            "decoder": ("max_audio_s", "decode_cpu_s", "decode_memory_mb"),
            "fetcher": (
                *("fetch_extractors", "fetch_allow_private", "fetch_cookies", "fetch_timeout_s", "fetch_limit_s"),
                *("max_source_bytes", "max_audio_s", "models_url"),
            ),
        }
        package = "fetch" if role == "fetcher" else "audio"
        return Pool(
            self.loop,
            config,
            role=role,
            module=f"whisperd.{package}.{role}",
            size=size,
            silent_s=silent_s,
            settings=settings | {name: getattr(config, name) for name in names[role]},
            env=env,
            freed=freed,
            address=address,
        )

    # -- life --------------------------------------------------------------------------------------------------

    def recover(self) -> None:
        """Read what an earlier life left, put interrupted work back, sweep the spool. Before the socket is there.

        Raises `StateError` when the state folder cannot be worked with.
        """
        now, spool = self.ledger.clock(), self.ledger.spool
        try:
            live, named = self.database.run(lambda db: self.ledger.store.recover(db, now))
            spool.start(named)
            self.disk.prepare()
        except (sqlite3.Error, OSError, ValueError, TypeError) as error:
            raise StateError(
                f"the state in {self.config.state_dir} cannot be worked with: {error}. Check who owns it, and how much "
                "room its disk has"
            ) from None
        self.board.apply(live)
        for run in self.board.runs.values():
            if run.row.decoded:
                run.phase = "waiting for the model"
        if live.jobs:
            log.info("recovered jobs=%d runs=%d", len(live.jobs), len(live.runs))

    def start(self) -> None:
        """Start the store thread, the helpers and the housekeeping."""
        self.database.start()
        self.copying.pool.warm_up()
        self.decoding.pool.warm_up()
        self.modelling.load()
        self._changed(Change())
        self.housekeeping.go_on()
        self.disk.look()
        self.loop.call_later(self.config.attach_grace_s, self._drop_unheld)

    def stop(self) -> None:
        """End the helpers; running work returns to the queue, copies are refused."""
        self.stopping = True
        self.copying.stop()
        self.receiving.stop()
        self.fetching.stop()
        self.weights.stop()
        self.decoding.stop()
        self.modelling.stop()

    def when_helpers_left(self, then: Callable[[], object]) -> None:
        """After `stop`: call `then` once every helper process has ended and what it worked on is back in the queue."""
        pools = [lane.pool for lane in (self.copying, self.receiving, self.fetching, self.weights, self.decoding)]

        def look() -> None:
            if self.model.helper is None and not self.modelling.active and not any(pool.helpers for pool in pools):
                then()

        self.modelling.left = look
        for pool in pools:
            pool.left = look
        look()

    def _changed(self, change: Change) -> None:
        if self.stopping:
            return
        self.fetching.changed(change)
        self.decoding.changed(change)
        self.modelling.changed(change)

    def resume(self) -> None:
        """Go on after a pause."""
        self.modelling.resume()
        self.fetching.pump()

    def _drop_unheld(self, submitted_before: frozenset[int] = frozenset()) -> None:
        """After a restart: cancel the attached jobs whose holders did not come back.

        Who comes back with many files has them compared a few at a time, and the rest of his submits are not read yet:
        while any waits for its answer, and once more after that, his jobs are left alone.
        """
        submitting = self.admission.submitting()
        left = [job for job in self.board.jobs.values() if job.attached and not self.watchers.held(job.id)]
        spared = submitting | submitted_before
        for job in left:
            if job.uid not in spared:
                self.cancel_unheld(job.id)
        if any(job.uid in spared for job in left):
            grace_s = max(_LEAST_GRACE_S, self.config.attach_grace_s)
            self.loop.call_later(grace_s, lambda: self._drop_unheld(submitting))

    def hold(self, job_id: int, peer: Peer) -> None:
        """Tie an attached job to a connection; if that is gone already, it has lost its holder."""
        job = self.board.jobs.get(job_id)
        if job is None or not job.attached:
            return
        if not peer.closed:
            self.watchers.hold(job_id, peer)
        elif not self.watchers.held(job_id):
            self.cancel_unheld(job_id)

    def let_go(self, job_id: int, peer: Peer) -> None:
        """Take one `hold` back."""
        if self.watchers.let_go(job_id, peer) and not self.stopping:
            self.cancel_unheld(job_id)

    def cancel_unheld(self, job_id: int) -> None:
        """Cancel a job that has lost its last holder."""
        log.info("job=%d nobody holds it any more", job_id)
        store = self.ledger.store
        self.ledger.commit(lambda db, now: store.cancel(db, job_id, now, uid=None))

    def peer_closed(self, peer: Peer) -> None:
        """A client is gone: its waits end and its attached jobs lose a holder."""
        self.copying.client_left(peer.id)
        self.receiving.client_left(peer.id)
        self.uploads.client_left(peer)
        self.weights.client_left(peer.id)
        for job_id in self.watchers.forget_peer(peer):
            if not self.stopping:
                self.cancel_unheld(job_id)

    # -- questions -----------------------------------------------------------------------------------------------

    def is_admin(self, uid: int) -> bool:
        """True for root, the daemon's own user, and the users and groups of the setting `admins`."""
        return uid in self._admins

    def view_of(self, peer: Peer) -> int | None:
        """Return whose jobs a peer may see: None = everybody's."""
        return None if self.is_admin(peer.uid) else peer.uid

    def refuse_when_stopping(self) -> None:
        """Raise `stopping` once the daemon stops: nothing is begun any more."""
        if self.stopping:
            raise WhisperdError(ErrorCode.STOPPING, "the daemon is stopping: ask again when it is back")

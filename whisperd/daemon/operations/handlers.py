"""One function an operation, found by a table. A handler answers at once or arranges for the answer; it never waits."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from whisperd import __version__
from whisperd.daemon.house import House
from whisperd.daemon.lanes.weights import Listener
from whisperd.daemon.operations.call import Call
from whisperd.daemon.operations.health import health, status
from whisperd.daemon.operations.retrying import retry
from whisperd.daemon.operations.statistics import statistics
from whisperd.daemon.operations.submitting_fetch import submit_fetch
from whisperd.daemon.operations.submitting_file import submit_file
from whisperd.daemon.operations.submitting_upload import submit_upload
from whisperd.daemon.operations.turns import ask_in_turn
from whisperd.daemon.store import Answer, not_found
from whisperd.daemon.store.rows import Event, JobRow, RunRow, about
from whisperd.daemon.watchers import Subscription, Wait
from whisperd.daemon.wire.server import Peer
from whisperd.protocol import PROTOCOL_VERSION
from whisperd.protocol.abilities import check_abilities
from whisperd.protocol.errors import ErrorCode, WhisperdError
from whisperd.protocol.frames import Raw
from whisperd.protocol.messages import (
    Cancel,
    Chunk,
    FileSource,
    Forget,
    Health,
    Hello,
    Jobs,
    Model,
    Pause,
    Pull,
    Request,
    Result,
    Resume,
    Retry,
    Stats,
    Submit,
    Subscribe,
    UploadSource,
)

log = logging.getLogger("whisperd.handlers")

_EVENT_PAGE = 500


def dispatch(house: House, peer: Peer, request: Request, descriptors: list[int]) -> None:
    """Handle one request. What this raises is its answer, and nobody else's business: its connection sees to that."""
    _HANDLERS[type(request.params)](Call(house, peer, request.id, descriptors), request.params)


def _handle_hello(call: Call, params: Hello) -> None:
    uid = call.peer.uid
    you = {"uid": uid, "admin": call.house.is_admin(uid)}
    call.reply({"protocol": PROTOCOL_VERSION, "server": "whisperd", "version": __version__} | you)


def _handle_health(call: Call, params: Health) -> None:
    call.reply(health(call.house))


def _handle_submit(call: Call, params: Submit) -> None:
    model = call.house.model.status
    if model.traits:  # else it is not loaded: the job is accepted, and fails later of what the model cannot do
        check_abilities(params.options, model.traits, model.name)
    match params.source:
        case FileSource():
            submit_file(call, params)
        case UploadSource():
            submit_upload(call, params)
        case _:
            submit_fetch(call, params)


def _handle_chunk(call: Call, params: Chunk) -> None:
    call.house.uploads.take(call.peer, params, call.reply, call.fail)


def _handle_result(call: Call, params: Result) -> None:
    """Answer with the job, and with its transcript once it is done; wait for the end if asked to."""
    board, watchers = call.house.board, call.house.watchers
    live = board.jobs.get(params.job)
    view = call.view()
    if live is not None and view is not None and live.uid != view:
        raise not_found(params.job)
    if live is None or params.wait_s == 0:
        _answer(call, params.job)
        return

    watchers.admit(call.peer, call.id)

    def late() -> None:
        watchers.unwait(params.job, call.peer, call.id)
        _answer(call, params.job)

    timer = None if params.wait_s is None else call.house.loop.call_later(params.wait_s, late)
    watchers.wait(params.job, call.id, Wait(call.peer, lambda: _answer(call, params.job), timer))


def _answer(call: Call, job_id: int) -> None:
    store = call.house.ledger.store
    view = call.view()

    def then(answer: Answer) -> None:
        transcript = None if answer.transcript is None else Raw(answer.transcript)
        call.reply({"job": call.show(answer.job, answer.run), "transcript": transcript})

    read = partial(call.house.ledger.read, lambda db, now: store.answer(db, job_id, uid=view))
    ask_in_turn(call.peer, read, then, call.fail)


def _handle_jobs(call: Call, params: Jobs) -> None:
    if params.all and not call.house.is_admin(call.peer.uid):
        raise WhisperdError(ErrorCode.FORBIDDEN, "only administrators see everybody's jobs: leave out `all`")
    uid = None if params.all else call.peer.uid
    store = call.house.ledger.store

    def then(found: list[tuple[JobRow, RunRow]]) -> None:
        shown = [call.show(job, run) for job, run in found[: params.limit]]
        call.reply({"jobs": shown, "more": len(found) > params.limit})

    read = partial(
        call.house.ledger.read,
        lambda db, now: store.jobs(db, uid=uid, state=params.state, before=params.before, limit=params.limit + 1),
    )
    ask_in_turn(call.peer, read, then, call.fail)


def _handle_cancel(call: Call, params: Cancel) -> None:
    store, view = call.house.ledger.store, call.view()
    call.house.ledger.commit(
        lambda db, now: store.cancel(db, params.job, now, uid=view),
        lambda change: call.reply({"job": call.show(*about(change))}),
        call.fail,
        by=call.peer,
    )


def _handle_forget(call: Call, params: Forget) -> None:
    store, view = call.house.ledger.store, call.view()
    call.house.ledger.commit(
        lambda db, now: store.forget(db, params.job, uid=view),
        lambda change: call.reply({"job": call.show(*about(change))}),
        call.fail,
        by=call.peer,
    )


def _handle_subscribe(call: Call, params: Subscribe) -> None:
    """Answer with where the job is, push the events since `after_seq`, then push what comes."""
    uid = call.peer.uid
    call.house.watchers.admit(call.peer, call.id)
    if params.job is None:
        call.house.watchers.subscribe(Subscription(peer=call.peer, request_id=call.id, uid=uid, job_id=None))
        call.reply({"job": None, "last_seq": 0})
        return
    job_id = params.job
    store, view = call.house.ledger.store, call.view()

    def then(answer: Answer) -> None:
        call.reply({"job": call.show(answer.job, answer.run), "last_seq": answer.job.last_seq})
        known = params.after_seq
        subscription = Subscription(peer=call.peer, request_id=call.id, uid=uid, job_id=job_id, after_seq=known)
        # Of a job that has not come so far all is read that happens from now on: perhaps its end, which is told.
        _push_events(call, subscription, min(known, answer.job.last_seq))

    def failed(error: WhisperdError) -> None:
        call.house.watchers.release(call.peer, call.id)
        call.fail(error)

    call.house.ledger.read(
        lambda db, now: store.answer(db, job_id, uid=view, with_transcript=False), then, failed, by=call.peer
    )


def _end_subscription(call: Call) -> None:
    call.house.watchers.release(call.peer, call.id)
    call.peer.finish(call.id)


def _push_events(call: Call, subscription: Subscription, after_seq: int) -> None:
    """Push stored events behind `after_seq` page by page, as the reader takes them; then follow the job live.

    The last, incomplete page and what is committed after it arrive in commit order, so nothing falls between.
    """
    if call.peer.closed:
        return
    house, job_id = call.house, subscription.job_id
    assert job_id is not None, "of all jobs no past is told"

    def then(events: list[Event]) -> None:
        if call.peer.closed:
            return
        for event in events:
            subscription.push(event)
            if call.peer.pending_output > house.config.max_output_bytes // 2:
                # A reader who keeps up is not to be cut off for the length of the past.
                _push_events(call, subscription, event.seq)
                return
        if events and events[-1].kind == "end":
            _end_subscription(call)
        elif len(events) == _EVENT_PAGE:
            _push_events(call, subscription, events[-1].seq)
        elif job_id in house.board.jobs:
            house.watchers.subscribe(subscription)
            house.ledger.teller.came()
        else:
            _end_subscription(call)  # it ended before `after_seq`, or was forgotten meanwhile

    def failed(error: WhisperdError) -> None:
        _end_subscription(call)

    store = house.ledger.store
    read = partial(house.ledger.read, lambda db, now: store.events(db, job_id, after_seq=after_seq, limit=_EVENT_PAGE))
    ask_in_turn(call.peer, read, then, failed)


def _handle_model(call: Call, params: Model) -> None:
    _admins_only(call, "load or unload the model")
    call.house.refuse_when_stopping()
    if params.action == "load":
        call.house.modelling.load()
    else:
        call.house.modelling.unload()
    call.reply({"model": call.house.model.show()})


def _handle_pull(call: Call, params: Pull) -> None:
    """Answer that the download is asked for, push how far it is, and its end."""
    _admins_only(call, "download models")
    call.house.refuse_when_stopping()
    peer, number = call.peer, call.id

    def progressed(done: float, total: float) -> None:
        event = {"id": number, "event": "progress", "done_bytes": int(done), "total_bytes": int(total)}
        peer.push(number, event, skippable=True)

    def halted(error: WhisperdError, delay_s: float) -> None:
        peer.push(number, {"id": number, "event": "retry", "wait_s": delay_s, "error": error.to_wire()})

    def ended(outcome: Path | WhisperdError) -> None:
        if isinstance(outcome, WhisperdError):
            peer.push(number, {"id": number, "event": "end", "path": None, "error": outcome.to_wire()})
        else:
            peer.push(number, {"id": number, "event": "end", "path": str(outcome), "error": None})
        peer.finish(number)

    listener = Listener(owner=peer.id, progressed=progressed, halted=halted, ended=ended)
    call.house.weights.pull(params.model, listener)
    log.info("pull uid=%d model=%s", peer.uid, params.model)
    call.reply({"model": params.model})


def _handle_pause(call: Call, params: Pause) -> None:
    _admins_only(call, "pause the queue")
    call.house.refuse_when_stopping()
    call.house.modelling.pause(free_gpu=params.free_gpu)
    log.info("paused uid=%d free_gpu=%s", call.peer.uid, params.free_gpu)
    call.reply({"status": status(call.house)})


def _handle_resume(call: Call, params: Resume) -> None:
    _admins_only(call, "resume the queue")
    call.house.refuse_when_stopping()
    call.house.resume()
    log.info("resumed uid=%d", call.peer.uid)
    call.reply({"status": status(call.house)})


def _admins_only(call: Call, what: str) -> None:
    if not call.house.is_admin(call.peer.uid):
        raise WhisperdError(
            ErrorCode.FORBIDDEN, f"only administrators may {what}: ask one, or be added to the setting `admins`"
        )


_HANDLERS: Mapping[type[Any], Callable[[Call, Any], None]] = {
    Hello: _handle_hello,
    Health: _handle_health,
    Stats: statistics,
    Submit: _handle_submit,
    Chunk: _handle_chunk,
    Result: _handle_result,
    Jobs: _handle_jobs,
    Cancel: _handle_cancel,
    Retry: retry,
    Forget: _handle_forget,
    Subscribe: _handle_subscribe,
    Model: _handle_model,
    Pull: _handle_pull,
    Pause: _handle_pause,
    Resume: _handle_resume,
}

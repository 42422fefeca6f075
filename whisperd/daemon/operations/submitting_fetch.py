"""Submits of kind `video` and `url`: nothing to copy, so they are jobs as soon as they have their places."""

from __future__ import annotations

from whisperd.daemon.keys import fingerprints, source_key
from whisperd.daemon.operations.call import Call
from whisperd.daemon.operations.submitting import Submission
from whisperd.daemon.store import Known
from whisperd.protocol.messages import Submit, source_to_wire


def submit_fetch(call: Call, params: Submit) -> None:
    """Handle one submit of what is to be downloaded."""
    _FetchSubmission(call, params).begin()


class _FetchSubmission(Submission):
    """A submit without audio of its own."""

    def __init__(self, call: Call, params: Submit) -> None:
        super().__init__(call, params)
        self._source = source_to_wire(params.source)
        self._fingerprints = fingerprints([self._source], params.options)

    def _is_same(self, known: Known) -> bool:
        return known.fingerprint in self._fingerprints

    def _entered(self) -> None:
        house = self._house
        key = source_key(house.config, self._peer.uid, self._source, self._options, house.model.identity)
        self._commit(self._fingerprints[0], key, source_key=key)

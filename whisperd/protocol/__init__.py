"""What daemon, client and helpers share: frames, messages, jobs, errors, paths. Standard library and msgpack only."""

PROTOCOL_VERSION = 1

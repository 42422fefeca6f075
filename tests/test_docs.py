"""The documents tell everything that a user can say, set or get, and their examples are true."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import NO_MODEL, Daemon
from whisperd.daemon import main
from whisperd.daemon.config import SETTINGS
from whisperd.protocol import messages
from whisperd.protocol.errors import ErrorCode, WhisperdError
from whisperd.protocol.frames import MAX_DEPTH, MAX_REQUEST_ITEMS, encode_frame, parse_body
from whisperd.protocol.helper_messages import HelperMessage
from whisperd.protocol.jobs import Job, JobState, Priority
from whisperd.protocol.options import DEFAULTS, OWN_DEFAULTS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
PROTOCOL = (ROOT / "docs/protocol.md").read_text()


def section(page: str, heading: str) -> str:
    """Return what stands below a heading, up to the next of its kind or a higher one."""
    level = heading.partition(" ")[0]
    _, found, rest = page.partition(f"\n{heading}\n")
    assert found, f"no heading {heading!r}"
    return re.split(rf"^#{{1,{len(level)}}} ", rest, maxsplit=1, flags=re.MULTILINE)[0]


def code_names(text: str) -> set[str]:
    return set(re.findall(r"`([a-z_]+)`", text))


@pytest.mark.parametrize(
    ("folder", "heading"),
    [
        ("whisperctl", "## The client's rooms"),
        ("whisperd/daemon", "## The house"),
        ("whisperd/model", "## The model helper's rooms"),
        ("whisperd/model/batch", "## The batcher"),
    ],
)
def test_every_module_has_its_place_on_the_map(folder: str, heading: str) -> None:
    page = section((ROOT / "docs/architecture.md").read_text(), heading)
    modules = {path.stem for path in (ROOT / folder).glob("[!_]*.py")}
    assert modules - set(re.findall(r"`(\w+)(?:\.py)?`", page)) == set()


def test_every_message_of_helpers_has_its_place_on_the_map() -> None:
    link = section((ROOT / "docs/architecture.md").read_text(), "## The helper's link")
    assert {kind.__name__ for kind in HelperMessage.__args__} - set(re.findall(r"\b[A-Z]\w+", link)) == set()


def test_every_exit_code_of_the_daemon_is_explained() -> None:
    rows = re.findall(
        r"^\| (\d) \|", section((ROOT / "docs/operations.md").read_text(), "## Exit codes of whisperd"), re.M
    )
    assert {value for name, value in vars(main).items() if name.startswith("EXIT_")} | {0} == set(map(int, rows))


def test_every_error_code_is_explained() -> None:
    assert code_names(section(PROTOCOL, "## Errors")) >= set(ErrorCode)


def test_every_state_is_explained() -> None:
    assert code_names(section(PROTOCOL, "## The life of a job")) >= set(JobState)


def test_every_operation_is_explained() -> None:
    with pytest.raises(WhisperdError) as caught:
        messages.parse_request({"id": 1, "op": "?"})
    operations = caught.value.message.partition("known: ")[2].split(", ")
    chapter = section(PROTOCOL, "## Operations")
    headings = set(re.findall(r"^### (\w+)$", chapter, re.MULTILINE))
    assert set(operations) <= headings


@pytest.mark.parametrize(
    "operation", [messages.Submit, messages.Chunk, messages.Result, messages.Jobs, messages.Subscribe]
)
def test_every_parameter_is_explained(operation: type) -> None:
    chapter = section(PROTOCOL, f"### {operation.__name__.lower()}")
    assert code_names(chapter) >= {field.name for field in dataclasses.fields(operation)}


def test_every_key_of_a_job_is_explained() -> None:
    assert code_names(section(PROTOCOL, "### Job")) >= {field.name for field in dataclasses.fields(Job)}


def test_every_option_and_its_default_are_explained() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \|", section(PROTOCOL, "### Options"), re.MULTILINE)
    words = {"null": None, "true": True, "false": False}
    assert {name for name, _ in rows} == set(DEFAULTS | OWN_DEFAULTS)
    for name, default in rows:
        shown, value = default.strip("`"), (DEFAULTS | OWN_DEFAULTS)[name]
        assert shown in (str(value), f'"{value}"') or words.get(shown, "") is value, name


def test_every_key_of_stats_is_explained(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon(model=NO_MODEL)
    with daemon.client() as client:
        stats = client.call("stats")
    keys = re.findall(r"`([\w.]+)`", "".join(re.findall(r"^\| (`.*?) \|", section(PROTOCOL, "### Stats keys"), re.M)))
    explained = {
        key.replace("STATE", state).replace("PRIORITY", priority)
        for key in keys
        for state in JobState
        for priority in Priority
    }
    assert set(dotted(stats)) == explained


def dotted(value: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, inner in value.items():
        if isinstance(inner, dict):
            yield from dotted(inner, f"{prefix}{key}.")
        else:
            yield prefix + key


def test_the_bounds_are_those_of_the_code() -> None:
    bounds = section(PROTOCOL, "## Bounds")
    assert f"| a key | {messages.MAX_KEY_BYTES} bytes |" in bounds
    assert f"| a file's name | {messages.MAX_NAME_BYTES} bytes |" in bounds
    assert f"| a URL | {messages.MAX_URL_BYTES:,} bytes |" in bounds
    assert f"| data of a chunk | {messages.MAX_CHUNK_BYTES:,} bytes |" in bounds
    assert f"| chunks of an upload on their way | {messages.MAX_UNANSWERED_CHUNKS} |" in bounds
    assert f"| lists and maps in a request | {MAX_REQUEST_ITEMS:,} items |" in bounds
    assert f"| nesting | {MAX_DEPTH} |" in bounds
    assert f"| jobs in one answer of `jobs` | {messages.MAX_JOBS_LIMIT} |" in bounds


def test_the_worked_example_is_true_to_the_byte(start_daemon: Callable[..., Daemon]) -> None:
    blocks = re.findall(r"^```bytes\n(.*?)^```", PROTOCOL, re.MULTILINE | re.DOTALL)
    request, reply = (
        bytes.fromhex("".join(re.match(r"(?:[0-9a-f]{2} )+", line + " ")[0] for line in block.splitlines()))  # type: ignore[index]
        for block in blocks
    )
    assert request == encode_frame({"id": 1, "op": "cancel", "params": {"job": 300}})
    assert messages.parse_request(parse_body(request[4:])).params == messages.Cancel(job=300)
    daemon = start_daemon(model=NO_MODEL)
    with daemon.client() as client:
        client.send_bytes(request)
        client.socket.settimeout(30)
        with client.socket.makefile("rb") as answers:
            assert answers.read(len(reply)) == reply


def test_every_setting_is_documented() -> None:
    configuration = (ROOT / "docs/configuration.md").read_text()
    assert code_names(configuration) >= set(SETTINGS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        other = page.parent / name if name else page
        assert other.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", other.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_are_there(page: Path) -> None:
    for name in re.findall(r"`((?:docs|tests|tools|bench|systemd|requirements|examples)/[\w./-]+)`", page.read_text()):
        assert (ROOT / name).exists(), name


def test_each_guarantee_names_a_test_that_is_there() -> None:
    text, measured, _ = (ROOT / "docs/guarantees.md").read_text().partition("**What was measured**")
    assert measured
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    promises = [row for row in rows if "promise | held by" not in row]
    assert promises
    for row in promises:
        held_by = row.removesuffix(" |").rpartition(" | ")[2].split(" ")
        for named in (re.fullmatch(r"`(tests/\w+\.py)::(test_\w+)`", test) for test in held_by):
            assert named, row
            there = f"def {named[2]}(" in (ROOT / named[1]).read_text()
            assert there, named[2]

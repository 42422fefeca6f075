"""Rules and searches for many rows at once choose what openai-whisper's own filters and decoders choose.

They run on random logits here, so that every rule has its say; what they do on speech, the tests of runs show.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from whisper.decoding import DecodingOptions, DecodingTask, SequenceRanker
from whisper.model import Whisper

from bench.forced import choice_of
from tests import models
from tests.drawing import upstream_draws
from whisperd.model.batch import replays
from whisperd.model.batch.caches import Cache
from whisperd.model.batch.decoder import Decoder
from whisperd.model.batch.kernels import Kernels
from whisperd.model.batch.pasts import Pasts, Times
from whisperd.model.batch.rows import LiveRows
from whisperd.model.batch.rules import apply_rules, rules_of
from whisperd.model.batch.search import Outcome, result_of, search_of
from whisperd.protocol.errors import WhisperdError

CPU = torch.device("cpu")
SOME_OPTIONS: list[dict[str, Any]] = [
    {},
    {"suppress_tokens": ""},
    {"suppress_tokens": "5,6,50256", "suppress_blank": False},
    {"max_initial_timestamp": None, "prompt": [400, 401, 402]},
    {"without_timestamps": True},
]


@pytest.fixture(scope="module")
def micro() -> Whisper:
    torch.set_num_threads(1)
    return Whisper(models.MICRO)


def task_of(model: Whisper, **options: Any) -> DecodingTask:
    return DecodingTask(model, DecodingOptions(language="en", fp16=False, **options))


def random_logits(generator: torch.Generator, rows: int, time_begin: int) -> torch.Tensor:
    """Return logits whose timestamps are about as likely as their text."""
    logits = torch.randn(rows, models.MICRO.n_vocab, generator=generator) * 3
    logits[:, time_begin:] += torch.randn(rows, 1, generator=generator) * 4 + 3
    return logits


def test_rules_forbid_what_upstreams_filters_forbid(micro: Whisper) -> None:
    """Rows with different options and pasts, side by side: word, time, and pairs of them, in all orders."""
    generator, chance = torch.Generator().manual_seed(3), random.Random(3)
    tasks = [task_of(micro, **options) for options in SOME_OPTIONS]
    rules = [rules_of(task, vocabulary=models.MICRO.n_vocab, device=CPU) for task in tasks]
    begin, eot = tasks[0].tokenizer.timestamp_begin, tasks[0].tokenizer.eot
    seen = set()
    for length in (0, 1, 2, 3, 4, 5, 6) * 2:
        pasts = [past(chance, length, begin) for _ in tasks]
        logits = random_logits(generator, len(tasks), begin)
        logits[::2, eot] += 30 * (chance.random() < 0.5)
        theirs, choices = [], []
        for row, (task, said) in enumerate(zip(tasks, pasts, strict=True)):
            each, tokens = logits[row : row + 1].clone(), torch.tensor([[*task.initial_tokens, *said]])
            choices.append(choice_of(task.logit_filters, each, tokens))
            for logit_filter in task.logit_filters:
                logit_filter.apply(each, tokens)
            theirs.append(each[0])
        times = times_of(pasts, begin) if length else None
        timed = torch.tensor([each.timed for each in rules])
        filtered = apply_rules(logits, rules, times, timed=timed)
        ours = filtered.log_probabilities(torch.arange(len(tasks)))
        wanted = torch.stack(theirs).log_softmax(-1)
        assert torch.equal(ours.isneginf(), wanted.isneginf()), pasts
        assert torch.allclose(ours[~ours.isneginf()], wanted[~wanted.isneginf()], atol=1e-4)
        tokens, scores = filtered.best()
        assert tokens.tolist() == wanted.argmax(-1).tolist()
        assert torch.allclose(scores, wanted.max(-1).values, atol=1e-4)
        # What the bench tells of upstream's choices: how the timestamps' rule was decided is seen from inside here.
        lead = (filtered.time_total - filtered.best_text).masked_fill(~timed, torch.inf)
        assert [choice.lead for choice in choices] == pytest.approx(lead.tolist(), abs=1e-4)
        assert [choice.best for choice in choices] == tokens.tolist()
        best, second = wanted.topk(2).values.T
        assert [choice.gap for choice in choices] == pytest.approx((best - second).tolist(), abs=1e-4)
        if times is not None:
            seen |= set(zip(times.no_text.tolist(), times.no_time.tolist(), strict=True))
            seen |= {"the end"} if (times.no_text & (tokens == eot)).any() else set()
        seen |= set(filtered.only_time.tolist())
    assert seen >= {(False, False), (True, False), (False, True), True, False, "the end"}


def test_where_speech_is_known_to_end_a_text_ends_neither_before_nor_begins_again_behind(micro: Whisper) -> None:
    task = task_of(micro)
    rules = rules_of(task, vocabulary=models.MICRO.n_vocab, device=CPU)
    begin, eot = task.tokenizer.timestamp_begin, task.tokenizer.eot
    said = [begin, 400, begin + 300]
    pair = [*said, begin + 300]
    cases = [
        (said, 500, "free"),  # the segment has ended: another may begin, with a time
        (pair, 500, "goes on"),
        (pair, 340, "free"),  # less than a second is left
        (pair, 300, "free"),
        (said, 301, "free"),
        (said, 300, "ends"),
        (pair, 0, "free"),  # nothing is known
        (said, 0, "free"),
        ([*pair, 401], 500, "free"),  # in the middle of a segment
    ]
    times = times_of([tokens for tokens, _, _ in cases], begin)
    until = torch.tensor([until for _, until, _ in cases])
    logits, rows = torch.zeros(len(cases), models.MICRO.n_vocab), torch.arange(len(cases))
    # Otherwise 1,500 timestamps together are likelier than any word, and nothing else is allowed.
    logits[:, begin:] = -20
    free = apply_rules(logits.clone(), [rules] * len(cases), times).log_probabilities(rows)
    bound = apply_rules(logits.clone(), [rules] * len(cases), times, speech_until=until)
    for row, (_, _, kind) in enumerate(cases):
        allowed = (~free[row].isneginf()).nonzero().flatten().tolist()
        assert (eot in allowed, any(token >= begin for token in allowed)) == (True, not times.no_time[row])
        wanted = {
            "free": allowed,
            "goes on": [token for token in allowed if token != eot],
            "ends": [token for token in allowed if token < begin],
        }[kind]
        assert (~bound.log_probabilities(rows)[row].isneginf()).nonzero().flatten().tolist() == wanted
    assert not bound.best()[1].isnan().any()


@torch.inference_mode()
def test_where_nobody_speaks_after_all_a_text_may_end_behind_its_first_timestamp(babbler: Whisper) -> None:
    tokenizer = task_of(babbler).tokenizer
    words = [token for token in range(tokenizer.timestamp_begin) if token != tokenizer.eot]
    task, live = task_of(babbler, suppress_tokens=words, sample_len=9), live_rows(babbler)
    features = torch.randn(models.MICRO.n_audio_ctx, models.MICRO.n_audio_state)
    live.begin(0, task, search_of(task, 0), features, speech_until=1200)
    ((_, outcome),) = all_of(live)
    (((time, end), _),) = outcome.candidates
    assert time >= tokenizer.timestamp_begin
    assert end == tokenizer.eot


def past(chance: random.Random, length: int, begin: int) -> list[int]:
    times = sorted(chance.randrange(0, 1500) for _ in range(length))
    return [begin + times[n] if chance.random() < 0.6 else chance.randrange(300, 40_000) for n in range(length)]


def times_of(said: list[list[int]], begin: int) -> Times:
    pasts = Pasts(len(said), CPU)
    for row, tokens in enumerate(said):
        pasts.begin(slice(row, row + 1), begin)
        for token in tokens:
            pasts.follow(slice(row, row + 1), torch.tensor([token]), begin)
    return pasts.times(slice(0, len(said)), begin)


# --- searches ---


@pytest.fixture(scope="module")
def babbler() -> Whisper:
    return models.babbler()


JOBS: list[dict[str, Any]] = [
    {},
    {"prompt": [500, 501, 502, 503, 504]},
    {"beam_size": 3},
    {"beam_size": 5, "patience": 2.0, "prompt": [7000] * 30},
    {"beam_size": 4, "patience": 0.5, "length_penalty": 0.4},
    {"sample_len": 3},
    {"beam_size": 2, "sample_len": 4},
    {"suppress_tokens": "", "suppress_blank": False},
]


class Replaying(Kernels):
    """Replays on a CPU as a GPU does: the same work on the same tensors."""

    def __init__(self) -> None:
        super().__init__(CPU, torch.float32)
        self.recordings = self.replays = 0

    @property
    def replays_steps(self) -> bool:
        return True

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        self.recordings += 1

        def replay() -> None:
            self.replays += 1
            work()

        return replay


class Unrecordable(Replaying):
    """Cannot record as long as there is an `error`."""

    error: RuntimeError | None = RuntimeError("CUDA error: operation not permitted when stream is capturing")

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        if self.error is not None:
            raise self.error
        return super().record(work)


class Late(Replaying):
    """Reads a step's tokens when the next one is launched, as a GPU does."""

    @property
    def reads_late(self) -> bool:
        return True


def live_rows(model: Whisper, kernels: Kernels | None = None, *, slots: int = 1) -> LiveRows[int]:
    kernels, dims = kernels or Kernels(CPU, torch.float32), model.dims
    decoder = Decoder(model.decoder, kernels, heads=dims.n_text_head, audio_positions=dims.n_audio_ctx)
    return LiveRows(decoder, kernels, windows=slots, rows=slots)


@torch.inference_mode()
@pytest.mark.parametrize(
    ("kernels", "slots"), [(None, 1), (Replaying, 1), (Replaying, 40), (Unrecordable, 1), (Late, 1), (Late, 40)]
)
def test_searches_side_by_side_find_what_upstreams_decoders_find_alone(
    babbler: Whisper, kernels: type[Replaying] | None, slots: int
) -> None:
    """Windows of different kinds come and go while others are on their way; each says what it would have said alone."""
    recorder = kernels() if kernels else None
    live = live_rows(babbler, recorder, slots=slots)
    tasks = {n: task_of(babbler, **{"sample_len": 40} | JOBS[n % len(JOBS)]) for n in range(2 * len(JOBS))}
    features = torch.randn(len(tasks), 1, models.MICRO.n_audio_ctx, models.MICRO.n_audio_state)
    waiting, found, together = list(tasks), dict[int, Outcome](), set()
    random.Random(5).shuffle(waiting)
    while waiting or live.count:
        while waiting and len(live.owners) < 5:
            owner = waiting.pop()
            live.begin(owner, tasks[owner], search_of(tasks[owner], 0), features[owner, 0])
        together.add(live.count)
        found |= dict(live.step()) if live.count else {}
    assert max(together) > 8
    if recorder is not None:
        assert (recorder.replays > 30) == (kernels is not Unrecordable)
    said = set()
    for owner, task in tasks.items():
        wanted = DecodingTask(babbler, task.options).run(features[owner])[0]
        result = result_of(task, found[owner])
        assert (result.tokens, result.text) == (wanted.tokens, wanted.text), task.options
        assert result.avg_logprob == pytest.approx(wanted.avg_logprob, abs=1e-4)
        assert result.no_speech_prob == pytest.approx(wanted.no_speech_prob, abs=1e-6)
        said.add(tuple(result.tokens))
    assert len(said) > len(tasks) / 2, "a model that says the same to everybody shows nothing"
    assert len({len(each) for each in said}) > 4, "some end early"


@torch.inference_mode()
def test_windows_given_up_before_their_tokens_were_read_leave_no_trace(babbler: Whisper) -> None:
    """Others, the same begun anew and drawn ones among them, say what they say where nobody is given up."""
    options: list[dict[str, Any]] = [{}, {"temperature": 0.4, "best_of": 3}, {"beam_size": 3}, {"prompt": [900]}, {}]
    tasks = [task_of(babbler, sample_len=30, **each) for each in options]
    features = torch.randn(len(tasks), models.MICRO.n_audio_ctx, models.MICRO.n_audio_state)
    alone = said_alone(babbler, tasks, features)
    chance, given_up = random.Random(11), 0
    for _ in range(12):
        live, waiting, found = live_rows(babbler, Late()), [*range(len(tasks))], dict[int, Outcome]()
        while waiting or live.count:
            if waiting and chance.random() < 0.5:
                owner = waiting.pop(chance.randrange(len(waiting)))
                live.begin(owner, tasks[owner], search_of(tasks[owner], owner), features[owner])
            if live.count:
                found |= dict(live.step())
            if live.owners and chance.random() < 0.1:
                waiting.append(chance.choice(live.owners))
                live.drop(waiting[-1])
                given_up += 1
        assert_same(found, alone)
    assert given_up > 12


@torch.inference_mode()
def test_wherever_memory_runs_out_what_was_given_up_can_begin_anew(
    babbler: Whisper, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It runs out at each place in turn where caches grow and beams are copied."""
    left = 0

    def fail_in_time(kind: type, name: str) -> None:
        works = getattr(kind, name)

        def work(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            if name != "copy" or len(args[1]) > 1:  # one slot is copied without taking memory
                left -= 1
                if not left:
                    raise torch.cuda.OutOfMemoryError("CUDA out of memory")
            return works(*args, **kwargs)

        monkeypatch.setattr(kind, name, work)

    tasks = [task_of(babbler, sample_len=12, beam_size=size) for size in (2, 3, 4)]
    features = torch.randn(len(tasks), models.MICRO.n_audio_ctx, models.MICRO.n_audio_state)
    wanted = [DecodingTask(babbler, task.options).run(each[None])[0].tokens
              for task, each in zip(tasks, features, strict=True)]  # fmt: skip
    for kind, name in ((Cache, "_zeros"), (Cache, "copy"), (Pasts, "resize")):
        fail_in_time(kind, name)
    failed, found = 0, dict[int, Outcome]()
    while left <= 0:  # no longer once it was not reached
        live = live_rows(babbler, slots=2)
        failed += 1
        left, waiting, found = failed, [*range(len(tasks))], {}
        while waiting or live.count:
            concerned = [waiting[0]] if waiting else live.owners
            try:
                if waiting:
                    live.begin(waiting[0], tasks[waiting[0]], search_of(tasks[waiting[0]], 0), features[waiting[0]])
                    waiting.pop(0)
                else:
                    found |= dict(live.step())
            except torch.cuda.OutOfMemoryError:
                for owner in concerned:
                    live.drop(owner)
                waiting = [*dict.fromkeys([*concerned, *waiting])]
        assert [result_of(task, found[owner]).tokens for owner, task in enumerate(tasks)] == wanted, failed
    assert failed > 12


@torch.inference_mode()
def test_what_is_drawn_is_drawn_as_often_as_it_is_likely(babbler: Whisper) -> None:
    task = task_of(babbler, temperature=0.7, best_of=20, sample_len=1)
    live, features = live_rows(babbler), torch.randn(models.MICRO.n_audio_ctx, models.MICRO.n_audio_state)
    drawn = Counter[int]()
    for seed in range(50):
        live.begin(seed, task, search_of(task, seed), features)
        ((_, outcome),) = live.step()
        drawn.update(token for (token,), _ in outcome.candidates)
    prompt = torch.tensor([task.initial_tokens])
    logits = babbler.logits(prompt, features[None])[:, -1]
    for logit_filter in task.logit_filters:
        logit_filter.apply(logits, prompt)
    expected = dict(enumerate((1000 * (logits[0] / 0.7).softmax(-1)).tolist()))
    likely = {token: times for token, times in expected.items() if times >= 20}
    assert sum(likely.values()) > 400, "hardly anything is compared"
    for token, times in likely.items():
        assert abs(drawn[token] - times) < 5 * times**0.5, token
    assert all(expected[token] > 0 for token in drawn)
    found = []
    for seed in (7, 7, 8):
        live.begin(0, task, search_of(task, seed), features)
        found += live.step()
    assert found[0] == found[1] != found[2]


@torch.inference_mode()
def test_drawn_candidates_are_those_that_upstream_draws_with_the_same_numbers(babbler: Whisper) -> None:
    """Token by token, of windows beside each other; and the same one of them is chosen."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.3, "best_of": 5},
        {"temperature": 0.35, "best_of": 3, "length_penalty": 0.2},
        {},
        {"temperature": 0.4, "prompt": [500, 501, 502]},
        {"temperature": 0.35, "best_of": 4, "length_penalty": 1.0},
    ]  # not warmer: with weights as random as these all tokens are about as likely, and a rounding draws another
    live, found = live_rows(babbler), dict[int, Outcome]()
    tasks = [task_of(babbler, sample_len=20, **kinds[n % len(kinds)]) for n in range(2 * len(kinds))]
    shape = (len(tasks), 1, models.MICRO.n_audio_ctx, models.MICRO.n_audio_state)
    features = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    for owner, task in enumerate(tasks):
        live.begin(owner, task, search_of(task, owner), features[owner, 0])
        found |= dict(live.step())
    found |= dict(all_of(live))
    texts, chosen = set[tuple[int, ...]](), set[int]()
    for owner, task in enumerate(tasks):
        theirs = DecodingTask(babbler, task.options)
        theirs.sequence_ranker = Remembering(theirs.sequence_ranker)
        with upstream_draws([owner]):
            (wanted,) = theirs.run(features[owner])
        said, sums = theirs.sequence_ranker.ranked
        ours, result = found[owner].candidates, result_of(task, found[owner])
        end = task.tokenizer.eot
        assert [[token for token in tokens if token != end] for tokens, _ in ours] == said
        assert [score for _, score in ours] == pytest.approx(sums, abs=1e-3)
        assert (result.tokens, result.text) == (wanted.tokens, wanted.text)
        assert result.avg_logprob == pytest.approx(wanted.avg_logprob, abs=1e-4)
        texts |= set(map(tuple, said))
        chosen.add(said.index(wanted.tokens))
    assert len(texts) > 2 * len(tasks), "candidates of one window differ"
    assert len({len(text) for text in texts}) > 1, "and are of different length"
    assert len(chosen) > 1, "not always the first is chosen"


@torch.inference_mode()
@pytest.mark.parametrize("kernels", [None, Late], ids=["read at once", "read late as on a GPU"])
@pytest.mark.parametrize(
    ("suppressed", "feature", "code"),
    [
        ("text", 1.0, "bad_request"),  # behind the first timestamp
        ("times", 1.0, "bad_request"),  # at the first token
        ("nothing", float("nan"), "internal"),  # a number format that overflows
    ],
)
def test_where_no_token_can_be_drawn_that_window_alone_fails_as_upstreams_does(
    babbler: Whisper, kernels: type[Late] | None, suppressed: str, feature: float, code: str
) -> None:
    begin = task_of(babbler).tokenizer.timestamp_begin
    forbidden = {"text": [*range(begin)], "times": [*range(begin, begin + 51)]}.get(suppressed)
    options: dict[str, Any] = {"suppress_tokens": forbidden} if forbidden else {}
    tasks = [task_of(babbler, sample_len=20), task_of(babbler, sample_len=20, temperature=0.5, best_of=2, **options)]
    features = torch.randn(2, models.MICRO.n_audio_ctx, models.MICRO.n_audio_state)
    features[1] *= feature
    live, found = live_rows(babbler, kernels() if kernels else None), dict[int, Outcome]()
    for owner, task in enumerate(tasks):
        live.begin(owner, task, search_of(task, owner), features[owner])
        found |= dict(live.step())
    found |= dict(all_of(live))
    wanted = DecodingTask(babbler, tasks[0].options).run(features[:1])[0]
    assert result_of(tasks[0], found[0]).tokens == wanted.tokens
    with pytest.raises(WhisperdError) as raised:
        result_of(tasks[1], found[1])
    assert raised.value.code == code
    with pytest.raises(ValueError, match="satisfy the constraint"):
        DecodingTask(babbler, tasks[1].options).run(features[1:])


@torch.inference_mode()
@pytest.mark.parametrize("kernels", [None, Late], ids=["read at once", "read late as on a GPU"])
@pytest.mark.parametrize("dropped", [False, True])
def test_numbers_that_overflowed_are_not_those_of_whoever_comes_after(
    kernels: type[Late] | None, dropped: bool
) -> None:
    """One slot has NaN of a long window; the next window in it is short, and steps beside another long one."""
    babbler = models.babbler(layers=2)  # what the second layer keeps depends on the audio
    end = task_of(babbler).tokenizer.eot
    long, short = {"prompt": [900] * 90}, {"suppress_tokens": [end], "sample_len": 40}
    tasks = [task_of(babbler, sample_len=4, **long), task_of(babbler, **short), task_of(babbler, sample_len=20, **long)]
    features = torch.randn(len(tasks), models.MICRO.n_audio_ctx, models.MICRO.n_audio_state)
    alone = said_alone(babbler, tasks, features)
    features[0] = float("nan")
    live, found = live_rows(babbler, kernels() if kernels else None, slots=3), dict[int, Outcome]()
    for owner in (0, 1):
        live.begin(owner, tasks[owner], search_of(tasks[owner], owner), features[owner])
    if dropped:
        live.drop(0)
    while 0 in live.owners:
        found |= dict(live.step())
    live.begin(2, tasks[2], search_of(tasks[2], 2), features[2])
    found |= dict(all_of(live))
    assert (0 in found) != dropped
    del alone[0]
    assert_same(found, alone)


@torch.inference_mode()
def test_where_a_text_may_not_end_it_goes_on_behind_the_known_end_of_speech(babbler: Whisper) -> None:
    """Else nothing could be said there: of an end the options forbid, and of a time what is known of the speech."""
    tokenizer = task_of(babbler).tokenizer
    begin = tokenizer.timestamp_begin
    ends = [*range(tokenizer.eot, begin)]
    task = task_of(babbler, sample_len=60, temperature=0.5, best_of=8, suppress_tokens=ends)
    live, features = live_rows(babbler), torch.randn(models.MICRO.n_audio_ctx, models.MICRO.n_audio_state)
    live.begin(0, task, search_of(task, 0), features, speech_until=1)
    ((_, outcome),) = all_of(live)
    said = [tokens for tokens, _ in outcome.candidates]
    assert any(second >= begin and third >= begin for tokens in said for second, third in pairwise(tokens[1:]))
    assert result_of(task, outcome).tokens in [[*tokens] for tokens in said]


class Remembering(SequenceRanker):
    """Ranks as another does, and keeps what it was given for a window."""

    def __init__(self, ranker: SequenceRanker) -> None:
        self._ranker = ranker
        self.ranked: tuple[list[list[int]], list[float]] = ([], [])

    def rank(self, tokens: list[list[torch.Tensor]], sum_logprobs: list[list[float]]) -> list[int]:
        self.ranked = [each.tolist() for each in tokens[0]], sum_logprobs[0]
        chosen: list[int] = self._ranker.rank(tokens, sum_logprobs)
        return chosen


@torch.inference_mode()
def test_steps_of_many_lengths_are_replayed_from_a_few_recordings(babbler: Whisper) -> None:
    """Windows begin one after the other, greedily: their number and the length of what they say always change."""
    end, recorder = task_of(babbler).tokenizer.eot, Replaying()
    replayed, plain = live_rows(babbler, recorder, slots=12), live_rows(babbler, slots=12)
    options = {"suppress_tokens": [end], "sample_len": 90}
    steps = 0
    for owner in range(9):
        task, features = task_of(babbler, **options), torch.randn(models.MICRO.n_audio_ctx, models.MICRO.n_audio_state)
        for live in (replayed, plain):
            live.begin(owner, task, search_of(task, 0), features)
        for _ in range(6):
            assert not replayed.step()
            assert not plain.step()
            steps += 1
    found = [sorted((owner, outcome.candidates[0][0]) for owner, outcome in all_of(live)) for live in (replayed, plain)]
    assert found[0] == found[1]
    assert len({tuple(said) for _, said in found[0]}) > 6, "each has its own"
    assert recorder.replays > steps


@torch.inference_mode()
def test_recordings_are_void_where_the_caches_are_other_tensors(babbler: Whisper) -> None:
    recorder, task = Replaying(), task_of(babbler, suppress_tokens=[task_of(babbler).tokenizer.eot], sample_len=60)
    live = live_rows(babbler, recorder, slots=4)
    live.begin(0, task, search_of(task, 0), torch.randn(models.MICRO.n_audio_ctx, models.MICRO.n_audio_state))
    seen = []
    for slots in (None, None, None, 5, None, None):
        if slots:
            live.shrink(windows=slots, rows=slots)
        live.step()
        seen.append((recorder.recordings, recorder.replays))
    assert seen == [(0, 0), (1, 1), (1, 2), (1, 2), (2, 3), (2, 4)]


def said_alone(babbler: Whisper, tasks: list[DecodingTask], features: torch.Tensor) -> dict[int, Outcome]:
    """Return what each task finds of its features without others beside it; most of it differs."""
    alone = dict[int, Outcome]()
    for owner, task in enumerate(tasks):
        live = live_rows(babbler)
        live.begin(owner, task, search_of(task, owner), features[owner])
        alone |= dict(all_of(live))
    assert len({outcome.candidates[0][0] for outcome in alone.values()}) > len(tasks) / 2
    return alone


def assert_same(found: dict[int, Outcome], alone: dict[int, Outcome]) -> None:
    """Each has found the same words, with scores that differ by roundings alone."""
    for owner, outcome in alone.items():
        assert found[owner].no_speech == outcome.no_speech
        pairs = zip(found[owner].candidates, outcome.candidates, strict=True)
        assert all(ours == theirs and abs(score - other) < 1e-4 for (ours, score), (theirs, other) in pairs)


def all_of(live: LiveRows[int]) -> Iterator[tuple[int, Outcome]]:
    while live.count:
        yield from live.step()


@torch.inference_mode()
@pytest.mark.parametrize("error", [torch.cuda.OutOfMemoryError("CUDA out of memory"), Unrecordable.error], ids=str)
def test_what_cannot_be_recorded_is_launched_until_there_is_less_to_do(
    babbler: Whisper, error: RuntimeError, caplog: pytest.LogCaptureFixture
) -> None:
    recorder, task = Unrecordable(), task_of(babbler, suppress_tokens=[task_of(babbler).tokenizer.eot], sample_len=60)
    recorder.error = error
    live = live_rows(babbler, recorder, slots=4)
    live.begin(0, task, search_of(task, 0), torch.randn(models.MICRO.n_audio_ctx, models.MICRO.n_audio_state))
    for _ in range(5):
        live.step()
    assert [record.getMessage() for record in caplog.records] == [
        f"model: steps are not recorded any more error={error}"
    ]
    recorder.error = None
    live.step()
    assert not recorder.recordings
    live.shrink(windows=3, rows=3)
    for _ in range(3):
        live.step()
    assert (recorder.recordings, recorder.replays) == (1, 2)


@torch.inference_mode()
def test_the_longest_unused_recordings_give_way(babbler: Whisper, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replays, "_MOST_KEPT", 1)
    recorder, task = Replaying(), task_of(babbler, suppress_tokens=[task_of(babbler).tokenizer.eot], sample_len=60)
    live = live_rows(babbler, recorder, slots=4)
    features = torch.randn(models.MICRO.n_audio_ctx, models.MICRO.n_audio_state)
    seen = []
    for owners in (1, 1, 2, 2, 1, 1, 1):
        if owners == 2 and len(live.owners) == 1:
            live.begin(1, task, search_of(task, 0), features)
        elif not live.owners:
            live.begin(0, task, search_of(task, 0), features)
        elif owners == 1:
            live.drop(1)
        live.step()
        seen.append((recorder.recordings, recorder.replays))
    assert seen == [(0, 0), (1, 1), (1, 1), (2, 2), (2, 2), (3, 3), (3, 4)]


# --- what a step costs ---


class Counted(TorchDispatchMode):
    """Counts the operations that torch dispatches while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations[func.__name__] += 1
        return func(*args, **(kwargs or {}))


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["even", "of different length", "drawn", "beams"])
def test_a_step_of_many_rows_is_as_many_operations_as_one_of_few(babbler: Whisper, kind: str) -> None:
    """And none of them fetches a single number: on a GPU each of those would wait for all that was begun before."""
    features = torch.randn(models.MICRO.n_audio_ctx, models.MICRO.n_audio_state)
    end = task_of(babbler).tokenizer.eot
    options: dict[str, Any] = {"drawn": {"temperature": 0.4}, "beams": {"beam_size": 2}}.get(kind, {})
    counts = []
    for rows in (4, 8, 16):
        live = live_rows(babbler, slots=20)
        for owner in range(rows // 2 if kind == "beams" else rows):
            prompt = [700] * (owner + 1 if kind == "of different length" else 1)
            task = task_of(babbler, prompt=prompt, suppress_tokens=[end], sample_len=40, **options)
            live.begin(owner, task, search_of(task, owner), features)
        live.step()
        with Counted() as counted:
            assert not live.step()
        assert live.count == rows
        assert not counted.operations["_local_scalar_dense.default"]
        counts.append(counted.operations.total())
    assert min(counts) > 20
    # What only some rows need, such as that text is forbidden or that a beam is copied, is done for all at once.
    assert max(counts) - min(counts) < 4, counts

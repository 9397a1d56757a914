"""Experts spread over processes: the same bits as one process, one voice, and a clear end for all when one is lost."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Forked, Nursery
from torch import Tensor

from v4sdk import loading
from v4sdk.backend import EngineConfig, bind
from v4sdk.checkpoint import Checkpoint
from v4sdk.config import ModelConfig
from v4sdk.errors import ConfigError, RankLost, V4Error
from v4sdk.expert_parallel import Team, launch
from v4sdk.expert_parallel.channel import Channel, Closed, Listener, call
from v4sdk.expert_parallel.exchange import Exchange, expert_bounds, split
from v4sdk.expert_parallel.experts import Bound, drive, shard
from v4sdk.loading import LoadOptions, open_model
from v4sdk.numerics import EXACT, REFERENCE, Numerics
from v4sdk.ops import routed_experts
from v4sdk.ops.precision import activation_dtype, between_dtype
from v4sdk.plugins import select
from v4sdk.progress import silent
from v4sdk.weights import ExpertWeights, Weight, stack
from v4sdk_bench.parity.sides import References
from v4sdk_bench.parity.tiny import TINY, draw

SECONDS = 45.0
LIMIT = 10.0


# --- the exchange, with threads in place of processes


class _Ranks:
    """Mailboxes of all ranks, and what would break a real transport: ranks whose transfers do not match."""

    def __init__(self, count: int) -> None:
        self.count, self.ready = count, threading.Condition()
        self.sent: dict[tuple[int, int], list[Tensor]] = {}

    def link(self, rank: int) -> _ThreadLink:
        return _ThreadLink(self, rank)


class _ThreadLink:
    def __init__(self, ranks: _Ranks, rank: int) -> None:
        self._ranks, self._rank, self._calls = ranks, rank, 0

    def all_to_all(
        self, received: Tensor, sent: Tensor, received_rows: list[int], sent_rows: list[int]
    ) -> _Arrival:
        call, self._calls = self._calls, self._calls + 1
        with self._ranks.ready:
            self._ranks.sent[call, self._rank] = list(torch.split(sent.clone(), sent_rows))
            self._ranks.ready.notify_all()
        return _Arrival(self._ranks, self._rank, call, received, received_rows)


@dataclass
class _Arrival:
    ranks: _Ranks
    rank: int
    call: int
    received: Tensor
    rows: list[int]

    def wait(self) -> None:
        wanted = [(self.call, j) for j in range(self.ranks.count)]
        with self.ranks.ready:
            assert self.ranks.ready.wait_for(lambda: all(w in self.ranks.sent for w in wanted), SECONDS)
            parts = [self.ranks.sent[w][self.rank] for w in wanted]
        assert [len(p) for p in parts] == self.rows, "a rank sent another number of rows than it announced"
        self.received.copy_(torch.cat(parts))


def _experts(count: int, quantised: bool) -> ExpertWeights:
    random = torch.Generator().manual_seed(count)

    def one(rows: int, cols: int) -> Weight:
        if not quantised:
            return Weight(torch.randn(rows, cols, generator=random) * 0.3)
        data = torch.randint(-128, 128, (rows, cols // 2), generator=random, dtype=torch.int8)
        scale = torch.randint(120, 126, (rows, cols // 32), generator=random, dtype=torch.uint8)
        return Weight(data, scale, "fp4", (1, 32), True)

    w1, w2, w3 = (tuple(one(*s) for _ in range(count)) for s in ((32, 64), (64, 32), (32, 64)))
    return ExpertWeights(w1, w2, w3)


def _exchanged(
    experts: ExpertWeights,
    numerics: Numerics,
    tokens: list[tuple[Tensor, Tensor, Tensor]],
    waves: int,
    bound: Bound,
) -> list[Tensor]:
    """What each rank gets for its own tokens."""
    ranks, bounds = _Ranks(len(tokens)), expert_bounds(experts.num_experts, len(tokens))
    found: dict[int, Tensor] = {}

    def work(rank: int) -> None:
        mine = shard(experts, 0, rank, len(tokens), lambda e: e)
        exchange = Exchange(ranks.link(rank), rank, bounds)
        found[rank] = exchange.run(*tokens[rank], bound.on(mine), between_dtype(numerics), waves)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(tokens))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[rank] for rank in range(len(tokens))]


def _tokens(
    counts: list[int], num_experts: int, numerics: Numerics, chosen: int = 3
) -> list[tuple[Tensor, Tensor, Tensor]]:
    random = torch.Generator().manual_seed(sum(counts))
    rows = []
    for count in counts:
        u = torch.randn(count, 64, generator=random).to(activation_dtype(numerics))
        # with repeats: an expert listed twice contributes twice
        ids = torch.randint(0, num_experts, (count, chosen), generator=random, dtype=torch.int32)
        rows.append((u, ids, torch.rand(count, chosen, generator=random)))
    return rows


def _together(tokens: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    u, ids, weights = (torch.cat(part) for part in zip(*tokens, strict=True))
    return u, ids, weights


@pytest.mark.parametrize("in_one_call", [False, True], ids=["per expert", "in one call"])
@pytest.mark.parametrize("waves", [1, 2, 3, 5])
@pytest.mark.parametrize(
    ("num_experts", "counts"),
    [(8, [7, 0]), (7, [5, 9, 3]), (5, [0, 1, 0, 0]), (5, [4, 0, 0, 6, 2]), (4, [0, 0])],
    ids=["driver only", "uneven", "one token", "one expert each", "nothing at all"],
)
@pytest.mark.parametrize("numerics", [REFERENCE, EXACT], ids=lambda n: n.name)
def test_exchange_gives_the_bits_of_one_process(
    numerics: Numerics, num_experts: int, counts: list[int], waves: int, in_one_call: bool
) -> None:
    experts = _experts(num_experts, quantised=numerics is REFERENCE)
    tokens = _tokens(counts, num_experts, numerics)
    bound = Bound(routed_experts, in_one_call, LIMIT, numerics)
    whole = routed_experts(*_together(tokens), experts, LIMIT, numerics)
    parts = _exchanged(experts, numerics, tokens, waves, bound)
    assert [p.shape[0] for p in parts] == counts
    assert torch.equal(torch.cat(parts), whole)


def test_exchange_serves_experts_that_a_backend_has_stacked() -> None:
    experts, tokens = _experts(6, quantised=True), _tokens([4, 3], 6, REFERENCE)
    stacked = ExpertWeights(packed=(stack(experts.w1), stack(experts.w2), stack(experts.w3)))
    whole = routed_experts(*_together(tokens), stacked, LIMIT, REFERENCE)
    ranks, bounds = _Ranks(2), expert_bounds(6, 2)
    found: dict[int, Tensor] = {}

    def pack(e: ExpertWeights) -> ExpertWeights:
        return ExpertWeights(packed=(stack(e.w1), stack(e.w2), stack(e.w3)))

    def work(rank: int) -> None:
        mine = shard(experts, 0, rank, 2, pack)
        compute = Bound(routed_experts, True, LIMIT, REFERENCE).on(mine)
        found[rank] = Exchange(ranks.link(rank), rank, bounds).run(*tokens[rank], compute, torch.bfloat16, 2)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(torch.cat([found[0], found[1]]), whole)


def test_each_expert_sees_the_rows_of_one_process_in_their_order() -> None:
    experts, tokens = _experts(5, quantised=False), _tokens([6, 4], 5, EXACT)
    seen: dict[tuple[int, int], list[Tensor]] = {}

    def note(rows: Tensor, ids: Tensor, weights: Tensor, mine: ExpertWeights, *rest: Any) -> Tensor:
        first = next(i for i, w in enumerate(experts.w1) if w.data is mine.w1[0].data)
        assert len(ids.unique()) == 1
        seen.setdefault((first + int(ids[0]), 0), []).append(rows)
        return routed_experts(rows, ids, weights, mine, *rest)

    _exchanged(experts, EXACT, tokens, 2, Bound(note, False, LIMIT, EXACT))
    u, ids, _ = _together(tokens)
    for expert in range(5):
        [rows] = seen[expert, 0]
        assert torch.equal(rows, u[torch.nonzero(ids == expert)[:, 0]])


def test_split_is_contiguous_and_balanced() -> None:
    for count, parts in product(range(1, 40), range(1, 9)):
        bounds = split(count, parts)
        sizes = [b - a for a, b in pairwise(bounds)]
        assert bounds[0] == 0
        assert bounds[-1] == count
        assert max(sizes) - min(sizes) <= 1


def test_a_rank_prepares_its_own_experts_and_no_others() -> None:
    experts, prepared = _experts(7, quantised=False), []

    def prepare(given: ExpertWeights) -> ExpertWeights:
        prepared.append(given)
        return given

    kept = shard(experts, 3, rank=1, processes=3, prepare=prepare)
    assert [w.data for w in prepared[0].w2] == [w.data for w in experts.w2[3:5]]
    assert (kept.layer, kept.num_experts) == (3, 2)


def test_a_kernel_is_called_once_and_the_reference_per_expert() -> None:
    binding = bind(References(), TINY, EngineConfig(REFERENCE))
    as_kernel = replace(
        binding, ops=tuple(replace(b, how="kernel") if b.op == "routed_experts" else b for b in binding.ops)
    )
    calls: list[int] = []

    def note(rows: Tensor, *rest: Any) -> Tensor:
        calls.append(len(rows))
        return torch.zeros_like(rows)

    for found, expected in ((binding, [1, 3, 2]), (as_kernel, [6])):
        calls.clear()
        bound = replace(Bound.of(found, LIMIT, EXACT), function=note)
        bound.on(_experts(4, quantised=False))(torch.zeros(6, 64), torch.zeros(6), [1, 0, 3, 2], 0)
        assert calls == expected


# --- who may start


@pytest.mark.parametrize(
    ("processes", "environ", "words"),
    [
        (2, {}, "`WORLD_SIZE` is not set"),
        (2, {"WORLD_SIZE": "4", "RANK": "0"}, "the launcher started 4 processes"),
        (4, {"WORLD_SIZE": "2", "RANK": "1"}, "the launcher started 2 processes"),
        (2, {"WORLD_SIZE": "2", "RANK": "2"}, "`RANK` is '2', expected 0 to 1"),
        (2, {"WORLD_SIZE": "2"}, "`RANK` is ''"),
        (0, {}, "expected a positive number of processes"),
    ],
)
def test_launch_refuses_with_the_line_to_type(processes: int, environ: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        launch(processes, environ)
    assert f"torchrun --nproc-per-node {max(processes, 1)} --no-python v4sdk run --ep" in str(
        caught.value.hint
    )


def test_one_process_needs_no_launcher() -> None:
    assert launch(1, {}) == 0


def test_more_ranks_than_experts_are_refused(chat_folder: Path) -> None:
    team = Team(0, 5, "waves", 1.0, None, {})
    with pytest.raises(ConfigError, match="5 processes share 4 routed experts") as caught:
        open_model(chat_folder, LoadOptions(team=team), silent)
    assert "--ep 4" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("schedule", "timeout_s"), [("rounds", 1.0), ("waves", 0.0), ("waves", float("nan")), ("waves", 1e300)]
)
def test_join_refuses_what_it_cannot_do(
    schedule: Any, timeout_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError):
        Team.join(2, schedule, timeout_s)


# --- how ranks hear of each other


def _pair() -> tuple[Channel, Channel]:
    listener = socket.create_server(("127.0.0.1", 0))
    near = socket.create_connection(listener.getsockname())
    far, _ = listener.accept()
    listener.close()
    return Channel(near), Channel(far)


def test_a_channel_keeps_messages_apart_and_notices_the_end() -> None:
    near, far = _pair()
    assert far.receive(0.01) is None
    near.send({"a": 1})
    near.send({"b": "x\ny"})
    near.close()
    assert far.receive(1) == {"a": 1}
    assert far.receive(1) == {"b": "x\ny"}
    with pytest.raises(Closed):
        far.receive(1)
    far.close()


@pytest.mark.parametrize(
    "said",
    [
        b"[" * 3000 + b"\n",
        b"\xff\xfe\n",
        b"null\n",
        b"[1]\n",
        b'{"rank": 1}\n',
        b'{"rank": 1, "token": "guess"}\n',
        b'{"rank": 1, "token": "\xc3\xa9"}\n',
        b'{"rank": "x", "token": null}\n',
        b"GET / HTTP/1.1\r\n\r\n",
        b"x" * (1 << 22),
        b"",
    ],
    ids=lambda said: repr(said[:12]),
)
def test_a_stranger_is_turned_away_and_a_rank_is_let_in(said: bytes) -> None:
    listener = Listener("127.0.0.1")
    with socket.create_connection(listener.address) as stranger:
        stranger.setblocking(False)
        with suppress(BlockingIOError):
            stranger.send(said)
        if not said:
            stranger.close()
        start = time.monotonic()
        assert listener.accept(SECONDS) is None
        assert time.monotonic() - start < 4
        rank = call(*listener.address, listener.token, 1, SECONDS)
        found = listener.accept(SECONDS)
    assert found is not None
    assert found[0] == 1
    for channel in (rank, found[1]):
        channel.close()
    listener.close()


def test_rank_0_is_reached_only_at_the_address_it_was_given() -> None:
    listener = Listener("127.0.0.1")
    assert listener.address[0] == "127.0.0.1"
    with pytest.raises(Closed):
        call("127.0.0.2", listener.address[1], listener.token, 1, 1.0)
    listener.close()


def test_a_rank_that_closes_without_serving_is_named() -> None:
    near, far = _pair()
    team, other = Team(0, 2, "waves", 1.0, None, {1: near}), Team(1, 2, "waves", 1.0, None, {0: far})
    # as if the program of rank 1 had forgotten Session.serve
    threading.Thread(target=other.close).start()
    with pytest.raises(RankLost, match="rank 1 of 2 was lost at loading: it has closed"):
        drive(team, {}, torch.device("cpu"))
    team.close()


def test_a_rank_that_loads_instead_of_serving_tells_the_driver() -> None:
    from v4sdk import Session

    near, far = _pair()
    team, other = Team(0, 2, "waves", 1.0, None, {1: near}), Team(1, 2, "waves", 1.0, None, {0: far})
    with pytest.raises(ConfigError, match="only rank 0 does"):
        Session.load(ep=other)
    with pytest.raises(RankLost, match="rank 1 of 2 was lost at loading: rank 1 of 2 cannot load a session"):
        team.hear(1)
    team.close()


def test_the_memory_plan_counts_the_experts_of_all_ranks_on_this_machine(
    chat_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    team, held = Team(0, 4, "waves", 1.0, None, {}), []
    with Checkpoint(chat_folder) as checkpoint:
        for here in ("1", "2", "4", "8", ""):
            monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
            held.append(loading._held_bytes(checkpoint, team, select("cpu")))
        assert held[2] == held[3] == checkpoint.nbytes
    assert held[0] == held[4] < held[1] < held[2]


def test_the_driver_names_the_lost_rank_and_tells_the_others() -> None:
    pairs = {rank: _pair() for rank in (1, 2)}
    team = Team(0, 3, "waves", 1.0, None, {rank: near for rank, (near, _) in pairs.items()})
    pairs[2][1].close()
    error = team.failed(cause=RuntimeError("connection closed"))
    assert isinstance(error, RankLost)
    assert error.message == "rank 2 of 3 was lost at loading: its process has ended"
    other = Team(1, 3, "waves", 1.0, None, {0: pairs[1][1]})
    with pytest.raises(RankLost, match="rank 2 of 3 was lost"):
        other.hear()
    with pytest.raises(RankLost, match="rank 2 of 3 was lost"):
        team.tell({"do": "run"})
    team.close()
    other.close()


def test_a_rank_that_hangs_is_told_from_one_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("v4sdk.expert_parallel.team._VERDICT_S", 0.1)
    near, far = _pair()
    team, other = Team(0, 2, "waves", 1.0, None, {1: near}), Team(1, 2, "waves", 1.0, None, {0: far})
    error = team.failed(cause=RuntimeError("[a/file.cc:12] Timed out waiting 1000ms"))
    assert error.message == "the ranks could not exchange at loading: Timed out waiting 1000ms"
    assert "--ep-timeout" in str(error.hint)
    assert other.failed(cause=RuntimeError("the same")).message == error.message
    for one in (team, other):
        one.close()


def test_a_rank_that_cannot_load_says_why_to_the_driver() -> None:
    near, far = _pair()
    team, other = Team(0, 2, "waves", 1.0, None, {1: near}), Team(1, 2, "waves", 1.0, None, {0: far})
    other.close("folder `x` does not exist")
    with pytest.raises(RankLost, match="rank 1 of 2 was lost at loading: folder `x` does not exist"):
        team.hear(1)
    team.close()


def test_nothing_is_exchanged_after_an_interruption() -> None:
    near, far = _pair()
    team = Team(0, 2, "waves", 1.0, None, {1: near})
    team.interrupted()
    with pytest.raises(RankLost, match="interrupted"):
        team.tell({"do": "run"})
    far.close()
    team.close()


# --- processes


@dataclass
class Rank:
    """One process of a run."""

    process: subprocess.Popen[bytes] | Forked
    out: Path
    err: Path

    def ended(self, seconds: float = SECONDS) -> tuple[int, str, str]:
        status = self.process.wait(seconds)
        return status, self.out.read_text(), self.err.read_text()


class Launcher:
    """Starts ranks as a launcher does, and leaves none behind."""

    def __init__(self, folder: Path, nursery: Nursery) -> None:
        self._folder, self._nursery, self._all = folder, nursery, list[Rank]()

    def start(self, script: str, *arguments: str, **variables: str) -> Rank:
        """A process that was forked with everything imported; without a script, the command `v4sdk`."""
        out, err, status = (self._folder / f"{len(self._all)}.{kind}" for kind in ("out", "err", "status"))
        argv = ["v4sdk", *arguments]
        process = self._nursery.start(script, argv, _environ(variables), out, err, status)
        return self._known(Rank(process, out, err))

    def afresh(self, *command: str) -> Rank:
        """A process as a shell starts it."""
        out, err = (self._folder / f"{len(self._all)}.{kind}" for kind in ("out", "err"))
        with out.open("wb") as o, err.open("wb") as e:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=o,
                stderr=e,
                env=_environ({}),
                start_new_session=True,
            )
        return self._known(Rank(process, out, err))

    def ranks(self, count: int, script: str, *arguments: str) -> list[Rank]:
        where = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        return [self.start(script, *arguments, RANK=str(rank), **where) for rank in range(count)]

    def run(self, count: int, *arguments: str) -> list[Rank]:
        """The ranks of the real command."""
        return self.ranks(count, "", "run", "--ep", str(count), *arguments)

    def _known(self, rank: Rank) -> Rank:
        self._all.append(rank)
        return rank

    def close(self) -> None:
        for rank in self._all:
            if rank.process.poll() is None:
                # a session of its own: what it started goes with it
                with suppress(ProcessLookupError):
                    os.killpg(rank.process.pid, signal.SIGKILL)
                rank.process.wait(SECONDS)


def _environ(variables: dict[str, str]) -> dict[str, str]:
    launchers = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    inherited = {k: v for k, v in os.environ.items() if k not in launchers}
    return inherited | {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR", **variables}


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    made = Nursery()
    yield made
    made.close()


@pytest.fixture
def launcher(tmp_path: Path, nursery: Nursery) -> Iterator[Launcher]:
    made = Launcher(tmp_path, nursery)
    yield made
    made.close()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def until(true: Any, seconds: float = SECONDS) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


@pytest.fixture(scope="session")
def uneven_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of every layer kind whose six experts four ranks cannot share evenly."""
    from v4sdk.convert import write_checkpoint

    folder = tmp_path_factory.mktemp("uneven-model")
    write_checkpoint(folder, _config(), draw(_config(), 3), float_dtype="F32", sharded=False)
    return folder


def _config() -> ModelConfig:
    return replace(TINY, num_hidden_layers=4)


# Runs on every rank: prefill, decode, a batch and a saved state of each model, for each schedule, one after the other; then a
# rank must hold no more sockets, threads and mapped files than before.
_SCRIPT = """
import hashlib, json, os, sys, time
import torch
import v4sdk.expert_parallel.experts as experts
from v4sdk import SamplingParams, Session
from v4sdk.expert_parallel import Team

def held():
    files = [os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{n}")]
    sockets = sum(f.startswith("socket:") for f in files)
    mapped = sum(".safetensors" in line for line in open("/proc/self/maps"))
    return sockets, len(os.listdir("/proc/self/task")), mapped

before = held()
processes, out, *folders = int(sys.argv[1]), sys.argv[2], *sys.argv[3:]
# so that decode steps, too, go in waves
experts._ROWS_PER_WAVE = 1
found, ids = {}, [(7 * i) % 90 for i in range(40)]
greedy = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True, logprobs=True, top_logprobs=3)
for schedule in ("sequential", "waves") if processes > 1 else ("waves",):
    for folder in folders:
        model = None if folder == "nano" else folder
        with Team.join(processes, schedule) as team:
            if not team.is_driver:
                Session.serve(model, ep=team, numerics="reference")
                continue
            with Session.load(model, ep=team, numerics="reference") as session:
                logits = session.logits(ids)
                sequence = session.sequence()
                one = session.generate(ids[:30], greedy, sequence)
                many = session.generate([ids[:9], ids[3:20]], greedy)
                sequence.save(out + ".state")
                found[f"{schedule} {folder}"] = {
                    "logits": hashlib.sha256(logits.numpy().tobytes()).hexdigest(),
                    "tokens": [r.ids for r in [one, *many]],
                    "logprobs": [[(t.logprob.hex(), t.top) for t in r.logprobs] for r in [one, *many]],
                    "state": hashlib.sha256(open(out + ".state", "rb").read()).hexdigest(),
                }
until = time.monotonic() + 10
while held() != before and time.monotonic() < until:
    time.sleep(0.01)
if held() != before:
    sys.exit(f"sockets, threads, maps: {before} before, {held()} after")
if found:
    with open(out, "w") as file:
        json.dump(found, file)
"""


@pytest.fixture(scope="session")
def folders(uneven_folder: Path, golden: Path) -> dict[str, str]:
    """Checkpoints by name; the bundled model has none."""
    return {"uneven": str(uneven_folder), "tiny-quant": str(golden / "tiny-quant"), "nano": "nano"}


@pytest.fixture(scope="session")
def single(
    tmp_path_factory: pytest.TempPathFactory, folders: dict[str, str], nursery: Nursery
) -> dict[str, Any]:
    """What one process gives."""
    folder = tmp_path_factory.mktemp("single")
    out = folder / "found.json"
    assert Launcher(folder, nursery).start(_SCRIPT, "1", str(out), *folders.values()).ended() == (0, "", "")
    found: dict[str, Any] = json.loads(out.read_text())
    return found


@pytest.mark.parametrize(("processes", "models"), [(2, ("nano", "tiny-quant", "uneven")), (4, ("uneven",))])
def test_prefill_decode_batches_and_states_are_bit_equal_to_one_process(
    processes: int, models: tuple[str, ...], single: dict[str, Any], launcher: Launcher, folders: dict[str, str],
    tmp_path: Path,
) -> None:  # fmt: skip
    out = tmp_path / "found.json"
    asked = [folders[name] for name in models]
    for rank in launcher.ranks(processes, _SCRIPT, str(processes), str(out), *asked):
        assert rank.ended() == (0, "", "")
    found = json.loads(out.read_text())
    assert len(found) == 2 * len(models)
    assert found == {key: single[f"waves {key.split()[1]}"] for key in found}


@pytest.fixture
def busy(tmp_path: Path) -> tuple[str, ...]:
    """Arguments of a run that answers for minutes, a line every few seconds."""
    requests = tmp_path / "requests.jsonl"
    requests.write_text('{"prompt": "What is 347 + 285?"}\n' * 2000)
    return ("--prompts", str(requests))


def _is_answering(rank: Rank) -> bool:
    return "632" in rank.out.read_text()


@pytest.mark.parametrize(("victim", "told"), [(0, False), (1, False), (1, True)])
def test_a_killed_rank_ends_all_others_with_the_same_error(
    victim: int, told: bool, launcher: Launcher, busy: tuple[str, ...]
) -> None:
    count = 3 if victim and not told else 2
    ranks = launcher.run(count, *busy)
    until(lambda: _is_answering(ranks[0]))
    ranks[victim].process.kill()
    if told:
        # as a launcher does that has seen it
        for rank in ranks:
            if rank is not ranks[victim] and rank.process.poll() is None:
                rank.process.send_signal(signal.SIGTERM)
    start = time.monotonic()
    others = [rank.ended(20) for rank in ranks if rank is not ranks[victim]]
    assert time.monotonic() - start < 15
    for status, _, err in others:
        assert status == 1
        assert "Traceback" not in err
        expected = f"rank 1 of {count} was lost at layer" if victim else "rank 0 of 2, the driver, was lost"
        assert f"error: {expected}" in err
        assert "hint: start all processes again" in err
    assert all(out == "" for _, out, _ in others[0 if victim == 0 else 1 :])


def test_ctrl_c_ends_all_quietly(launcher: Launcher, busy: tuple[str, ...]) -> None:
    ranks = launcher.run(2, *busy)
    until(lambda: _is_answering(ranks[0]))
    for rank in ranks:
        rank.process.send_signal(signal.SIGINT)
    driver, other = (rank.ended(20) for rank in ranks)
    assert (driver[0], other[0]) == (130, 0)
    assert other[1:] == ("", "")
    assert "error" not in driver[2]
    assert "Traceback" not in driver[2]


def test_a_mistake_of_the_user_is_told_once(launcher: Launcher, tmp_path: Path) -> None:
    absent = str(tmp_path / "absent")
    driver, other = (rank.ended() for rank in launcher.run(2, "--model", absent, "x"))
    assert driver[0] == 1
    assert "error: folder" in driver[2]
    assert other == (0, "", "")


def _torchrun(launcher: Launcher, *arguments: str) -> Rank:
    torchrun = (
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        str(free_port()),
    )
    v4sdk = str(Path(sys.executable).parent / "v4sdk")
    return launcher.afresh(*torchrun, "--no-python", v4sdk, "run", "--ep", "2", *arguments)


def test_the_real_command_answers_once(launcher: Launcher) -> None:
    status, out, err = _torchrun(launcher, "--temperature", "0", "What is 347 + 285?").ended()
    assert (status, out) == (0, "632\n")
    assert err.count("experts split over 2 processes (gloo), schedule waves") == 1
    assert err.count("note: this is v4-nano") == 1


@pytest.mark.slow
def test_under_torchrun_a_killed_rank_is_named(launcher: Launcher, busy: tuple[str, ...]) -> None:
    import psutil

    run = _torchrun(launcher, *busy)
    until(lambda: _is_answering(run))
    [victim] = [c for c in psutil.Process(run.process.pid).children() if c.environ().get("RANK") == "1"]
    victim.kill()
    status, _, err = run.ended(40)
    assert status == 1
    assert "error: rank 1 of 2 was lost at layer" in err
    ours = [line for line in err.splitlines() if "v4sdk" in line]
    assert not [line for line in ours if line.lstrip().startswith("File ")], "a traceback through our code"


@pytest.mark.parametrize(
    "arguments", [("--ep", "2"), ("--ep", "0"), ("--ep", "2", "--ep-schedule", "sequential")]
)
def test_the_command_refuses_to_run_alone(
    arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from v4sdk.cli import main

    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(sys, "argv", ["v4sdk", "run", *arguments, "hi"])
    with pytest.raises(SystemExit) as left:
        main()
    said = capsys.readouterr()
    assert left.value.code == 1
    assert said.out == ""
    assert "hint: torchrun --nproc-per-node" in said.err


def test_only_rank_0_loads_a_session() -> None:
    from v4sdk import Session

    with pytest.raises(ConfigError, match="only rank 0 does"):
        Session.load(ep=Team(1, 2, "waves", 1.0, None, {}))
    with pytest.raises(V4Error, match="rank 0 cannot serve"):
        Session.serve(ep=Team(0, 2, "waves", 1.0, None, {}))

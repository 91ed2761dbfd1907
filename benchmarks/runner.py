"""One case, start to end: gate every provider, then time those that passed, side by side."""

from __future__ import annotations

import dataclasses
import datetime
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from . import ceiling, environment, memory, timing
from .gate import judged
from .registry import Case, Inputs, Provider, Suite, short
from .results import ERROR, FAILED, OK, OUT_OF_MEMORY, UNAVAILABLE, Row

SEED = 0


@dataclass(frozen=True)
class Session:
    """What all rows of one run share."""

    device: str
    quick: bool
    budget: float  # seconds of timing a case
    machine: str
    versions: str
    commit: str

    @classmethod
    def start(cls, device: str, quick: bool, budget: float) -> Session:
        return cls(
            device,
            quick,
            budget,
            environment.machine(device),
            environment.versions(),
            environment.commit(),
        )


Call = Callable[[Inputs], Any]


@dataclass(frozen=True)
class Entrant:
    """A provider after the gate: its row so far, and its call where it may be timed."""

    provider: Provider
    row: Row
    call: Call | None = None

    def refused(self, status: str, reason: str) -> Entrant:
        return Entrant(self.provider, dataclasses.replace(self.row, status=status, reason=reason))


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def _attempt(entrant: Entrant, action: Callable[[], Entrant]) -> Entrant:
    """The action's entrant; one that ran out of memory or raised is refused and the others go on."""
    try:
        return action()
    except (torch.OutOfMemoryError, MemoryError):
        torch.cuda.empty_cache()
        return entrant.refused(OUT_OF_MEMORY, "")
    except Exception as error:  # whatever a peer raises belongs in its row
        return entrant.refused(ERROR, _first_line(error))


def gate(suite: Suite, case: Case, providers: Iterable[Provider], session: Session) -> list[Entrant]:
    """Every provider's result on the same inputs against float64; `call` is None where it is wrong."""
    device = session.device
    inputs = case.inputs(device, SEED)
    expected = suite.expect(case, inputs)

    def enter(blank: Entrant) -> Entrant:
        provider = blank.provider
        reason = provider.why_not(case, device)
        if reason:
            return blank.refused(UNAVAILABLE, reason)
        call = provider.open(case, device)
        problem = judged(suite, provider, case, inputs, expected, call(inputs))
        return blank.refused(FAILED, problem) if problem else dataclasses.replace(blank, call=call)

    entrants = []
    with torch.set_grad_enabled(case.direction == "backward"):
        for provider in providers:
            blank = Entrant(provider, _blank_row(case, provider, session))
            entrants.append(_attempt(blank, functools.partial(enter, blank)))
    return entrants


def _blank_row(case: Case, provider: Provider, session: Session) -> Row:
    return Row(
        op=case.op,
        case=case.name,
        direction=case.direction,
        dtype=short(case.dtype),
        device=session.device,
        threads=torch.get_num_threads(),
        provider=provider.name,
        role=provider.role,
        status=OK,
        machine=session.machine,
        versions=session.versions,
        commit=session.commit,
        utc=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    )


def measure(suite: Suite, case: Case, providers: Iterable[Provider], session: Session) -> list[Row]:
    """The rows of one case, in the order of the providers."""
    entrants = gate(suite, case, providers, session)
    with torch.set_grad_enabled(case.direction == "backward"):
        prepare = _on_cuda if session.device == "cuda" else _on_cpu
        entrants, samplers = prepare(suite, case, entrants)
        samples = timing.interleave(samplers, session.budget)
    rows = [
        _timed(entrant.row, case, samples[entrant.provider.name], session)
        if entrant.provider.name in samples
        else entrant.row
        for entrant in entrants
    ]
    return [_with_ratios(row, rows) for row in rows]


Prepared = tuple[list[Entrant], dict[str, Callable[[], float]]]


def _with(entrant: Entrant, **fields: Any) -> Entrant:
    return dataclasses.replace(entrant, row=dataclasses.replace(entrant.row, **fields))


def _extra_mib(call: Call, inputs: Inputs, device: str) -> float | None:
    extra = memory.peak_extra_bytes(functools.partial(call, inputs), device)
    return None if extra is None else extra / 2**20


def _enter_all(entrants: list[Entrant], enter: Callable[[Entrant, Call], Entrant]) -> list[Entrant]:
    """Makes every entrant that passed the gate ready for timing."""
    return [
        entrant
        if entrant.call is None
        else _attempt(entrant, functools.partial(enter, entrant, entrant.call))
        for entrant in entrants
    ]


def _on_cpu(suite: Suite, case: Case, entrants: list[Entrant]) -> Prepared:
    # One input set: in a network the layer before has just written the nodes, so they are warm too.
    inputs = case.inputs("cpu", SEED)
    samplers: dict[str, Callable[[], float]] = {}

    def enter(entrant: Entrant, call: Call) -> Entrant:
        extra = _extra_mib(call, inputs, "cpu")
        samplers[entrant.provider.name] = timing.cpu_sampler(functools.partial(call, inputs))
        return _with(entrant, extra_mib=extra, timed_by="clock")

    return _enter_all(entrants, enter), samplers


def _on_cuda(suite: Suite, case: Case, entrants: list[Entrant]) -> Prepared:
    first = case.inputs("cuda", SEED)
    bytes_a_set = sum(tensor.nbytes for tensor in first.values())
    others = range(1, timing.input_sets_for(bytes_a_set))
    input_sets = [first, *(case.inputs("cuda", SEED + number) for number in others)]
    expected = suite.expect(case, first)
    # One pool: the graphs never run at once, and several pools of N x M matrices would not fit.
    pool = torch.cuda.graph_pool_handle()
    samplers: dict[str, Callable[[], float]] = {}

    def enter(entrant: Entrant, call: Call) -> Entrant:
        extra = _extra_mib(call, first, "cuda")
        sampler = timing.CudaSampler(call, input_sets, pool, entrant.provider.capturable)
        problem = judged(suite, entrant.provider, case, first, expected, sampler.output)
        if problem:
            return entrant.refused(FAILED, f"when timed: {problem}")
        sampler.output = None  # its memory belongs to the next graph
        samplers[entrant.provider.name] = sampler
        return _with(entrant, extra_mib=extra, timed_by="graph" if sampler.captured else "events")

    return _enter_all(entrants, enter), samplers


def _timed(row: Row, case: Case, samples: list[float], session: Session) -> Row:
    p20, p50, p80 = timing.quantiles(samples)
    reached = ceiling.measure(session.device, case.dtype, session.quick)
    floor, limit = reached.floor(case.cost)
    return dataclasses.replace(
        row,
        p20_ms=p20 * 1e3,
        p50_ms=p50 * 1e3,
        p80_ms=p80 * 1e3,
        samples=len(samples),
        bytes=case.cost.bytes,
        flops=case.cost.flops,
        gb_per_s=case.cost.bytes / p50 / 1e9,
        gflop_per_s=case.cost.flops / p50 / 1e9,
        ceiling_share=floor / p50,
        ceiling=limit,
        copy_gb_per_s=reached.bytes_per_second / 1e9,
        product_gflop_per_s=reached.flops_per_second / 1e9,
    )


def _with_ratios(row: Row, rows: list[Row]) -> Row:
    if row.p50_ms is None:
        return row
    ratios = [
        f"{other.provider}={other.p50_ms / row.p50_ms:.3g}"
        for other in rows
        if other.p50_ms is not None and other.provider != row.provider
    ]
    return dataclasses.replace(row, ratios=";".join(ratios))

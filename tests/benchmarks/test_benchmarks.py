"""The benchmarks' own logic: what is counted, what the gate catches, what is written. No speed."""

from __future__ import annotations

import dataclasses
import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
# Last, so that an installed fer_kernels is tested and not the folder beside this one.
sys.path.append(str(ROOT))

from benchmarks import __main__ as command  # noqa: E402
from benchmarks import (  # noqa: E402
    gate,
    grapher,
    knn,
    memory,
    registry,
    relation,
    report,
    results,
    runner,
    timing,
)


def tiny_case(dtype=torch.float32, batch=2, queries=24, keys=24, channels=8, k=3, d=2) -> registry.Case:
    shape = dict(zip("BNMCkd", (batch, queries, keys, channels, k, d), strict=True))
    return registry.Case("knn", "tiny", shape, dtype, knn._cost(shape, dtype), knn._make_inputs)


def suite_with(*providers: registry.Provider, cases=None) -> registry.Suite:
    return registry.Suite("knn", cases or (tiny_case(),), providers, knn.expect, knn.judge)


def provider(name="eager", change=lambda idx: idx, **options) -> registry.Provider:
    """ViG's way with its answer changed."""

    def open_(case, device):
        call = knn._open_eager(case, device)
        return lambda inputs: change(call(inputs).clone())

    return registry.Provider(name, open_, **options)


def quick_session() -> runner.Session:
    return runner.Session("cpu", quick=True, budget=0.02, machine="a machine", versions="v", commit="c")


def gate_row(change=lambda idx: idx, case=None) -> results.Row:
    case = case or tiny_case()
    (entrant,) = runner.gate(suite_with(cases=(case,)), case, [provider(change=change)], quick_session())
    return entrant.row


# Registry


def test_every_file_of_an_operator_is_loaded():
    suites = registry.load()
    assert suites["knn"].op == "knn"
    assert {case.op for case in suites["knn"].cases} == {"knn"}


@pytest.mark.parametrize("op", ["knn", "relation"])
def test_cases_are_distinct(op):
    cases = registry.load()[op].cases
    assert len({(case.name, case.dtype, case.direction) for case in cases}) == len(cases)


def test_cases_cover_the_stated_shapes():
    cases = registry.load()["knn"].cases

    def shapes(device, tag, dtype):
        return {
            tuple(case.shape.values())
            for case in cases
            if device in case.devices and tag in case.tags and case.dtype == dtype
        }

    for dtype in (torch.float32, torch.bfloat16):
        assert shapes("cpu", "shapes", dtype) >= set(knn.CPU_SHAPES)
        assert shapes("cuda", "shapes", dtype) >= set(knn.GPU_SHAPES)
    assert {shape[1] for shape in shapes("cpu", "growth", torch.float32)} == {196, 392, 784, 1568, 3136}


def test_selection_looks_at_names_tags_dtypes_and_devices():
    suite = registry.load()["knn"]
    growth = registry.select(suite, "cpu", "growth")
    assert growth and all("growth" in case.tags for case in growth)
    halves = registry.select(suite, "cuda", "n49", ["bfloat16"])
    assert [case.shape["B"] for case in halves] == [128]
    assert registry.select(suite, "cpu", "no such case") == ()


def test_inputs_depend_on_the_seed_alone():
    case = tiny_case(queries=24, keys=12)
    once, again, other = case.inputs("cpu", 1), case.inputs("cpu", 1), case.inputs("cpu", 2)
    assert set(once) == {"x", "y"}
    assert torch.equal(once["x"], again["x"])
    assert not torch.equal(once["x"], other["x"])


def test_counted_cost():
    cost = tiny_case(torch.bfloat16, batch=2, queries=10, keys=4, channels=3, k=2, d=1).cost
    assert cost.bytes == 2 * (14 * 3 * 2 + 10 * 2 * 8)
    assert cost.flops == 2 * 3 * (2 * 10 * 4 + 3 * 14)
    own_keys = tiny_case(batch=1, queries=10, keys=10, channels=3, k=2, d=1).cost
    assert own_keys.bytes == 10 * 3 * 4 + 10 * 2 * 8


@pytest.mark.parametrize("field", ["direction", "role"])
def test_unknown_words_are_refused(field):
    with pytest.raises(ValueError, match="sideways"):
        if field == "direction":
            dataclasses.replace(tiny_case(), direction="sideways")
        else:
            provider(role="sideways")


def test_our_backends_say_why_they_are_missing():
    ours = [p for p in registry.load()["knn"].providers if p.role == "ours"]
    assert {p.name for p in ours} == {f"ours-{backend}" for backend in ("reference", "cpu", "triton", "cuda")}
    reasons = {p.name: p.why_not(tiny_case(), "cpu") for p in ours}
    assert reasons["ours-reference"] is None
    assert "CUDA" in reasons["ours-cuda"]


# Gate


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keys", [24, 12])
def test_a_right_provider_passes(dtype, keys):
    assert gate_row(case=tiny_case(dtype, keys=keys)).status == results.OK


def swapped_ends(idx):
    idx[0, 0, [0, -1]] = idx[0, 0, [-1, 0]]
    return idx


def one_key_twice(idx):
    idx[0, 0, 1] = idx[0, 0, 0]
    return idx


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (swapped_ends, "2 of 144 slots off by more than"),
        (one_key_twice, "1 queries have a neighbour twice"),
        (lambda idx: idx + 20, r"leave \[0, 24\)"),
        (lambda idx: idx - 30, r"leave \[0, 24\)"),
        (lambda idx: idx[..., :2], r"expected integer indices \(2, 24, 3\)"),
        (lambda idx: idx.float(), "float32"),
    ],
)
def test_a_wrong_provider_fails(change, reason):
    row = gate_row(change)
    assert row.status == results.FAILED
    assert re.search(reason, row.reason), row.reason


def test_any_choice_among_ties_passes_and_a_near_miss_does_not():
    case = tiny_case(batch=1, queries=6, keys=6, channels=2, k=2, d=1)
    directions = torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [0.0, 1.0], [0.0, 2.0], [1.0, 1e-2]])
    inputs = {"x": directions.unsqueeze(0)}
    expected = knn.expect(case, inputs)

    def judge(*first_row):
        idx = torch.tensor([list(first_row), [1, 2], [2, 0], [3, 4], [4, 3], [5, 0]]).unsqueeze(0)
        return knn.judge(case, inputs, expected, idx, torch.float32)

    for pair in itertools.permutations((0, 1, 2), 2):  # all three point the same way
        assert judge(*pair) is None
    assert "slots off" in judge(0, 5)  # 1e-4 away: beyond float32's rounding
    assert knn.rounding_bound(2, torch.bfloat16) > 1e-4  # and within bfloat16's


def test_distances_from_nan_rows_come_last():
    case = tiny_case(batch=1, queries=4, keys=4, channels=2, k=4, d=1)
    inputs = case.inputs("cpu", 0)
    inputs["x"][0, 1] = torch.nan
    expected = knn.expect(case, inputs)
    ascending = torch.tensor([[0, 2, 3, 1]]).repeat(4, 1)
    order = torch.stack([row.argsort() for row in next(knn._distances(inputs))[1][0].nan_to_num(nan=9.0)])
    assert knn.judge(case, inputs, expected, order.unsqueeze(0), torch.float32) is None
    early = ascending.roll(1, dims=1).unsqueeze(0)
    assert "slots off" in knn.judge(case, inputs, expected, early, torch.float32)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1.5])
def test_wrong_values_are_found_where_they_are(bad):
    expected = torch.zeros(2, 3, dtype=torch.float64)
    actual = expected.clone()
    actual[1, 2] = bad
    problem = gate.value_problem("outputs", actual, expected, 1.0)
    assert problem.startswith("1 of 6 outputs off") and "(1, 2)" in problem
    assert gate.value_problem("outputs", actual, actual.clone(), 0.0) is None
    assert "shape" in gate.value_problem("outputs", actual[:1], expected, 1.0)


def test_nothing_that_fails_is_timed_and_the_others_still_are():
    def raises(case, device):
        raise RuntimeError("first line\nsecond line")

    suite = suite_with(
        provider("right"),
        provider("wrong", lambda idx: idx.flip(-1)),
        registry.Provider("broken", raises),
        provider("absent", why_not=lambda case, device: "not installed"),
        registry.Provider("bound", lambda case, device: lambda inputs: None, role="floor", gated=False),
    )
    rows = {row.provider: row for row in runner.measure(suite, tiny_case(), suite.providers, quick_session())}
    statuses = {name: row.status for name, row in rows.items()}
    assert statuses == {
        "right": results.OK,
        "wrong": results.FAILED,
        "broken": results.ERROR,
        "absent": results.UNAVAILABLE,
        "bound": results.OK,
    }
    for name in ("wrong", "broken", "absent"):
        assert rows[name].p50_ms is None and rows[name].ratios == "" and rows[name].samples is None
    assert rows["broken"].reason == "RuntimeError: first line"
    assert rows["absent"].reason == "not installed"
    right = rows["right"]
    assert 0 < right.p20_ms <= right.p50_ms <= right.p80_ms
    assert right.ratios.startswith("bound=") and right.ceiling in ("bytes", "flops")
    assert right.ceiling_share > 0 and right.timed_by == "clock"


# Gradients: relation


RELATED = ("x", "y", "p", "q", "a")


def relation_case(mode="rmr", direction="backward", dtype=torch.float32, keys=16) -> registry.Case:
    shape = dict(zip("BNMCkHR", (3, 16, keys, 8, 3, 2, 4), strict=True))
    return registry.Case(
        "relation",
        f"{mode}-tiny",
        shape,
        dtype,
        relation._cost(shape, mode, direction, dtype),
        relation.make_inputs,
        relation.settle,
        direction,
    )


def grapher_case(dtype=torch.float32, keys=16) -> registry.Case:
    shape = dict(zip("BNMCkHR", (3, 16, keys, 8, 3, 2, 4), strict=True))
    return grapher.case(shape, dtype, "cpu")


def relation_row(case, change=lambda outputs: None, name="eager") -> results.Row:
    """The gate's verdict on a provider of relation's whose outputs `change` alters."""
    suite = registry.load()["relation"]
    (chosen,) = (p for p in suite.providers if p.name == name)

    def open_(case, device):
        call = chosen.open(case, device)

        def changed(inputs):
            outputs = {name: tensor.detach().clone() for name, tensor in call(inputs).items()}
            return change(outputs) or outputs

        return changed

    provider = dataclasses.replace(chosen, open=open_)
    (entrant,) = runner.gate(suite, case, [provider], quick_session())
    return entrant.row


def test_relation_covers_the_stated_shapes_modes_and_directions():
    cases = registry.load()["relation"].cases
    for shape, dtype in itertools.product(relation.CPU_SHAPES, (torch.float32, torch.bfloat16)):
        found = {
            (case.name.partition("-")[0], case.direction)
            for case in cases
            if tuple(case.shape.values()) == shape and case.dtype == dtype and case.devices == ("cpu",)
        }
        assert found == {
            *itertools.product(("mr", "rmr", "rsum"), registry.DIRECTIONS),
            ("grapher", "backward"),
        }
    on_gpu = {tuple(case.shape.values()) for case in cases if case.devices == ("cuda",)}
    assert on_gpu == set(relation.GPU_SHAPES)


def test_counted_cost_of_a_relation():
    def cost(mode, direction, keys):
        return relation_case(mode, direction, torch.bfloat16, keys).cost

    x, y, p, q, idx, a = 3 * 16 * 8 * 2, 3 * 9 * 8 * 2, 3 * 16 * 4 * 2, 3 * 9 * 4 * 2, 3 * 16 * 3 * 8, 4 * 2
    assert cost("mr", "forward", 9).bytes == x + y + idx + x
    assert cost("mr", "forward", 16).bytes == x + idx + x  # the keys are x
    assert cost("rsum", "forward", 9).bytes == x + y + p + q + a + idx + x
    # Backward reads the upstream gradient, the graph and the slots, and writes what it was asked for.
    slots = 3 * 16 * 8
    assert cost("mr", "backward", 9).bytes == (x + y + idx + x + slots) + (x + idx + slots) + (x + y)
    inputs = x + y + p + q + a
    assert (
        cost("rmr", "backward", 9).bytes == (inputs + idx + x + slots) + (x + idx + slots + inputs) + inputs
    )
    assert cost("rsum", "backward", 9).bytes == (inputs + idx + x) + (x + idx + inputs) + inputs
    assert cost("mr", "forward", 9).flops == 3 * 16 * 8


@pytest.mark.parametrize("keys", [16, 9])
@pytest.mark.parametrize("mode", ["mr", "rmr", "rsum"])
def test_the_gates_gradients_are_autograds(mode, keys):
    case = relation_case(mode, keys=keys, dtype=torch.float64)
    inputs = case.inputs("cpu", 0)
    truth = relation.expect(case, inputs)[torch.float32]
    outputs = relation._open_eager(case, "cpu")(inputs)
    assert set(outputs) == set(truth) == {"m"} | {f"d{name}" for name in RELATED if name in inputs}
    for name, (value, error) in truth.items():
        torch.testing.assert_close(outputs[name].detach(), value, rtol=1e-12, atol=1e-13)
        assert error.shape == value.shape


@pytest.mark.parametrize("name", ["eager", "ours-reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keys", [16, 4])  # a grid of 4 x 4, or its squares of 2 x 2
@pytest.mark.parametrize("mode", ["mr", "rmr", "rsum", "grapher"])
def test_right_values_and_gradients_pass(mode, keys, dtype, name):
    cases = [grapher_case(dtype, keys)]
    if mode != "grapher":
        cases = [relation_case(mode, direction, dtype, keys) for direction in registry.DIRECTIONS]
    for case in cases:
        row = relation_row(case, name=name)
        assert row.status == results.OK, row.reason


def times(name, factor):
    return lambda outputs: outputs | {name: outputs[name] * factor}


def first_element(name, change):
    def wrong(outputs):
        outputs[name].view(-1)[0] += change

    return wrong


@pytest.mark.parametrize("mode", ["rmr", "rsum"])
@pytest.mark.parametrize("name", ["m", "dx", "dy", "dp", "dq", "da"])
@pytest.mark.parametrize("change", [1e-2, torch.nan])
def test_one_wrong_element_fails(mode, name, change):
    row = relation_row(relation_case(mode, keys=9), first_element(name, change))
    assert row.status == results.FAILED and re.match(rf"1 of \d+ {name} off", row.reason), row.reason


def test_a_wrong_value_of_our_backend_fails_in_bfloat16_too():
    case = relation_case(dtype=torch.bfloat16)
    assert relation_row(case, first_element("dq", 0.05), "ours-reference").status == results.FAILED


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda outputs: {"m": outputs["m"]}, "expected m, dx, dp, dq, da, got m"),
        (lambda outputs: outputs | {"dp": outputs["dp"][:, :1]}, "dp has shape"),
    ],
)
def test_a_missing_gradient_fails(change, reason):
    row = relation_row(relation_case(), change)
    assert row.status == results.FAILED and reason in row.reason


def another_neighbour(outputs):
    outputs["idx"][0, 0, -1] = next(key for key in range(16) if key not in outputs["idx"][0, 0].tolist())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (another_neighbour, "graph: 1 of 144 slots off"),
        (times("out", 1.001), "out is off by 1.00e-03 of its norm"),
        (times("out", torch.nan), "out is off by nan"),
        (times("dq", 0), "dq is off by 1.00e\\+00 of its norm"),
        (times("dx", -1), "dx is off by 2.00e\\+00 of its norm"),
        (times("dfc1", 0.98), "dfc1 is off by 2.00e-02 of its norm"),
    ],
)
def test_a_wrong_block_fails(change, reason):
    row = relation_row(grapher_case(), change)
    assert row.status == results.FAILED and re.match(reason, row.reason), row.reason


@pytest.mark.parametrize("name", ["dx", "dp", "dq", "da", "dfc1", "dgroups"])
def test_a_block_without_a_gradient_fails_in_bfloat16(name):
    row = relation_row(grapher_case(torch.bfloat16), times(name, 0))
    assert row.status == results.FAILED and row.reason.startswith(f"{name} is off"), row.reason


def test_a_maximum_whose_winner_is_open_gets_no_gradient():
    case = relation_case("mr", keys=9)
    inputs = relation.make_inputs(case, torch.Generator().manual_seed(0))
    first, second = inputs["idx"][0, 0, :2]
    inputs["y"][0, first, :4] = 10.0
    inputs["y"][0, second, :2] = 10.0  # equal
    inputs["y"][0, second, 2:4] = 10.0 - 1e-3  # nearly, but float32 tells them apart
    settled = relation.settle(case, inputs)["grad"]
    assert settled[0, 0, :2].eq(0).all() and settled[0, 0, 2:4].ne(0).all()
    assert settled.ne(0).float().mean() > 0.9
    # With that, one right answer is left: the first slot and an even split both pass.
    call, expected = relation._open_eager(case, "cpu"), relation.expect(case, inputs)
    ours = relation._run_ours(case, "reference")
    for outputs in (call(inputs), ours(inputs)):
        assert relation.judge(case, inputs, expected, outputs, torch.float32) is None


def test_backward_is_timed_with_its_memory():
    case = relation_case()
    suite = registry.load()["relation"]
    chosen = [p for p in suite.providers if p.name in ("ours-reference", "eager")]
    rows = runner.measure(suite, case, chosen, quick_session())
    assert [row.status for row in rows] == [results.OK] * 2
    assert all(row.p50_ms > 0 and row.direction == "backward" for row in rows)


# Timing and memory


def test_quantiles():
    assert timing.quantiles([float(i) for i in range(11)]) == (2.0, 5.0, 8.0)
    assert timing.quantiles([3.0]) == (3.0, 3.0, 3.0)
    assert timing.quantiles([2.0, 1.0]) == pytest.approx((1.2, 1.5, 1.8))


def test_samplers_take_turns_in_both_orders():
    turns = []

    def sampler(name):
        return lambda: turns.append(name) or 1.0

    samples = timing.interleave({name: sampler(name) for name in "ab"}, budget=0.0)
    assert turns == ["a", "b", "b", "a", "a", "b"][: 2 * timing.MIN_ROUNDS]
    assert samples == {name: [1.0] * timing.MIN_ROUNDS for name in "ab"}


def test_memory_counts_what_a_call_allocates():
    size = 64 << 20
    extra = memory.peak_extra_bytes(lambda: torch.ones(size, dtype=torch.uint8), "cpu")
    if extra is None:
        pytest.skip("this system does not let a process reset its peak memory")
    assert size * 0.9 < extra < size * 2
    # What is freed before the call ends still counts: a peak, not a balance.
    assert (
        memory.peak_extra_bytes(lambda: torch.ones(size, dtype=torch.uint8)[:1].clone(), "cpu") > size * 0.9
    )


def test_memory_of_a_backward_counts_what_the_forward_saved():
    x = torch.zeros(16 << 20, requires_grad=True)

    def step():
        return torch.autograd.grad(x.exp().sum(), x)  # keeps exp(x), then makes the gradient beside it

    extra = memory.peak_extra_bytes(step, "cpu")
    if extra is None:
        pytest.skip("this system does not let a process reset its peak memory")
    assert 1.8 * x.nbytes < extra < 4 * x.nbytes


# Files


def row(case="n49", name="ours-cpu", ms=1.0, role="ours", **options) -> results.Row:
    fields = {
        "op": "knn",
        "direction": "forward",
        "dtype": "float32",
        "device": "cpu",
        "threads": 2,
        "status": results.OK,
        "machine": "a CPU",
        "versions": "torch 2",
        "commit": "abc",
    }
    fields |= {"ceiling_share": 0.25, "extra_mib": 1.5} if ms else {}
    return results.Row(case=case, provider=name, role=role, p50_ms=ms, **(fields | options))


SAMPLE = [
    row("n196", ms=2.0),
    row("n196", "eager", 16.0, "peer"),
    row("n196", "bmm", 1.0, "floor"),
    row("n49"),
    row("n49", "eager", 2.0, "peer"),
    row("n49", "bmm", 1.0, "floor"),
    row("n49", "faiss", None, "peer", status=results.UNAVAILABLE, reason="No module named 'faiss'"),
]


def test_csv_holds_every_column_and_reads_back(tmp_path):
    path = tmp_path / "deep" / "knn.csv"
    results.save_csv(path, SAMPLE)
    header = path.read_text().splitlines()[0].split(",")
    wanted = {"p20_ms", "p50_ms", "p80_ms", "ratios", "bytes", "flops", "ceiling_share", "extra_mib"}
    assert wanted | {"machine", "threads", "versions", "commit"} <= set(header)
    assert results.load_csv(path) == SAMPLE
    assert [file.name for file in path.parent.iterdir()] == ["knn.csv"]


def test_a_foreign_csv_is_refused(tmp_path):
    path = tmp_path / "other.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"other\.csv is not a result file"):
        results.load_csv(path)


def test_a_case_measured_again_replaces_all_its_rows():
    again = row("n49", ms=3.0)
    merged = results.merge(SAMPLE, [again])
    assert merged == [*SAMPLE[:3], again]
    other_threads = row("n49", threads=1)
    assert results.merge(SAMPLE, [other_threads]) == [*SAMPLE, other_threads]


# Report


def test_report_states_ratios_and_their_mean():
    text = report.render(SAMPLE)
    assert "| case | dtype | p50 ms | vs eager | of bmm | of ceiling | extra MiB |" in text
    assert "| n49 | float32 | 1 | 2x | 1x | 25% | 1.5 |" in text
    assert "| n196 | float32 | 2 | 8x | 2x | 25% | 1.5 |" in text
    assert "| geometric mean |  |  | 4x | 1.41x |  |  |" in text
    assert "- faiss: unavailable on 1 of 2 cases (No module named 'faiss')" in text
    assert text.index("| n49 ") < text.index("| n196 ")


def test_summary_has_a_line_for_what_a_table_has():
    failed = row("n784", ms=None, status=results.FAILED)
    text = report.summary([*SAMPLE, failed, row("n784", "eager", 3.0, "peer")])
    assert "On a CPU, 2 threads:" in text
    assert "| knn | forward | `ours-cpu` | 3 | 4x (2x to 8x) |  | of bmm 1.41x |" in text
    assert text.count("`ours-cpu`") == 1
    both = report.summary([*SAMPLE, row(ms=1.0, direction="backward")])
    assert both.count("`ours-cpu`") == 2 and "forward and backward" in both
    assert report.summary([]) == "No results.\n"


def test_report_has_a_table_for_every_kind_and_direction():
    rows = [
        row("rmr-b2-n49", ms=1.0),
        row("rmr-b2-n49", "eager", 4.0, "peer"),
        row("rmr-b2-n49", ms=1.0, direction="backward"),
        row("rmr-b2-n49", "eager", 9.0, "peer", direction="backward"),
        row("grapher-b2-n49", ms=1.0, direction="backward"),
        row("grapher-b2-n49", "eager", 2.0, "peer", direction="backward"),
        row("grapher-b2-n49", "pyg", None, "peer", direction="backward", status=results.UNAVAILABLE),
    ]
    text = report.render([dataclasses.replace(one, op="relation") for one in rows])
    titles = [
        "**relation grapher, forward and backward, `ours-cpu`**",
        "**relation rmr, forward, `ours-cpu`**",
        "**relation rmr, forward and backward, `ours-cpu`**",
    ]
    assert re.findall(r"\*\*relation.*?\*\*", text) == titles
    # A mean never mixes kinds, and the kind is not repeated in every line.
    assert re.findall(r"\| geometric mean \|  \|  \| (\S+) \|", text) == ["2x", "4x", "9x"]
    assert text.count("| b2-n49 |") == 3
    assert text.count("Commit abc") == 1 and text.count("- pyg: unavailable on 1 of 3 cases") == 1


def test_report_does_not_depend_on_the_order_of_rows():
    assert len({report.render(list(order)) for order in (SAMPLE, SAMPLE[::-1], SAMPLE[3:] + SAMPLE[:3])}) == 1
    assert report.brief(SAMPLE) == report.brief(SAMPLE[::-1])


def test_report_shows_a_failure_instead_of_a_time():
    failed = row("n49", ms=None, status=results.FAILED, reason="1 of 9 slots off")
    text = report.render([*SAMPLE[:3], failed, *SAMPLE[4:]])
    assert "| n49 | float32 | FAILED |" in text
    assert "- ours-cpu: FAILED on 1 of 2 cases (1 of 9 slots off)" in text
    assert "FAILED" in report.brief([*SAMPLE[:3], failed, *SAMPLE[4:]])


def test_report_of_nothing():
    assert report.render([]) == "No results.\n"


def test_update_replaces_only_the_blocks_it_can_fill(tmp_path, capsys):
    table = tmp_path / "knn-a-cpu.csv"
    results.save_csv(table, SAMPLE)
    document = tmp_path / "README.md"
    before = (
        "# Title\n<!-- benchmarks:knn -->\nold\n<!-- /benchmarks -->\nbetween\n"
        "<!-- benchmarks:knn-a-cpu --><!-- /benchmarks -->\n"
        "<!-- benchmarks:jad -->\nkeep\n<!-- /benchmarks -->\n"
        "<!-- benchmarks:summary -->\n<!-- /benchmarks -->\n"
    )
    document.write_text(before)
    assert command.main(["report", str(table), "--update", str(document)]) == 0
    text = document.read_text()
    assert text.count("| geometric mean |") == 2 and "old" not in text
    assert text.startswith("# Title\n") and "between" in text
    assert "<!-- benchmarks:jad -->\nkeep\n<!-- /benchmarks -->" in text
    assert "<!-- benchmarks:summary -->\nHow many times faster" in text and "\nOn a CPU" in text
    assert command.main(["report", str(table), "--update", str(document)]) == 0
    assert document.read_text() == text
    document.write_text("nothing to fill")
    assert command.main(["report", str(table), "--update", str(document)]) == 1
    assert "<!-- benchmarks:knn -->" in capsys.readouterr().err


# Command line


@pytest.fixture
def tiny_suite(monkeypatch):
    """Replaces all suites by one whose cases and providers the test chooses."""

    def install(*providers, cases=None):
        suite = suite_with(*providers, cases=cases)
        monkeypatch.setattr(registry, "load", lambda: {"knn": suite})

    return install


def test_verify_exits_by_the_gate(tiny_suite, capsys):
    tiny_suite(provider("right"))
    assert command.main(["verify", "--device", "cpu"]) == 0
    tiny_suite(provider("right"), provider("wrong", lambda idx: idx.flip(-1)))
    assert command.main(["verify", "--device", "cpu"]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_a_failed_provider_is_printed_without_a_time(tiny_suite, capsys, tmp_path):
    tiny_suite(provider("right"), provider("wrong", lambda idx: idx.flip(-1)))
    assert command.main(["run", "--quick", "--device", "cpu", "--budget", "0.02"]) == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("wrong")]
    assert line.split()[1] == "FAILED:"


def test_what_was_measured_is_saved_when_the_run_dies(tiny_suite, tmp_path):
    def interrupted(idx):
        raise KeyboardInterrupt

    path = tmp_path / "out.csv"
    other = dataclasses.replace(tiny_case(), name="other")
    dying = provider("sometimes", why_not=lambda case, device: "no" if case.name == "tiny" else None)
    dying = dataclasses.replace(dying, open=lambda case, device: interrupted)
    tiny_suite(provider("right"), dying, cases=(tiny_case(), other))
    with pytest.raises(KeyboardInterrupt):
        command.main(["run", "--quick", "--device", "cpu", "--budget", "0.02", "--csv", str(path)])
    assert [(row.case, row.provider) for row in results.load_csv(path)] == [
        ("tiny", "right"),
        ("tiny", "sometimes"),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "nothing"], "unknown operator nothing"),
        (["--provider", "nobody"], "unknown provider nobody"),
        (["--case", "nowhere"], "no case on cpu matches"),
    ],
)
def test_a_selection_of_nothing_is_an_error(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        command.main(["run", "--device", "cpu", *arguments])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["run", "verify", "report"])
def test_help_shows_an_example(name, capsys):
    with pytest.raises(SystemExit):
        command.main([name, "--help"])
    assert f"  python -m benchmarks {name}" in capsys.readouterr().out


def test_a_real_run_end_to_end(tmp_path):
    path, as_json = tmp_path / "out.csv", tmp_path / "out.json"
    arguments = ["run", "--quick", "--device", "cpu", "--op", "knn", "--case", "n49", "--dtype", "float32"]
    arguments += ["--provider", "ours-reference", "--provider", "eager", "--provider", "bmm"]
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments, "--csv", str(path), "--json", str(as_json)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert "[1/1] knn b32-n49-m49-c640-k9-d1 float32 forward" in run.stderr
    rows = results.load_csv(path)
    assert [(row.provider, row.status) for row in rows] == [
        (name, results.OK) for name in ("ours-reference", "eager", "bmm")
    ]
    assert all(row.samples and row.commit and row.machine for row in rows)
    assert as_json.read_text().count('"provider"') == 3

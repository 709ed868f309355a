"""The kernels' bench: what it counts by hand, what it prints, and when it refuses to."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from offramp.kernels.backend import INTERPRETED, rehearsal, triton
from offramp.kernels.masked_linear import Rows, Tiles, masked_linear, tiles_for
from offramp.models.shapes import MODEL_SHAPES
from offramp.server.bench import device
from offramp.server.bench.command import main
from offramp.server.bench.common import Refused
from offramp.server.bench.device import Ceilings, Timing
from offramp.server.bench.kernels import layers, products, run
from offramp.server.bench.kernels.case import (
    Case,
    Copies,
    Setup,
    Shape,
    Work,
    check,
    difference,
    figures,
    measure_case,
)
from offramp.server.bench.kernels.products import tile_candidates, tiles_text
from offramp.server.bench.kernels.run import OPS

ARGS = ["kernels", "--context", "33", "--seconds", "0"]
CPU = torch.device("cpu")
# Two blocks of 32 tokens a text.
TINY = Shape(MODEL_SHAPES["tiny"], torch.float32, CPU, context=33)
interpreted = pytest.mark.skipif(triton is None or not INTERPRETED, reason="no interpreter")

# Bytes read, bytes written and operations of two rows of the tiny shape in fp32: hidden 64, 4 heads
# and 2 of K,V of 16 each, inner 128, 4 layers, vocabulary 320, contexts of 33.
BY_HAND = {
    "rms_norm": [(3 * 64 * 4, 2 * 64 * 4, 4 * 2 * 64)],
    # Two places and the count.
    "masked_rms_norm": [(3 * 64 * 4 + 8 + 4, 2 * 64 * 4, 4 * 2 * 64)],
    "add_rms_norm": [(5 * 64 * 4, 4 * 64 * 4, 5 * 2 * 64)],
    "swiglu": [(2 * 256 * 4, 2 * 128 * 4, 5 * 2 * 128)],
    "linear": [
        ((128 + 2) * 64 * 4, 2 * 128 * 4, 2 * 2 * 64 * 128),
        ((64 + 2) * 64 * 4, 2 * 64 * 4, 2 * 2 * 64 * 64),
        ((256 + 2) * 64 * 4, 2 * 256 * 4, 2 * 2 * 64 * 256),
        ((64 + 2) * 128 * 4, 2 * 64 * 4, 2 * 2 * 128 * 64),
        ((320 + 2) * 64 * 4, 2 * 320 * 4, 2 * 2 * 64 * 320),
        ((256 + 2) * 64 * 4, 2 * 256 * 4, 2 * 2 * 64 * 256),
        ((2048 + 2) * 64 * 4, 2 * 2048 * 4, 2 * 2 * 64 * 2048),
        ((64 + 2) * 1024 * 4, 2 * 64 * 4, 2 * 2 * 1024 * 64),
        ((320 + 2) * 64 * 4, 2 * 320 * 4, 2 * 2 * 64 * 320),
    ],
    "masked_linear": [
        # The weight, two rows, the count.
        (32768 + 512 + 4, 1024, 32768),
        # The weight, two rows, two of the residual, four places, the count.
        (16384 + 512 + 512 + 16 + 4, 512, 16384),
        (65536 + 512 + 4, 1024, 65536),
        (32768 + 1024 + 512 + 16 + 4, 512, 32768),
        (81920 + 512 + 4, 2560, 81920),
        # The gate's bias.
        (65536 + 1024 + 512 + 4, 2048, 65536),
        (524288 + 512 + 4, 8192, 524288),
        # The scale of the residual.
        (262144 + 256 + 8192 + 512 + 8 + 4, 512, 262144),
        (81920 + 512 + 4, 2560, 81920),
    ],
    # All heads, two angles of 16, a place; the count. Six heads of each row are turned.
    "rope_and_store": [(2 * (512 + 128 + 8) + 4, 2 * 512, 3 * 2 * 6 * 16)],
    # Queries; K and V of 33 tokens a text; position, begin and two blocks each; the count.
    "decode_attention": [(512 + 2 * 66 * 128 + 8 * (2 + 2 + 4) + 4, 512, 4 * 66 * 64)],
    # K and V of one text, and one tile; the first row sees 32 tokens, the second 33.
    "prefill_attention": [(512 + 2 * 33 * 128 + 8 * (2 + 2 + 2) + 8, 512, 4 * 65 * 64)],
    # Two layers' K and V are 128 rows of weight.
    "fill_kv": [(32768 + 2 * (256 + 128 + 4 + 8 + 8) + 4, 2 * 512, 2 * 2 * 64 * 128)],
    "embed_rows": [(2 * (256 + 4 + 8) + 4, 512, 0)],
    "gather_rows": [(2 * (4 + 4 + 8 + 8 + 8) + 8, 2 * (4 + 8 + 8 + 8) + 4, 0)],
    "apply_gate": [((2 * 256 + 256 + 1) * 4 + 2 * 12 + 4, 2 * 20 + 4, 2 * 2 * 256)],
    "apply_exit": [(2 * (6 * 4 + 5 * 8) + 16 + 4, 2 * (4 + 8 + 8 + 44) + 4, 0)],
    "finish_rows": [(2 * (4 + 8 + 8 + 8) + 4, 2 * 44, 0)],
    "score_logits": [(2 * 1280 + 4, 2 * (8 + 12), 5 * 640)],
    "sample_rows": [(2 * (1280 + 20 + 16) + 4, 2 * 8, 4 * 640)] * 2,
}


def cases(name: str, rows: int = 2, count: int = 2, copies: Copies | None = None) -> list[Case]:
    return list(OPS[name](Setup(TINY, copies), rows, count))


def test_all_ops_are_counted_by_hand() -> None:
    assert BY_HAND.keys() == OPS.keys()


@pytest.mark.parametrize("name", OPS)
def test_bytes_and_operations_are_those_counted_by_hand(name: str) -> None:
    """Every number once, whatever the kernel reads twice."""
    found = [(c.work.read, c.work.written, c.work.flops) for c in cases(name)]
    assert found == BY_HAND[name]


@pytest.mark.parametrize("name", OPS)
def test_only_counted_rows_are_work(name: str) -> None:
    """Rows behind the count cost a launch nothing that counts."""
    assert [c.work for c in cases(name, rows=8, count=2)] == [c.work for c in cases(name)]


def test_a_product_in_bf16_reads_half() -> None:
    """All but the count; logits stay fp32."""
    setup = Setup(replace(TINY, dtype=torch.bfloat16))
    work = [case.work for case in OPS["masked_linear"](setup, 2, 2)]
    assert work[0] == Work((32768 + 512) // 2 + 4, 512, 32768)
    assert work[4].written == 2560


def test_copies_are_read_in_turn() -> None:
    """Enough of them to come to what caches hold, each its own memory."""
    setup = Setup(TINY, Copies(100_000, 512))
    ((first,), *others) = setup.copied(setup.weight(128, 64))
    assert len(others) == 3
    assert len({first.data_ptr(), *(each.data_ptr() for (each,) in others)}) == 4
    qkv = cases("masked_linear", copies=Copies(100_000, 512))[0]
    assert (len(qkv.launches), qkv.cold) == (4, 4 * 32768)
    attention = cases("decode_attention", copies=Copies(100_000, 2))[0]
    # Four blocks of 32 places, K and V of 32 numbers each.
    assert (len(attention.launches), attention.cold) == (2, 2 * 2 * 128 * 128)


@pytest.mark.parametrize("name", OPS)
def test_an_emptied_case_changes_nothing(name: str) -> None:
    """What its launches write afterwards is not read."""
    for case in cases(name, rows=3, count=2):
        if case.empty is None or name in {"rope_and_store", "decode_attention"}:
            continue  # The host counts the rows, or what is returned means nothing.
        case.launches[0]()
        case.empty()
        before = {key: value.clone() for key, value in case.results().items() if key != "count"}
        case.launches[0]()
        after = case.results()
        assert all(
            torch.equal(after[key][: len(value)], value[: len(after[key])])
            for key, value in before.items()
        )


def test_the_binding_ceiling_is_the_slower_one() -> None:
    """Microseconds, rates and shares of a launch of known cost."""
    ceilings = Ceilings(copy_bytes_per_s=2e9, read_bytes_per_s=1e9, flops_per_s=4e12)
    timing = Timing(median=2e-6, least=1e-6, samples=3, launches=10)

    def row(work: Work) -> dict[str, Any]:
        case = Case("op", "this", 1, work, [], lambda: None, dict)
        return figures(case, timing, None, ceilings)

    read = row(Work(read=1500, written=500, flops=10))
    assert (read["ceiling"], read["share"], read["us"]) == ("memory", 0.5, 2.0)
    assert (read["gb_per_s"], read["empty_us"]) == (1.0, None)
    multiplied = row(Work(read=1, written=1, flops=2_000_000))
    assert (multiplied["ceiling"], multiplied["share"]) == ("compute", 0.25)
    assert multiplied["tflop_per_s"] == 1.0


class FakeGraphs:
    """A GPU that replays rows of launches in half a millisecond each, whatever is in them."""

    recorded: ClassVar[list[int]] = []

    def __init__(self, device: torch.device) -> None:
        assert device.type == "cuda"

    def record(self, launches: Callable[[], None]) -> Callable[[], None]:
        calls.clear()
        launches()
        self.recorded.append(len(calls))
        return lambda: None


class FakeEvent:
    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, other: FakeEvent) -> float:
        assert other is not self
        return 0.5


calls: list[int] = []


def test_on_a_gpu_rows_are_long_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a millisecond is recorded again four times over, its copies still in turn."""
    monkeypatch.setattr(device, "Recorder", FakeGraphs)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    launches = [lambda: calls.append(1), lambda: calls.append(2)]
    timing = device.Clock(launches, torch.device("cuda")).time(0)
    assert FakeGraphs.recorded == [2, 8]
    assert calls == [1, 2] * 4
    assert (timing.samples, timing.launches) == (3, 8)
    assert timing.median == timing.least == pytest.approx(0.5e-3 / 8)


def test_a_run_ends_with_a_line_of_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every op with every number of rows, and a Markdown file that says how it came about."""
    page = tmp_path / "kernels.md"
    assert main([*ARGS, "--rows", "1,3", "--device", "cpu", "--markdown", str(page)]) == 0
    out = capsys.readouterr().out
    document = json.loads(out.splitlines()[-1])
    assert {(case["op"], case["rows"]) for case in document["cases"]} == {
        (name, rows) for name in OPS for rows in (1, 3)
    }
    assert document["runs"] == "references"
    assert document["device"]["type"] == "cpu"
    assert document["torch"] == torch.__version__
    assert (document["model_shape"], document["dtype"]) == ("tiny", "float32")
    assert document["skipped"] == []
    assert "tiles" not in document
    assert "A rehearsal" in out
    written = page.read_text(encoding="utf-8")
    assert document["command"] in written
    assert document["date"][:10] in written
    assert " decode_attention |" in written


def test_only_the_ops_asked_for_are_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ARGS, "--rows", "2", "--ops", "finish_rows,gather_rows", "--device", "cpu"]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [case["op"] for case in document["cases"]] == ["gather_rows", "finish_rows"]


def test_what_does_not_fit_the_memory_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rest is reported."""

    def measured(setup: Setup, case: Case, *rest: Any) -> dict[str, Any]:
        if case.op == "gather_rows":
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried")
        return measure_case(setup, case, *rest)

    monkeypatch.setattr(run, "measure_case", measured)
    assert main([*ARGS, "--rows", "2", "--ops", "finish_rows,gather_rows", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    document = json.loads(out.splitlines()[-1])
    assert document["skipped"] == [{"op": "gather_rows", "rows": 2, "why": "CUDA out of memory."}]
    assert [case["op"] for case in document["cases"]] == ["finish_rows"]
    assert "Skipped: gather_rows, 2 rows: CUDA out of memory." in out


@pytest.mark.parametrize(
    "wrong", [["--ops", "gather_rows,stay"], ["--model-shape", "llama-9"], ["--rows", "0"]]
)
def test_what_is_unknown_is_named(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*ARGS, *wrong])
    assert stopped.value.code == 2
    assert wrong[0] in capsys.readouterr().err


def halved(gate_up: Tensor) -> Tensor:
    """No gate."""
    return gate_up.chunk(2, dim=-1)[1]


def fallen(gate_up: Tensor) -> Tensor:
    raise RuntimeError("out of resource: shared memory")


@pytest.mark.parametrize(
    ("broken", "said"),
    [(halved, "differs in"), (fallen, "out of resource")],
    ids=["wrong", "falls"],
)
def test_a_wrong_op_is_refused(
    broken: Callable[[Tensor], Tensor],
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A fast wrong answer has no speed, and neither have the others."""
    monkeypatch.setattr(layers, "swiglu", broken)
    assert main([*ARGS, "--rows", "4", "--ops", "rms_norm,swiglu", "--device", "cpu"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "refused: swiglu" in captured.err
    assert said in captured.err


def test_a_row_behind_the_count_may_not_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check leaves a quarter of the rows out and looks at them too."""

    def eager(x: Rows, weight: Tensor, out: Rows, _: Tensor, **rest: Any) -> None:
        masked_linear(x, weight, out, torch.tensor([8], dtype=torch.int32), **rest)

    monkeypatch.setattr(products, "masked_linear", eager)
    with pytest.raises(Refused, match="masked_linear, qkv 128x64, 6 of 8 rows"):
        check("masked_linear", OPS["masked_linear"], TINY, 8)


def test_distances_beyond_rounding_are_told() -> None:
    """NaN and other shapes are wrong, integers have to be equal."""
    ones = torch.ones(4)
    assert difference(ones + 1e-5, ones, torch.float32) is None
    assert difference(ones + 1e-3, ones, torch.float32) == "differs in 4 of 4, by up to 0.001"
    assert difference(ones + 1e-3, ones, torch.bfloat16) is None
    assert difference(ones / 0 * 0, ones, torch.float32) == "differs in 4 of 4, by up to inf"
    small = ones / 100
    assert difference(torch.zeros(4), small, torch.bfloat16) == "differs in 4 of 4, by up to 0.01"
    assert difference(ones[:2], ones, torch.float32) == "is [2] instead of [4]"
    whole = torch.arange(4)
    assert difference(whole, whole, torch.float32) is None
    assert difference(whole + 1, whole, torch.float32) == "differs in 4 of 4"


def test_cuts_around_the_one_in_use() -> None:
    """Its neighbours, each once; none below what tensor cores multiply."""
    base = tiles_for(1, 6144, torch.bfloat16)
    found = tile_candidates(base)
    assert found[0] == base
    assert len(set(found)) == len(found)
    assert {replace(base, outs=2 * base.outs), replace(base, stages=3)} <= set(found)
    assert all(min(cut.rows, cut.outs, cut.ins) >= 16 for cut in found)


def test_cuts_that_fail_are_skipped_and_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that does not fit, one whose result is wrong; the rest are compared."""

    def picky(*args: Any, tiles: Tiles | None = None, **rest: Any) -> None:
        if tiles is not None and tiles.outs == 32:
            raise RuntimeError("out of resource: shared memory\nand more")
        masked_linear(*args, tiles=tiles, **rest)
        if tiles is not None and tiles.stages == 2:
            args[2].data.add_(1)

    monkeypatch.setattr(products, "masked_linear", picky)
    command = [*ARGS, "--rows", "2", "--ops", "masked_linear", "--device", "cpu", "--tiles"]
    assert main(command) == 0
    out = capsys.readouterr().out
    rows = json.loads(out.splitlines()[-1])["tiles"]
    assert [row["what"].split()[0] for row in rows] == [
        product.name for product in products.products(TINY.config)
    ]
    base = tiles_for(2, 128, torch.float32)
    for row in rows:
        assert row["chosen"] == tiles_text(base)
        assert row["ratio"] >= 1
        assert row["chosen_us"] >= row["best_us"] == min(cut["us"] for cut in row["cuts"])
        reasons = {skipped["cut"]: skipped["why"] for skipped in row["skipped"]}
        wide = tiles_text(replace(base, outs=32))
        assert reasons[wide] == "RuntimeError: out of resource: shared memory"
        assert "differs in" in reasons[tiles_text(replace(base, stages=2))]
        assert len(row["cuts"]) + len(reasons) == len(tile_candidates(base))
    assert f"Skipped: qkv 128x64, 2 rows, {wide}: RuntimeError" in out


@interpreted
def test_kernels_are_rehearsed(capsys: pytest.CaptureFixture[str]) -> None:
    """All but the products, which take the interpreter long."""
    others = ",".join(name for name in OPS if name != "masked_linear")
    with rehearsal():
        assert main([*ARGS, "--rows", "2", "--ops", others, "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert json.loads(out.splitlines()[-1])["runs"] == "interpreted kernels"
    assert "interpreter" in out


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_are_checked_in_the_interpreter(dtype: torch.dtype) -> None:
    with rehearsal():
        check("masked_linear", OPS["masked_linear"], replace(TINY, dtype=dtype), 5)

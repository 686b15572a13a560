"""The benchmark scripts run, refuse to time a wrong answer, and their tables say what the JSON says. No test judges a time."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def script(monkeypatch):
    """Imports a script of benchmarks/ by its name."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


def timing(median: float) -> dict[str, float]:
    return {"median": median, "lower_quartile": median * 0.9, "upper_quartile": median * 1.1, "fastest": median, "calls": 9}


def row(length: int, ms: float, dtype: str = "float32", threads: int = 2, **peers: float) -> dict[str, Any]:
    timings = {"mra": timing(ms), "matmul": timing(10.0), **{name: timing(value) for name, value in peers.items()}}
    return {
        "shape": "K = 4 a row",
        "length": length,
        "dtype": dtype,
        "threads": threads,
        "num_blocks": 4 * length // 32,
        "max_error": 1e-6,
        "exact_gflop": 0.4,
        "matmul_gflop": 2.0,
        "timings": timings,
        "left_out": {} if "flex" in peers else {"flex": "N above 9"},
    }


@pytest.fixture
def results() -> dict[str, Any]:
    machine = {
        "cpu": "Test CPU",
        "instruction_set": "avx2",
        "batch": 1,
        "heads": 12,
        "head_size": 64,
        "torch": "9",
        "commit": "abc",
    }
    rows = [
        row(1024, 4.0, threads=1, sdpa=40.0),
        row(1024, 2.0, sdpa=24.0, flex=8.0),
        row(1024, 2.3, dtype="bfloat16"),
        row(4096, 9.0, threads=1, sdpa=900.0),
        row(4096, 10.0, sdpa=500.0),
    ]
    return {"machine": machine, "results": rows}


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("| ")]


def test_tables_say_what_the_results_say(script, results) -> None:
    tables = script("tables")
    peers = cells(tables.peers_table(results))
    assert peers[0][-2:] == ["torch SDPA", "torch flex_attention, same blocks"]
    assert peers[3] == [
        "1024",
        "float32",
        "2",
        "2.00 (1.80-2.20)",
        "200",
        "100%",
        "24.0 (21.6-26.4), 12.0x",
        "8.00 (7.20-8.80), 4.0x",
    ]
    assert peers[4][-2:] == ["-", "-"]
    assert "is left out where: N above 9." in tables.peers_table(results)
    lengths = cells(tables.lengths_table(results))
    assert ["4096", "float32", "2", "2.44", "1.25 of N = 1024"] in lengths
    assert ["1024", "bfloat16", "2", "2.25", "1.00 of N = 1024"] in lengths
    dtypes = cells(tables.dtypes_table(results))
    assert [line[4] for line in dtypes if line[2] == "bfloat16"] == ["1.15"]
    threads = cells(tables.threads_table(results))
    assert ["1024", "float32", "2", "2.00 (1.80-2.20)", "2.00x", "12.0x"] in threads
    line = tables.line(results["results"][1])
    assert "200 GFLOP/s, 100% of a matrix product" in line
    assert "sdpa 24.0 (21.6-26.4) ms, 12.0x" in line
    assert all(table in tables.markdown(results) for table in ("us a token", "of float32", "scaling", "Test CPU, avx2"))


def test_a_page_gets_its_tables_from_the_results(script, results, tmp_path) -> None:
    tables = script("tables")
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "benchmarks" / "results" / "one.json").write_text(json.dumps(results))
    page = "before\n<!-- benchmarks/results/one.json peers -->\nold\n<!-- end -->\nafter\n"
    new = tables.updated(page, tmp_path)
    assert tables.peers_table(results) in new
    assert "old" not in new
    assert (new.startswith("before\n"), new.endswith("<!-- end -->\nafter\n")) == (True, True)
    assert tables.updated(new, tmp_path) == new


def test_load_tables_say_what_the_results_say(script) -> None:
    tables = script("tables")
    run = {"rate": 210.0, "sent": 620, "answered": 600, "errors": {}, "throughput": 200.4, "p50_ms": 9.6, "p95_ms": 40.2}
    good = {**run, "p99_ms": 62.4, "batches": {"1": 300, "2": 100}}
    slow = {**run, "rate": 1.0, "p99_ms": 180.0, "batches": {}}
    results = {
        "machine": {"cpu": "Test CPU", "cores": 2, "onnxruntime": "1.0", "commit": "abc"},
        "lengths": {"median": 30.0, "mean": 42.3, "longest": 371},
        "limit_ms": 100.0,
        "seconds": 6.0,
        "servers": {
            "serve": {"best": good, "runs": [good], "closed_loop": 290.1, "overload": {**good, "errors": {"busy": 20}}},
            "naive": {"best": {**good, "throughput": 100.2, "batches": {}}, "runs": [], "closed_loop": 150.0},
            "ray": {"closed_loop": 30.0, "best": None, "runs": [{**slow, "rate": 40.0}, slow]},
        },
        "times_the_naive_throughput": {"serve": 2.0, "naive": 1.0},
    }
    serve, naive, ray = cells(tables.load_table(results))[2:]
    assert serve == ["`mra-export serve`, text", "200", "10", "40", "62", "1.50", "2.00", "290"]
    assert naive[1:] == ["100", "10", "40", "62", "-", "1.00", "150"]
    assert ray[1] == "none met the limit: p99 180 ms at 1"
    assert "200 requests/s beside 100, 2.00 times as many (p99 62 and 62 ms; 290 and 150 with 16 callers" in tables.load_line(
        results
    )
    assert "600 were answered, 200/s, 20 refused as busy" in tables.overload_line(results)
    assert "Test CPU, 2 cores" in tables.markdown(results)
    soak = {"requests": 100000, "seconds": 700.2, "errors": {}, "growth": 0.0123, "leaked": {"threads": 0, "files": -16}}
    assert tables.markdown({"soak": soak}) == "100,000 requests in 700 s: no error, memory at most +1.23%, +0 threads, -16 files."


def test_the_docs_tables_are_those_of_the_results(script) -> None:
    tables = script("tables")
    for page in (ROOT / "docs").glob("*.md"):
        text = page.read_text()
        assert tables.updated(text) == text, f"python benchmarks/tables.py --update {page.relative_to(ROOT)}"


def test_the_tables_command(script, results, tmp_path) -> None:
    tables = script("tables")
    path = tmp_path / "r.json"
    path.write_text(json.dumps(results))
    shown = CliRunner().invoke(tables.main, [str(path), "--table", "dtypes"])
    assert shown.output.strip() == tables.dtypes_table(results)
    assert CliRunner().invoke(tables.main, []).exit_code == 2


def test_plots(script, results, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    plots = script("plots")
    paths = plots.draw(results, tmp_path / "images")
    assert [path.name for path in paths] == ["cpu-attention-length.svg", "cpu-attention-threads.svg"]
    first = [path.read_bytes() for path in paths]
    assert all(ElementTree.fromstring(content).tag.endswith("svg") for content in first)
    assert [path.read_bytes() for path in plots.draw(results, tmp_path / "again")] == first, "the same results give the same file"
    results["results"] = results["results"][:1]
    assert plots.draw(results, tmp_path) == [], "one point is no line"


def test_turns_time_every_call(script) -> None:
    measure = script("measure")
    order: list[str] = []
    timings = measure.take_turns([lambda: order.append("a"), lambda: order.append("b")], 0.0)
    assert order == ["a", "b"] * 4, "a warm round, then turn by turn"
    assert [t.calls for t in timings] == [3, 3]
    assert all(0 < t.fastest <= t.lower_quartile <= t.median <= t.upper_quartile for t in timings)
    order.clear()
    timings = measure.take_turns([lambda: order.append("a"), lambda: order.append("b")], 0.0, rest=0.001, turn=0.002)
    assert order.count("a") > timings[0].calls, "the first calls after a rest are not counted"
    assert re.search("a{3,}b{3,}", "".join(order))


def test_cpu_attention_checks_and_times_its_peers(tmp_path) -> None:
    arguments = ["--lengths", "64", "--lengths", "100", "--heads", "2", "--head-size", "16", "--threads", "1", "--seconds", "0.02"]
    arguments += ["--dtype", "float32", "--dtype", "bfloat16", "--peer", "sdpa", "--peer", "ort_mha", "--peer", "reference"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "cpu_attention.py"), *arguments, "--json", str(tmp_path / "r.json")],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "r.json").read_text())
    assert [(r["length"], r["dtype"]) for r in results["results"]] == [(n, t) for n in (64, 100) for t in ("float32", "bfloat16")]
    for r in results["results"]:
        peers = {"sdpa", "reference"} | ({"ort_mha"} if r["dtype"] == "float32" else set())
        assert set(r["timings"]) == {"mra", "matmul"} | peers
        assert set(r["left_out"]) == {"ort_mha"} - peers
        assert r["exact_gflop"] == min(r["num_blocks"], (-(-r["length"] // 32)) ** 2) * 1024 * 4 * 16 * 2 / 1e9
    assert "| torch SDPA |" in done.stdout


def test_a_published_checkpoints_attributes(script) -> None:
    shape = script("cpu_attention").preset_shape("base-4096-8-d3")
    attributes = shape.attributes(4096)
    assert (attributes.num_blocks, attributes.num_heads, shape.head_size) == (1024, 12, 64)
    assert (attributes.initial_prior_first_n_blocks, attributes.initial_prior_diagonal_n_blocks) == (3, 1)


def problem(script, length: int = 64) -> Any:
    import torch

    from mra_export.contract import Attributes

    torch.manual_seed(0)
    query, key, value = (torch.randn(1, length, 32) for _ in range(3))
    mask = torch.ones(1, length, dtype=torch.int32)
    attributes = Attributes(2, 2, 0.25)
    selection = script("cpu_attention").selected(query, key, mask, attributes)
    return script("cpu_peers").Problem(query, key, value, mask, attributes, selection, 1, 10.0)


def test_a_wrong_peer_is_left_out(script, monkeypatch) -> None:
    peers = script("cpu_peers")
    right = peers.PEERS["sdpa"]
    monkeypatch.setitem(peers.PEERS, "sdpa", lambda p: lambda: right(p)() + 1e-3)
    with pytest.raises(peers.LeftOutError, match=r"its error is 0.001, above 2e-05"):
        peers.open_peer("sdpa", problem(script))


def test_a_wrong_kernel_is_not_timed(script) -> None:
    import click

    attention = script("cpu_attention")
    p = problem(script)
    with pytest.raises(click.ClickException, match=r"N 64 float32: error .* not timed"):
        attention.check(p.value, p)


def test_a_compiler_gets_its_time_and_no_more(script, monkeypatch) -> None:
    import time

    import torch

    peers = script("cpu_peers")

    def slow(function, **options):
        def call(*arguments):
            time.sleep(30)

        return call

    monkeypatch.setattr(torch, "compile", slow)
    p = problem(script)
    p = peers.replace(p, compile_seconds=0.05)
    with pytest.raises(peers.LeftOutError, match=r"torch.compile took more than 0.05 s"):
        peers.open_peer("reference_compiled", p)


# Stages

CALLGRIND = """\
version: 1
events: Ir
ob=/somewhere/mra_attention_stages
fl=kernels.cc
fn=PackBlocks<float>(int)'Pack'Run
0 30
calls=1 0
0 999
fn=Convert'PackBlocks<float>(int)'Pack'Run
0 20
fn=memset'Choose'Select'Run
0 7
fn=strlen
0 1
"""
PERF = """\

            1000 mra::avx2::(anonymous namespace)::PackBlocks<float>
            2005 mra::(anonymous namespace)::Run


            9000 memset
          402005 Choose

            9000 __strlen_avx2
"""


def test_callgrinds_costs_are_read_with_their_callers(script) -> None:
    module = script("cpu_stages")
    costs = module.parse_callgrind(CALLGRIND.splitlines())
    assert costs == {
        ("PackBlocks<float>(int)", "Pack", "Run"): 30,
        ("Convert", "PackBlocks<float>(int)", "Pack", "Run"): 20,
        ("memset", "Choose", "Select", "Run"): 7,
        ("strlen",): 1,
    }
    found = module.stages(costs)
    assert [(s.phase, s.name, s.cost) for s in found] == [
        ("pack", "PackBlocks", 50),
        ("select", "Choose", 7),
        ("other", "strlen", 1),
    ]
    assert [s.share for s in found] == [50 / 58, 7 / 58, 1 / 58]


def test_perfs_samples_are_read_with_their_callers(script) -> None:
    module = script("cpu_stages")
    costs = module.parse_perf(PERF.splitlines())
    assert costs == {
        ("mra::avx2::(anonymous namespace)::PackBlocks<float>", "mra::(anonymous namespace)::Run"): 1,
        ("memset", "Choose"): 1,
        ("__strlen_avx2",): 1,
    }
    assert {(s.phase, s.name) for s in module.stages(costs)} == {
        ("pack", "PackBlocks"),
        ("select", "Choose"),
        ("other", "__strlen_avx2"),
    }


@pytest.mark.parametrize(
    ("function", "name"),
    [
        ("void mra::avx2::(anonymous namespace)::PackBlocks<float>(mra::Problem const&, long, long)", "PackBlocks"),
        ("mra::(anonymous namespace)::Run", "Run"),
        ("Choose(int) [clone .constprop.0]", "Choose"),
        ("mra::N_AVX3::LogitsOfBlocks<hwy::N_AVX3::Simd<float, 16ul, 0> >(float const*)", "LogitsOfBlocks"),
        ("memset", "memset"),
        ("??", "??"),
    ],
)
def test_names_of_functions(script, function, name) -> None:
    assert script("cpu_stages").short_name(function) == name


def test_a_cost_belongs_to_the_innermost_stage(script) -> None:
    stage_of = script("cpu_stages").stage_of
    assert stage_of(("Exp2", "SoftmaxOfBlocks<float>()", "LowResolution()", "Run")) == ("attend", "SoftmaxOfBlocks")
    assert stage_of(("Helper()", "Attend", "Run")) == ("other", "Helper")


def test_the_table_of_stages(script) -> None:
    from collections import Counter

    module = script("cpu_stages")
    found = module.stages(Counter({("Choose",): 6000, ("Helper",): 3996, ("strlen",): 3, ("getenv",): 1}))
    assert [(s.phase, s.name, s.share) for s in found] == [
        ("select", "Choose", 0.6),
        ("other", "Helper", 0.3996),
        ("other", "the rest", 0.0004),
    ]
    table = module.table(module.Profile("callgrind", "avx2", 10000, 20000, found))
    assert "| | Choose | 60.0% | 0.3000 |" in table
    assert "| **other** | | **40.0%** | **0.2000** |" in table
    assert "| **all** | | | **0.5000** |" in table
    assert "| | Choose | 60.0% | 1.2000 |" in module.table(module.Profile("perf", "avx2", 2.0, 20000, found))


def test_the_stages_are_those_that_the_kernel_marks(script) -> None:
    source = "".join(path.read_text() for path in (ROOT / "mra_export" / "plugins" / "cpu").glob("*-inl.h"))
    marked = set(re.findall(r"\bMRA_STAGE\b[^;{}()]*?\b(\w+)\(", source))
    assert marked == set(script("cpu_stages").STAGES)


@pytest.mark.slow
def test_callgrind_sees_the_kernels_stages(tmp_path) -> None:
    import platform
    import shutil

    missing = [program for program in ("cmake", "c++", "valgrind") if shutil.which(program) is None]
    if missing or platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip(f"needs {', '.join(missing) or 'an x86-64 machine'}")
    arguments = ["--length", "96", "--heads", "2", "--head-size", "32", "--blocks-per-row", "1", "--tool", "callgrind"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "cpu_stages.py"), *arguments, "--json", str(tmp_path / "s.json")],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (profile,) = json.loads((tmp_path / "s.json").read_text())["profiles"]
    assert profile["instruction_set"] == "avx2"
    assert profile["multiply_adds"] == 3 * 1024 * 2 * 32 * 2
    assert 0.1 < profile["total"] / profile["multiply_adds"] < 10, "8 to an instruction at best"
    shares = {stage["name"]: stage["share"] for stage in profile["stages"]}
    assert sum(shares.values()) == pytest.approx(1)
    assert "PackBlocks" in shares
    assert "| **pack** |" in done.stdout


# Load on servers


def test_load_goes_to_this_machine_only(script) -> None:
    pytest.importorskip("aiohttp")
    import click

    load = script("serve_load")
    target = load.parse_target("triton=v2=http://127.0.0.1:8001/v2/models/mra/")
    assert (target.name, target.protocol, target.url) == ("triton", "v2", "http://127.0.0.1:8001/v2/models/mra")
    with pytest.raises(click.BadParameter, match=r"load only ever goes to 127\.0\.0\.1"):
        load.parse_target("other=v2=http://192.0.2.1/v2/models/mra")
    for value in ("http://127.0.0.1", "a=grpc=http://127.0.0.1", "a=v2="):
        with pytest.raises(click.BadParameter, match="pass NAME=PROTOCOL=URL"):
            load.parse_target(value)


@pytest.mark.parametrize("first", [10.0, 100.0, 1000.0])
def test_the_highest_rate_is_found_from_above_and_below(script, first) -> None:
    pytest.importorskip("aiohttp")
    load = script("serve_load")

    def run(rate: float) -> Any:
        return load.Outcome(rate, 100, 100, {"busy": 1} if rate > 400 else {}, rate, 1.0, 2.0, 50.0 if rate < 200 else 150.0, 0.0)

    runs = load.highest_rate(run, 100, first, 6)
    assert 190 < load.best(runs, 100).rate < 200
    assert load.best([run(300), run(500)], 100) is None, "one is too slow, the other refuses requests"
    slow = load.highest_rate(run, 10, first, 6)
    assert load.best(slow, 10) is None
    assert len(slow) < 20, "a server that meets the limit at no rate is given up soon"
    assert slow[-1].rate == 1
    stalls = iter([True] + [False] * 100)

    def stalling(rate: float) -> Any:
        return run(10 * rate if next(stalls) else rate)

    assert 190 < load.best(load.highest_rate(stalling, 100, first, 6), 100).rate < 200, "a stall is not the server's"


def test_texts_to_ask_are_ragged_and_have_one_mask(script, tmp_path) -> None:
    pytest.importorskip("aiohttp")
    from exported import checkpoint

    asked = script("serve_load").questions(checkpoint(tmp_path), ROOT / "benchmarks", 50, 24.0, 0.8, 256, 0)
    lengths = [len(question.ids) for question in asked]
    assert len(asked) > 30
    assert min(lengths) >= 4
    assert max(lengths) <= 256
    assert len(set(lengths)) > 15
    assert all(question.text.count("<mask>") == 1 for question in asked)


def test_a_soak_fails_by_what_it_leaks(script) -> None:
    pytest.importorskip("aiohttp")
    leaks = script("serve_load").leaks
    flat = {"errors": {}, "growth": 0.019, "leaked": {"threads": 0, "files": -16, "shared_memory": 0}}
    assert leaks(flat) == []
    bad = {"errors": {"HTTP 500": 1}, "growth": 0.021, "leaked": {"threads": 2, "files": 0, "shared_memory": 0}}
    assert leaks(bad) == ["1 times HTTP 500", "memory grew by 2.1%", "2 more threads than before"]

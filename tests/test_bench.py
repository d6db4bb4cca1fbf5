"""The benchmarks: what they compute beside times. No time is asserted."""

import importlib
import importlib.util
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

import lanenorm
import lanenorm.bench

BENCH = ROOT / "bench"
pytestmark = pytest.mark.skipif(not BENCH.is_dir(), reason="no bench/ beside the tests")


@pytest.fixture(scope="module", autouse=True)
def _bench_modules():
    """bench/ is no package: its scripts import each other by plain names."""
    sys.path.insert(0, str(BENCH))
    yield
    sys.path.remove(str(BENCH))


def module(name):
    return importlib.import_module(name)


def script(name, *arguments):
    """Run bench/NAME; returns what it printed."""
    command = [sys.executable, str(BENCH / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# ---- Problems and the byte model ------------------------------------------------------------------------------------


def test_parse_problems_by_hand():
    text = """# comment
        tiny  layer_norm  2x3            # one more
        net   batch_norm  2x3x4x5  channels-last  float32,bfloat16
        flat  batch_norm  6x7  float64"""
    Problem = module("common").Problem  # noqa: N806
    assert module("common").parse_problems(text) == [
        Problem("tiny", "layer_norm", (2, 3), "channels-first", "float32"),
        Problem("net", "batch_norm", (2, 3, 4, 5), "channels-last", "float32"),
        Problem("net", "batch_norm", (2, 3, 4, 5), "channels-last", "bfloat16"),
        Problem("flat", "batch_norm", (6, 7), "channels-first", "float64"),
    ]


@pytest.mark.parametrize("line", ["a layer_norm", "a group_norm 2x3", "a layer_norm 2x3 float8", "a layer_norm 2xq"])
def test_parse_problems_refuses(line):
    with pytest.raises(ValueError, match=r"problems.txt, line 1|invalid literal"):
        module("common").parse_problems(line)


def test_problem_file_is_read():
    common = module("common")
    problems = common.parse_problems(common.PROBLEMS.read_text(encoding="utf-8"))
    assert len(problems) > 80
    assert len({(problem.family, problem.norm, problem.name) for problem in problems}) == len(problems)
    quick = module("compare").quick_problems(problems)
    assert {problem.family for problem in quick} == {problem.family for problem in problems}


def test_byte_model_by_hand():
    """6 elements of 2 bytes: read x, write y; backward reads dy and x, writes dx."""
    common = module("common")
    layer = common.Problem("f", "layer_norm", (2, 3), "channels-first", "float16")
    batch = common.Problem("f", "batch_norm", (2, 3), "channels-first", "float16")
    moved = {
        operation: common.Case(problem, operation, "fresh", 1).moved_bytes
        for problem in (layer, batch)
        for operation in problem.operations
    }
    assert moved == {
        "layer_norm_forward": 24,
        "layer_norm_backward": 36,
        "batch_norm": 24,
        "batch_norm_forward": 24,
        "batch_norm_backward": 36,
    }


def test_case_names_tell_cases_apart():
    common, compare = module("common"), module("compare")
    problems = common.parse_problems(common.PROBLEMS.read_text(encoding="utf-8"))
    names = [case.name for n in (1, 2) for case in compare.cases(problems, n, ("fresh", "out"), "")]
    assert len(set(names)) == len(names)
    assert "resnet-8/batch_norm/8x512x28x28/channels-last/float32/out/threads:2" in names


# ---- Statistics -----------------------------------------------------------------------------------------------------


def test_summary_by_hand():
    assert module("common").summarize([5, 1, 4, 2, 3]) == pytest.approx({"median": 3, "p10": 1.4, "p90": 4.6})
    assert module("common").summarize([7]) == {"median": 7, "p10": 7, "p90": 7}


def test_median_ratio_by_hand():
    """Round by round: 2, 3, 4. A peer that took part in two rounds counts with those."""
    assert module("common").median_ratio([2, 30, 4], [1, 10, 1]) == 3
    assert module("common").median_ratio([2, 40], [1, 10, 1]) == 3
    assert module("common").geometric_mean([1, 4, 2]) == pytest.approx(2)


def test_three_digits():
    common = module("common")
    texts = {1.234: "1.23 s", 0.01234: "12.3 ms", 1.5e-7: "150 ns", 9.996e-4: "1.00 ms", 9.994e-4: "999 µs"}
    assert {seconds: common.duration(seconds) for seconds in texts} == texts


# ---- Peers ----------------------------------------------------------------------------------------------------------


def small_problems():
    Problem = module("common").Problem  # noqa: N806
    for dtype in ("float32", "float64", "float16", "bfloat16"):
        if dtype == "bfloat16" and importlib.util.find_spec("ml_dtypes") is None:
            continue
        yield Problem("test", "layer_norm", (5, 33), "channels-first", dtype)
        yield Problem("test", "batch_norm", (7, 6), "channels-first", dtype)
        for layout in ("channels-first", "channels-last"):
            yield Problem("test", "batch_norm", (3, 4, 5, 6), layout, dtype)


@pytest.mark.parametrize("library", ["lanenorm", "numpy", "torch"])
def test_peers_are_right(library):
    """Every operation, layout and dtype; what a peer refuses is left out. jax and onnxruntime take
    seconds to load and are checked by compare.py whenever they are timed."""
    if library == "torch":
        pytest.importorskip("torch", reason="PyTorch is not installed")
    data, peers = module("data"), module("peers")
    peer, done = peers.PEERS[library](1), 0
    for problem in small_problems():
        inputs = data.make_inputs(problem)
        exact = data.exact(problem, inputs)
        for operation in problem.operations:
            for reuse in (False, True):
                try:
                    call = peer.call(operation, inputs, problem, reuse)
                    complaint = data.check(operation, problem.dtype, peer.arrays(call()), exact)
                except peers.UnsupportedError:
                    continue
                assert complaint is None, f"{problem.name} {operation}: {complaint}"
                done += 1
    assert done > 20


def test_wrong_results_are_noticed():
    """A biased variance taken for the unbiased one, the last element forgotten, a gradient of another sign."""
    data, problem = module("data"), next(small_problems())
    inputs = data.make_inputs(problem)
    exact = data.exact(problem, inputs)
    y, mean, rstd = lanenorm.layer_norm_forward(*inputs[:1], inputs.weight, inputs.bias)
    assert data.check("layer_norm_forward", "float32", (y, mean, rstd), exact) is None
    assert "rstd errs" in data.check("layer_norm_forward", "float32", (y, mean, rstd * np.sqrt(32 / 33)), exact)
    y[-1, -1] = 0
    assert "y errs" in data.check("layer_norm_forward", "float32", (y, mean, rstd), exact)
    dx, dweight, dbias = lanenorm.layer_norm_backward(inputs.dy, inputs.x, mean, rstd, inputs.weight)
    assert data.check("layer_norm_backward", "float32", (dx, dweight, dbias), exact) is None
    assert "dweight errs" in data.check("layer_norm_backward", "float32", (dx, -dweight, dbias), exact)
    assert "values" in data.check("layer_norm_backward", "float32", (dx, dweight, dbias[1:]), exact)


def test_check_allows_what_a_single_row_cannot_help():
    """One row: dweight is a single term, whose error is that of the normalized value however small the term is."""
    data = module("data")
    problem = module("common").Problem("test", "layer_norm", (1, 70000), "channels-first", "float32")
    inputs = data.make_inputs(problem)
    exact = data.exact(problem, inputs)
    _, mean, rstd = lanenorm.layer_norm_forward(inputs.x)
    gradients = lanenorm.layer_norm_backward(inputs.dy, inputs.x, mean, rstd, inputs.weight)
    assert data.check("layer_norm_backward", "float32", gradients, exact) is None


def test_a_dead_worker_says_what_it_wrote():
    """And it is an exception of its own, so that compare.py leaves out the peer and goes on."""
    worker = module("worker").Worker("numpy", 1)
    assert worker.details == {}
    with pytest.raises(module("worker").WorkerDiedError, match=r"ended with 1: (?s:.)*AttributeError"):
        worker.ask("nothing it knows")
    worker.close()


def test_exact_in_slabs_is_exact_in_one(monkeypatch):
    data = module("data")
    for problem in list(small_problems())[:4]:
        inputs = data.make_inputs(problem)
        whole = data.exact(problem, inputs)
        monkeypatch.setattr(data, "SLAB", 1)
        for name, parts in data.exact(problem, inputs).items():
            if name not in ("index", "y", "dx", "dx_scale", "frozen"):  # sampled at other positions
                np.testing.assert_allclose(parts, whole[name], rtol=1e-12, atol=1e-12, err_msg=name)
        monkeypatch.undo()


# ---- compare.py -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """One quick run of one tiny problem against NumPy: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("compare")
    options = ("--quick", "--peers", "numpy", "--filter", "tiny/layer_norm.*/1x768", "--output", folder)
    return folder, options, script("compare.py", *options)


def test_compare_writes_google_benchmark_json(compared):
    result = json.loads((compared[0] / "compare.json").read_text(encoding="utf-8"))
    assert {"date", "executable", "num_cpus", "library_build_type"} <= set(result["context"])
    assert result["context"]["versions"]["lanenorm"] == lanenorm.__version__
    assert str(compared[0]) not in json.dumps(result)  # no paths of the machine
    start = "tiny/layer_norm_{}/1x768/float32/fresh/threads:1/{}"
    expected = {start.format(way, who) for way in ("forward", "backward") for who in ("lanenorm", "numpy", "copy")}
    assert {entry["name"] for entry in result["benchmarks"]} == expected
    for entry in result["benchmarks"]:
        assert entry["run_type"] == "iteration"
        assert entry["time_unit"] == "us"
        assert 0 < entry["p10"] <= entry["real_time"] <= entry["p90"]
        if entry["library"] == "lanenorm":
            assert entry["copies"] > 0
            assert entry["ratio_to_numpy"] > 0


def test_compare_prints_table_and_summary(compared):
    folder, _, printed = compared
    assert re.search(r"^tiny/layer_norm_forward/1x768/float32/fresh/threads:1 +[\d.]+ (ns|µs|ms)", printed, re.M)
    assert re.search(r"^tiny +2 +[\d.]+ +[\d.]+ / [\d.]+$", printed, re.M)
    assert "slower than 0.97" in printed
    assert (folder / "compare.txt").read_text(encoding="utf-8").strip() in printed


def test_compare_draws(compared):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    assert (compared[0] / "compare-tiny.png").read_bytes().startswith(b"\x89PNG")


def test_compare_resumes(compared, tmp_path):
    """The line that is there is kept as it is; one cut short is measured again."""
    folder, options, _ = compared
    lines = (folder / "compare.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 3
    kept = json.loads(lines[1]) | {"copies": 1234.5}
    (tmp_path / "compare.jsonl").write_text("\n".join([lines[0], json.dumps(kept), lines[2][:50]]))
    printed = script("compare.py", *options[:-1], tmp_path, "--resume")
    assert "1234.50" in printed
    after = [json.loads(line) for line in (tmp_path / "compare.jsonl").read_text(encoding="utf-8").splitlines()[1:]]
    assert [row["name"] for row in after] == [json.loads(line)["name"] for line in lines[1:]]
    assert after[0]["copies"] == 1234.5
    assert after[1]["copies"] != 1234.5


def test_resume_refuses_another_machine(tmp_path):
    compare = module("compare")
    now = {"cpu_model": "this", "versions": {}, "settings": {}, "isa": "avx2"}
    log = tmp_path / "compare.jsonl"
    log.write_text(json.dumps({"context": now | {"cpu_model": "that"}}) + "\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="cpu_model differ"):
        compare.resumed(log, now)
    assert compare.resumed(tmp_path / "none", now) == []


# ---- The tables of README -------------------------------------------------------------------------------------------


def test_tables_fill_markers_and_check(compared, tmp_path, capsys):
    tables = module("tables")
    readme = tmp_path / "README.md"
    readme.write_text("a\n" + "".join(f"<!-- {name}:begin -->\nold\n<!-- {name}:end -->\n" for name in tables.PARTS))
    result = json.loads((compared[0] / "compare.json").read_text(encoding="utf-8"))
    for row in result["rows"]:
        row |= {"shape": "128x768", "copies": 1.25, "ratios": {"torch": 2.5}}
    (tmp_path / "compare.json").write_text(json.dumps(result), encoding="utf-8")
    entries = [
        {"library": "lanenorm", "length": 64, "offset": offset, "error_in_u": error}
        for offset, error in ((0.0, 1.94), (1e3, 1.1), (1e6, 880123.0))
    ]
    accuracy = {"context": result["context"], "benchmarks": entries}
    (tmp_path / "accuracy.json").write_text(json.dumps(accuracy), encoding="utf-8")
    options = ["--readme", str(readme), "--results", str(tmp_path)]
    assert tables.main([*options, "--check"]) == 1
    assert tables.main(options) == 0
    assert tables.main([*options, "--check"]) == 0
    capsys.readouterr()
    text = readme.read_text(encoding="utf-8")
    assert "| layer_norm 128×768 | 1.25 | 1.25 | 2.50 | 2.50 |" in text
    assert "| 64 | 1.9 | 1.1 | 880000 |" in text
    assert "compare.png" in text
    assert "old" not in text


def test_accuracy_measures_the_error():
    """Against values that are off by one u times 3, and by 5u where the value is below 1."""
    accuracy = module("accuracy")
    x = np.array([[1, -1, 1, -1]], np.float32) * 2
    exact = np.float64(x / 2) / np.sqrt(1 + 1e-5 / 4)
    assert accuracy.worst_error(x, exact) < 1e-6
    assert accuracy.worst_error(x, exact + 5 * accuracy.U) == pytest.approx(5, rel=1e-6)


# ---- python -m lanenorm bench ---------------------------------------------------------------------------------------


def test_bench_finds_the_repository(tmp_path):
    assert lanenorm.bench.find_compare(ROOT / "tests") == BENCH / "compare.py"
    assert lanenorm.bench.find_compare(tmp_path) is None


def test_bench_prints_its_table_outside_the_repository(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lanenorm.bench, "SHAPES", (("layer_norm", (4, 8)), ("batch_norm", (4, 3, 2, 2))))
    monkeypatch.setattr(lanenorm.bench, "SECONDS", 1e-4)
    assert lanenorm.bench.main([]) == 0
    printed = capsys.readouterr().out
    for norm, shape in (("layer_norm", "4x8"), ("batch_norm", "4x3x2x2")):
        for direction in ("forward", "backward"):
            assert re.search(rf"^{norm}_{direction} +{shape} +[\d.]+ (ns|µs|ms) +[\d.]+ +[\d.]+x", printed, re.M)


def test_bench_is_a_command(run_python, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "compare.py" in run_python("-m lanenorm bench --help").stdout

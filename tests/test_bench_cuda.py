"""The GPU half of bench/: what it computes and writes, with a clock that needs no GPU."""

import importlib
import json
import re
import subprocess
import sys
import types

import numpy as np
import pytest
from conftest import ROOT

import lanenorm

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


class Clock:
    """Every peer takes its seconds for a call in a graph, and a microsecond more for one from Python."""

    cache_bytes = 1000
    details = {"gpu": "none", "architecture": "sm_0", "multiprocessors": 0, "driver": "CUDA 0"}  # noqa: RUF012

    def to_device(self, inputs):
        return inputs._replace(x=inputs.x.copy())

    def kernels(self, peer, replay):
        return peer.seconds * replay()

    def latency(self, call, count):
        call()
        return (call.__self__.seconds + 1e-6) * count


class Peer:
    """lanenorm's CPU kernels as a library on a GPU; `wrong` spoils the statistics."""

    def __init__(self, seconds, wrong=1.0):
        self.seconds, self.wrong = seconds, wrong
        self.done = []  # x of every call, in order

    def call(self, operation, inputs):
        if inputs.x.dtype == np.float64:
            raise module("peers").UnsupportedError("no float64 here")
        return Bound(self, operation, inputs).run

    def arrays(self, result):
        return tuple(result)

    def record(self, run):
        """What replays a recording says how many calls are in it."""
        before = len(self.done)
        run()
        recorded = len(self.done) - before
        return lambda: recorded


class Bound:
    """A call of a peer."""

    def __init__(self, peer, operation, inputs):
        self.peer, self.operation, self.inputs, self.seconds = peer, operation, inputs, peer.seconds

    def run(self):
        x, dy, weight, bias, running_mean, running_var = self.inputs
        self.peer.done.append(x)
        if self.operation == "batch_norm":
            return (lanenorm.batch_norm(x, running_mean, running_var, weight * self.peer.wrong, bias),)
        norm = self.operation.rpartition("_")[0]
        y, mean, rstd = getattr(lanenorm, f"{norm}_forward")(x, weight, bias)
        if self.operation.endswith("forward"):
            return y, mean, rstd * self.peer.wrong
        return getattr(lanenorm, f"{norm}_backward")(dy, x, mean, rstd * self.peer.wrong, weight)


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Three layer norms and a batch norm through four stand-ins: the folder, the JSON, the text, and the peers."""
    common, compare_cuda = module("common"), module("compare_cuda")
    layer = [common.Problem("few", "layer_norm", (5, 33), "channels-first", d) for d in ("float32", "float16")]
    wide = common.Problem("wide", "layer_norm", (2, 700), "channels-first", "float32")
    batch = common.Problem("flat", "batch_norm", (5, 33), "channels-first", "float32")
    peers = {"lanenorm": Peer(2e-6), "copy": Peer(1e-6), "torch": Peer(6e-6), "liger": Peer(1e-6, wrong=1.5)}
    settings = compare_cuda.Settings(rounds=3, seconds=120e-6, most=100)
    folder = tmp_path_factory.mktemp("compare")
    todo = compare_cuda.cases([*layer, wide, batch], cold_bytes=0)
    text = compare_cuda.compare(todo, (), settings, folder, ["--device", "cuda"], Clock(), peers)
    return folder, json.loads((folder / "compare-cuda.json").read_text(encoding="utf-8")), text, peers


def rows_of(compared):
    return {row["name"]: row for row in compared[1]["rows"]}


def test_cases_are_all_operations_cold_and_warm(compared):
    layer = ("layer_norm_forward", "layer_norm_backward")
    batch = ("batch_norm", "batch_norm_forward", "batch_norm_backward")
    problems = [(f"few/{{}}/5x33/{dtype}", layer) for dtype in ("float32", "float16")]
    problems += [("wide/{}/2x700/float32", layer), ("flat/{}/5x33/float32", batch)]
    names = [f"{p.format(way)}/{state}" for p, ways in problems for way in ways for state in ("cold", "warm")]
    assert list(rows_of(compared)) == names
    first, *lines = (compared[0] / "compare-cuda.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["name"] for line in lines] == names
    assert json.loads(first)["context"]["gpu"] == Clock.details


def test_ratios_by_hand(compared):
    """lanenorm 2 µs a call in a graph and 3 from Python, the peer 6 and 7, a copy 1: half its bandwidth forward."""
    rows = rows_of(compared)
    forward, backward = (rows[f"few/layer_norm_{way}/5x33/float32/warm"] for way in ("forward", "backward"))
    assert forward["ratios"]["kernels"] == pytest.approx({"torch": 3})
    assert forward["ratios"]["latency"] == pytest.approx({"torch": 7 / 3})
    assert forward["copies"] == pytest.approx(2)
    assert forward["bandwidth"] == pytest.approx(0.5)
    assert backward["bandwidth"] == pytest.approx(0.75)
    assert forward["streaming"] == pytest.approx(0.75)
    assert backward["streaming"] == pytest.approx(1.25)
    assert rows["flat/batch_norm/5x33/float32/warm"]["streaming"] == pytest.approx(0.5)
    assert forward["libraries"]["lanenorm"]["kernels"] == pytest.approx({"median": 2e-6, "p10": 2e-6, "p90": 2e-6})
    assert forward["libraries"]["lanenorm"]["latency"]["median"] == pytest.approx(3e-6)


def test_cold_goes_round_more_than_the_cache(compared):
    """5x33 float32 forward moves 1320 bytes a call: three sets are more than three caches of 1000, of 2x700 one is."""
    *_, peers = compared
    common, compare_cuda = module("common"), module("compare_cuda")
    data = module("data")
    for shape, state, sets in (((5, 33), "cold", 3), ((5, 33), "warm", 1), ((2, 700), "cold", 1)):
        problem = common.Problem("few", "layer_norm", shape, "channels-first", "float32")
        case = compare_cuda.Case(problem, "layer_norm_forward", state)
        inputs = data.make_inputs(problem)
        fresh = {"lanenorm": Peer(2e-6), "copy": Peer(1e-6)}
        compare_cuda.measure(case, fresh, Clock(), inputs, data.exact(problem, inputs), compare_cuda.QUICK)
        seen = {x.ctypes.data for x in fresh["lanenorm"].done}
        assert len(seen) == sets, (shape, state)
    assert peers["torch"].done


def test_small_arrays_are_not_timed_cold():
    common, compare_cuda = module("common"), module("compare_cuda")
    problems = [common.Problem("f", "layer_norm", (n, 1024), "channels-first", "float32") for n in (255, 256)]
    states = [(case.problem.shape[0], case.state) for case in compare_cuda.cases(problems)]
    assert states == [(255, "warm")] * 2 + [(256, "cold"), (256, "warm")] * 2


def test_wrong_and_unsupported_are_left_out(compared):
    for row in compared[1]["rows"]:
        assert set(row["libraries"]) == {"lanenorm", "copy", "torch"}
        assert row["left_out"]["liger"].startswith("WRONG RESULT: ")
    assert re.search(r"^left out:\n  liger: WRONG RESULT", compared[2], re.M)
    common, compare_cuda, data = module("common"), module("compare_cuda"), module("data")
    problem = common.Problem("few", "layer_norm", (5, 33), "channels-first", "float64")
    case = compare_cuda.Case(problem, "layer_norm_forward", "warm")
    inputs = data.make_inputs(problem)
    with pytest.raises(SystemExit, match="no float64 here"):
        compare_cuda.measure(
            case, {"lanenorm": Peer(1)}, Clock(), inputs, data.exact(problem, inputs), compare_cuda.QUICK
        )


def test_json_is_google_benchmarks(compared):
    entries = {entry["name"]: entry for entry in compared[1]["benchmarks"]}
    assert len(entries) == 3 * len(compared[1]["rows"])
    ours = entries["few/layer_norm_forward/5x33/float32/warm/lanenorm"]
    assert ours["run_type"] == "iteration"
    assert ours["time_unit"] == "us"
    assert (ours["real_time"], ours["latency"]) == pytest.approx((2, 3))
    assert ours["bytes_per_second"] == pytest.approx(5 * 33 * 4 * 2 / 2e-6)
    assert ours["kernels_ratio_to_torch"] == pytest.approx(3)
    copied = entries["few/layer_norm_backward/5x33/float32/warm/copy"]
    assert copied["bytes_per_second"] == pytest.approx(5 * 33 * 4 * 2 / 1e-6)


def test_text_has_table_and_summary(compared):
    folder, _, text, _ = compared
    row = r"few/layer_norm_forward/5x33/float32/warm +2.00 µs +2.00 µs +2.00 µs +1 +50 % +75 % +3.00 µs +3.00 2.33"
    assert re.search(f"^{row}$", text, re.M), text
    assert re.search(r"^few +8 +50 % +3.00 / 3.00$", text, re.M), text
    assert "slower than 0.97: nowhere" in text
    assert (folder / "compare-cuda.txt").read_text(encoding="utf-8").strip() == text


def formulas_are_right(peer):
    """Both norms, all operations, against float64."""
    common, data = module("common"), module("data")
    for norm, shape, layout in (
        ("layer_norm", (5, 33), "channels-first"),
        ("batch_norm", (5, 33), "channels-first"),
        ("batch_norm", (5, 6, 7, 3), "channels-first"),
        ("batch_norm", (5, 6, 7, 3), "channels-last"),
    ):
        problem = common.Problem("few", norm, shape, layout, "float32")
        inputs = data.make_inputs(problem)
        for operation in problem.operations:
            result = peer.arrays(peer.call(operation, inputs)())
            complaint = data.check(operation, problem.dtype, result, data.exact(problem, inputs))
            assert complaint is None, f"{operation} {shape} {layout}: {complaint}"


@pytest.mark.parametrize("name", ["Lanenorm", "Composed", "Fused"])
def test_cupy_peers_are_right(monkeypatch, name):
    """With NumPy in CuPy's place."""
    peers_cuda = module("peers_cuda")
    numpy = types.SimpleNamespace(sqrt=np.sqrt, fuse=lambda kernel_name: lambda function: function)
    monkeypatch.setattr(peers_cuda.CuPyPeer, "__init__", lambda self: setattr(self, "cupy", numpy))
    monkeypatch.setattr(peers_cuda.CuPyPeer, "arrays", lambda self, result: tuple(result))
    formulas_are_right(getattr(peers_cuda, name)())


def test_torch_peer_is_right(monkeypatch):
    """With tensors on the CPU."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    peers_cuda = module("peers_cuda")
    monkeypatch.setattr(peers_cuda.TorchPeer, "__init__", lambda self: setattr(self, "torch", torch))
    monkeypatch.setattr(peers_cuda.TorchPeer, "tensor", lambda self, array: torch.from_numpy(array))
    formulas_are_right(peers_cuda.Torch())


TRITON = """
import sys, types
sys.path.insert(0, sys.argv[1])
import torch, common, data, triton_layer_norm
torch.cuda.get_device_properties = lambda device: types.SimpleNamespace(multi_processor_count=3)
problem = common.Problem("few", "layer_norm", (7, 33), "channels-first", "float32")
inputs = data.make_inputs(problem)
exact = data.exact(problem, inputs)
x, dy, weight, bias = map(torch.from_numpy, inputs[:4])
forward = triton_layer_norm.forward(x, weight, bias, data.EPS)
backward = triton_layer_norm.backward(dy, x, *forward[1:], weight)
for way, result in (("forward", forward), ("backward", backward)):
    print(data.check(f"layer_norm_{way}", "float32", [part.numpy() for part in result], exact))
"""


def test_triton_peer_is_right(run_python):
    """In Triton's interpreter."""
    pytest.importorskip("torch", reason="PyTorch is not installed")
    pytest.importorskip("triton", reason="Triton is not installed")
    assert run_python(TRITON, str(BENCH), TRITON_INTERPRET="1").stdout == "None\nNone\n"


def compare_py(*arguments):
    command = [sys.executable, str(BENCH / "compare.py"), "--device", "cuda", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_command_line_lists():
    done = compare_py("--list", "--quick", "--filter", "bert/.*forward")
    assert done.returncode == 0, done.stderr
    start = "bert/layer_norm_forward/4096x768/float32"
    assert done.stdout.split() == [f"{start}/cold", f"{start}/warm"]


def test_command_line_without_a_gpu(tmp_path):
    """Says why, and writes nothing."""
    if lanenorm.cuda_available():
        pytest.skip("there is a GPU")
    done = compare_py("--output", str(tmp_path / "new"))
    assert done.returncode == 1
    assert "--device cuda: " in done.stderr
    assert "CUDA" in done.stderr
    assert not (tmp_path / "new").exists()
    assert compare_py("--filter", "no such row").returncode == 1


def test_peers_are_those_that_are_installed(monkeypatch):
    """None is imported for that."""
    peers_cuda = module("peers_cuda")
    monkeypatch.setattr(peers_cuda.importlib.util, "find_spec", lambda name: name in ("cupy", "torch"))
    assert peers_cuda.installed() == ["lanenorm", "copy", "torch", "torch.cudnn", "cupy", "cupy.fuse"]

"""Read what the compiler made of the CUDA kernels: no spills, no stack frames, no atomics, 16-byte accesses.

    python tests/check_cuda_resources.py build/liblanenorm_cuda.a                 # what CMake has built
    python tests/check_cuda_resources.py --compile 90 [cuda/row_norm_float32.cu ...]   # units, for one architecture

Needs no GPU, but cuobjdump: of the CUDA toolkit, or of the `triton` package (pip install triton). Prints registers by
kernel; exit code 1 where a kernel breaks the rules.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
# -fmad=false as in CMakeLists.txt: contraction would change what is compiled.
FLAGS = ("-std=c++17", "-O3", "-fmad=false", f"-I{ROOT}", f"-I{ROOT / 'cpp'}")
# Kernels that touch every element: 16 bytes at a time. Those of statistics and of strange layouts do not.
HOT = ("row_forward", "row_moments", "row_apply", "row_backward", "row_sums", "column_forward", "column_moments")
HOT += ("column_apply", "column_backward", "column_sums", "column_gradient", "column_channels", "column_pointwise")
HOT += ("plane_",)
# What writes nothing but a few numbers a block.
READS_ONLY = ("row_moments", "row_sums", "column_moments", "column_sums", "plane_moments", "plane_sums")


class Usage(NamedTuple):
    """What the compiler says of one kernel."""

    registers: int
    stack: int  # bytes; spilled registers are in it
    local: int


def parse_usage(text):
    """Usage by mangled name, from `cuobjdump -res-usage`."""
    pattern = r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)"
    return {match[1]: Usage(*map(int, match.groups()[1:])) for match in re.finditer(pattern, text)}


def parse_disassembly(text):
    """Set of instructions, with their modifiers, by mangled name, from `cuobjdump -sass`."""
    functions = {}
    for block in re.split(r"Function : ", text)[1:]:
        name, _, body = block.partition("\n")
        functions[name.strip()] = set(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", body))
    return functions


def short(name):
    """row_forward_group<float, 32, 8> from a mangled name, if c++filt is there."""
    tool = shutil.which("c++filt") or shutil.which("cu++filt")
    if tool is None:
        return name
    text = subprocess.run([tool, name], capture_output=True, text=True, check=True).stdout
    return re.sub(r"\(.*|void |lanenorm::|gpu::|cuda::", "", text.strip())


def kernel(name):
    """row_forward_group from a mangled name."""
    match = re.search(r"\d+((?:row|column|plane|channel|fold|copy|fill)_[a-z_]+)I?", name)
    return match[1] if match else name


def faults(name, usage, instructions):
    """What breaks the rules."""
    found = []
    if usage.stack:
        found.append(f"has a stack frame of {usage.stack} bytes")
    if usage.local or any(i.startswith(("LDL", "STL")) for i in instructions):
        found.append("uses local memory")
    if any(i.startswith(("ATOM", "RED.", "REDG")) for i in instructions):
        found.append("uses atomics")
    if kernel(name).startswith(HOT):
        reads = {i for i in instructions if i.startswith(("LDG", "LDGSTS"))}
        if not any("128" in i for i in reads):
            found.append("reads no 16 bytes at a time")
        writes = {i for i in instructions if i.startswith("STG")}
        if not kernel(name).startswith(READS_ONLY) and not any("128" in i for i in writes):
            found.append("writes no 16 bytes at a time")
    return found


def cuobjdump(*arguments):
    """What the program prints."""
    tool = shutil.which("cuobjdump")
    spec = find_spec("triton")
    if tool is None and spec is not None:
        tool = str(Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump")
    if tool is None:
        raise SystemExit("there is no cuobjdump: install the CUDA toolkit's, or pip install triton")
    environment = os.environ | {"PATH": f"{Path(tool).parent}{os.pathsep}{os.environ['PATH']}"}  # for nvdisasm
    command = [tool, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout


def architectures(library):
    """Those there is code for: "75", "90", ..."""
    return sorted(set(re.findall(r"^arch = sm_(\w+)", cuobjdump("-res-usage", library), re.MULTILINE)))


def read(library, architecture):
    """Prints a line for every kernel; how many break the rules."""
    only = ("-arch", f"sm_{architecture}")
    usages = parse_usage(cuobjdump(*only, "-res-usage", library))
    instructions = parse_disassembly(cuobjdump(*only, "-sass", library))
    if not usages:
        raise SystemExit(f"{library}: no kernel for {architecture}")
    wrong = 0
    for name, usage in sorted(usages.items()):
        found = faults(name, usage, instructions[name])
        wrong += bool(found)
        verdict = "; ".join(found) or "ok"
        print(f"sm_{architecture:<4} {short(name):<60} {usage.registers:>4} registers  {verdict}", flush=True)
    return wrong


def compile_unit(unit, architecture, folder):
    """The object file."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise SystemExit("there is no nvcc on the path")
    output = Path(folder) / f"{Path(unit).stem}.o"
    code = f"arch=compute_{architecture},code=sm_{architecture}"
    command = [nvcc, *FLAGS, "-gencode", code, "-c", str(ROOT / unit), "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return output


def main():
    """Exit code 0 where every kernel keeps the rules."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="libraries or objects; with --compile: sources, all by default")
    parser.add_argument("--compile", type=int, metavar="ARCHITECTURE", help="for example 90")
    parser.add_argument("--architectures", nargs="+", metavar="90", help="all that there is code for by default")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    files = arguments.files
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(arguments.jobs) as pool:
        if arguments.compile is not None:
            units = files or sorted(str(p.relative_to(ROOT)) for p in (ROOT / "cuda").glob("*_norm_*.cu"))
            files = list(pool.map(lambda unit: compile_unit(unit, arguments.compile, folder), units))
        if not files:
            parser.error("neither a library nor --compile")
        pairs = [(file, name) for file in files for name in arguments.architectures or architectures(file)]
        wrong = sum(pool.map(read, *zip(*pairs, strict=True)))
    print(f"{wrong} kernels break the rules" if wrong else "every kernel keeps the rules")
    return wrong != 0


if __name__ == "__main__":
    sys.exit(main())

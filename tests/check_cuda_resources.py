"""Compile the CUDA kernels and read what the compiler made of them: no spills, no stack frames, 16-byte accesses.

    python tests/check_cuda_resources.py [--architectures 75 80 90 100 120] [--units cuda/row_norm_float32.cu ...]

Needs nvcc. The disassembly is read where cuobjdump is on the path or in the `triton` package (pip install triton); it
needs no GPU. Prints registers by kernel; exit code 1 where a kernel breaks the rules.
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
FLAGS = ("-std=c++17", "-O3", "-fmad=false", "-Xptxas", "-v", f"-I{ROOT}", f"-I{ROOT / 'cpp'}")
ARCHITECTURES = (75, 80, 90, 100, 120)
# Kernels that touch every element: 16 bytes at a time. Those of statistics and of strange layouts do not.
HOT = ("row_forward", "row_moments", "row_apply", "row_backward", "row_sums", "column_forward", "column_moments")
HOT += ("column_apply", "column_backward", "column_sums", "column_gradient", "column_channels", "column_pointwise")
HOT += ("plane_",)
# What writes nothing but a few numbers a block.
READS_ONLY = ("row_moments", "row_sums", "column_moments", "column_sums", "plane_moments", "plane_sums")


class Usage(NamedTuple):
    """What ptxas says of one kernel."""

    stack: int
    spills: int
    registers: int


def parse_usage(text):
    """Usage by mangled name, from `ptxas -v`."""
    pattern = (
        r"Compiling entry function '(\w+)' for '\w+'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers"
    )
    return {
        match[1]: Usage(int(match[2]), int(match[3]) + int(match[4]), int(match[5]))
        for match in re.finditer(pattern, text, re.DOTALL)
    }


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
    match = re.search(r"\d+((?:row|column|plane|fold|copy|fill)_[a-z_]+)I?", name)
    return match[1] if match else name


def faults(name, usage, instructions):
    """What breaks the rules; instructions may be None."""
    found = []
    if usage.spills:
        found.append(f"spills {usage.spills} bytes")
    if usage.stack:
        found.append(f"has a stack frame of {usage.stack} bytes")
    if instructions is None:
        return found
    if any(i.startswith(("LDL", "STL")) for i in instructions):
        found.append("uses local memory")
    if any(i.startswith(("ATOM", "RED.")) for i in instructions):
        found.append("uses atomics")
    if kernel(name).startswith(HOT):
        reads = {i for i in instructions if i.startswith(("LDG", "LDGSTS"))}
        if not any("128" in i for i in reads):
            found.append("reads no 16 bytes at a time")
        writes = {i for i in instructions if i.startswith("STG")}
        if not kernel(name).startswith(READS_ONLY) and not any("128" in i for i in writes):
            found.append("writes no 16 bytes at a time")
    return found


def cuobjdump():
    """The program, or None."""
    found = shutil.which("cuobjdump")
    spec = find_spec("triton")
    if found is None and spec is not None:
        path = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump"
        found = str(path) if path.exists() else None
    return found


def compile_unit(nvcc, unit, architecture, folder):
    """(unit, architecture, usage by kernel, instructions by kernel or None)."""
    output = Path(folder) / f"{Path(unit).stem}.{architecture}.o"
    code = f"arch=compute_{architecture},code=sm_{architecture}"
    command = [nvcc, *FLAGS, "-gencode", code, "-c", str(ROOT / unit), "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    instructions = None
    tool = cuobjdump()
    if tool is not None:
        environment = os.environ | {"PATH": f"{Path(tool).parent}{os.pathsep}{os.environ['PATH']}"}  # for nvdisasm
        text = subprocess.run(
            [tool, "-sass", str(output)], capture_output=True, text=True, check=True, env=environment
        ).stdout
        instructions = parse_disassembly(text)
    return unit, architecture, parse_usage(done.stderr + done.stdout), instructions


def main():
    """Exit code 0 where every kernel keeps the rules."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", type=int, nargs="+", default=ARCHITECTURES)
    default = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "cuda").glob("*_norm_*.cu"))
    parser.add_argument("--units", nargs="+", default=default)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise SystemExit("there is no nvcc on the path")
    if cuobjdump() is None:
        print("no cuobjdump (CUDA toolkit, or pip install triton): the disassembly is not read")
    wrong = 0
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(arguments.jobs) as pool:
        tasks = [
            pool.submit(compile_unit, nvcc, unit, architecture, folder)
            for architecture in arguments.architectures
            for unit in arguments.units
        ]
        for task in tasks:
            unit, architecture, usages, instructions = task.result()
            if not usages:
                raise SystemExit(f"{unit}: ptxas reported no kernel")
            for name, usage in sorted(usages.items()):
                found = faults(name, usage, None if instructions is None else instructions[name])
                wrong += bool(found)
                verdict = "; ".join(found) or "ok"
                print(f"sm_{architecture:<4} {short(name):<60} {usage.registers:>4} registers  {verdict}", flush=True)
    print(f"{wrong} kernels break the rules" if wrong else "every kernel keeps the rules")
    return wrong != 0


if __name__ == "__main__":
    sys.exit(main())

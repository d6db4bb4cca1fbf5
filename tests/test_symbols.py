"""No symbol compiled with the flags of one instruction set may be merged with code for all processors.

An inline function that is compiled in several translation units leaves a weak symbol in each, and the linker keeps any
one of them: an AVX-512 copy for everybody, who then crashes without AVX-512. So every weak symbol of an ISA's object
must lie in the inline namespace of that ISA. At -O2 most of them are inlined and vanish by luck; these objects are
compiled at -O0.
"""

import json
import re
import shlex
import subprocess

import pytest
from conftest import ROOT, tool

ISA_SOURCES = sorted((ROOT / "cpp" / "cpu").glob("isa_*.cpp"))
# Not code, the same in every unit: a pointer to the C++ runtime's handler of exceptions.
DATA_OF_THE_COMPILER = "DW.ref.__gxx_personality_v0"
# A function that any translation unit may have too, and that -O0 keeps.
SEEDED_FAULT = "#include <algorithm>\nint seeded(int a, int b) { return std::max(a, b); }\n"


def weak_symbols_outside(path, isa):
    """Weak symbols of an object file that another translation unit might define too, and all there are."""
    listing = subprocess.run([tool("nm"), "--demangle", str(path)], capture_output=True, text=True, check=True).stdout
    names = re.findall(r"^[0-9a-f]+ [VWu] (.*)$", listing, re.M)
    inside = (f"lanenorm::{isa}::", f"8lanenorm{len(isa)}{isa}")  # some names of lambdas are beyond nm
    return [n for n in names if not any(part in n for part in inside) and n != DATA_OF_THE_COMPILER], names


def commands(build):
    """Compile command of every ISA source that is for this processor, as CMake has it, by instruction set."""
    entries = json.loads((build / "compile_commands.json").read_text())
    of_file = {entry["file"]: shlex.split(entry["command"]) for entry in entries}
    return {p.stem.removeprefix("isa_"): of_file[str(p)] for p in ISA_SOURCES if str(p) in of_file}


def test_symbols_are_of_unoptimized_objects(cpp_build):
    found = commands(cpp_build)
    assert "portable" in found
    for command in found.values():
        assert [a for a in command if re.match(r"-O", a)] == ["-O0"]


@pytest.mark.parametrize("source", ISA_SOURCES, ids=lambda path: path.stem)
def test_symbols_of_an_isa_lie_in_its_namespace(cpp_build, source):
    isa = source.stem.removeprefix("isa_")
    if isa not in commands(cpp_build):
        pytest.skip(f"{source.name} is not for this processor")
    (path,) = cpp_build.glob(f"CMakeFiles/lanenorm_cpu.dir/cpp/cpu/{source.name}.o")
    wrong, names = weak_symbols_outside(path, isa)
    assert any(f"lanenorm::{isa}::" in name for name in names), "no symbol of the kernels: not compiled as intended"
    assert not wrong


def test_symbols_check_finds_a_seeded_fault(cpp_build, tmp_path):
    """It has teeth: std::max in a source compiled with the same flags is found."""
    isa, command = next(iter(commands(cpp_build).items()))
    source, target = tmp_path / "seeded.cpp", tmp_path / "seeded.o"
    source.write_text(SEEDED_FAULT)
    command[command.index("-o") + 1], command[command.index("-c") + 1] = str(target), str(source)
    subprocess.run(command, check=True, capture_output=True, cwd=cpp_build)
    wrong, _ = weak_symbols_outside(target, isa)
    assert any("std::max" in name for name in wrong)

"""Builds what runs CUDA kernels on the CPU, with g++ alone: the Python module of this package, and test programs.

Objects and what is linked from them are kept in a cache, under a name that hashes everything that went into them. So
importing the package a second time costs reading the sources, and a change of one kernel rebuilds that kernel.
"""

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
HERE = Path(__file__).parent
EMULATOR = ("emulator.cpp", "memory.cpp", "rendezvous.cpp")
# -O1: the kernels compile in a third of the time of -O2 and run nearly as fast. The rest as in CMakeLists.txt, so that
# every rounding happens where the source writes it.
FLAGS = (
    "-std=c++17",
    "-O1",
    "-fPIC",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
)
DEFINITIONS = ("-DLANENORM_ON_HOST",)
PROCESSES = min(2, os.cpu_count() or 1)
SANITIZERS = {
    "": (),
    "address": ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"),
    "thread": ("-fsanitize=thread",),
}


def compiler():
    """g++, or what CXX names. None where there is neither."""
    return shutil.which(os.environ.get("CXX", "g++"))


@cache
def cache_folder():
    """Kept between runs: LANENORM_TEST_CACHE, else a folder of this user among the temporary files."""
    default = Path(tempfile.gettempdir()) / f"lanenorm-tests-{os.getuid()}"
    folder = Path(os.environ.get("LANENORM_TEST_CACHE", default))
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.getuid():  # what others could have put there is not to be run
        folder = Path(tempfile.mkdtemp(prefix="lanenorm-tests-"))
    return folder


@cache
def compiler_version():
    return run([compiler(), "--version"]).stdout


def run(command):
    """The completed process; a failure shows what the compiler said."""
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # a sanitizer for Python
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(str(c) for c in command)}\n{(done.stdout + done.stderr)[-20000:]}")
    return done


def execute(program, *arguments, timeout=300):
    """The completed process of a program built here, whatever came out of it.

    The TSAN of GCC 12 knows the memory layout of kernels without much address randomization only.
    """
    setarch = shutil.which("setarch")
    fixed = [setarch, os.uname().machine, "--addr-no-randomize"] if setarch else []
    options = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1"}
    command = [*fixed, str(program), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, check=False, env={**os.environ, **options}
    )


class Builder:
    """Compiles and links from one tree of sources.

    Parameters
    ----------
    tree : Path
        The repository, or a copy whose kernels were changed.
    sanitizer : str
        "" or a key of `SANITIZERS`. The emulator itself is always built without.
    flags : tuple of str
        More flags for every file but the emulator's.
    emulator : Path
        This folder, or a copy whose emulator was changed.
    """

    def __init__(self, tree=ROOT, sanitizer="", flags=(), emulator=HERE):
        self.tree = Path(tree)
        self.emulator = Path(emulator)
        self.sanitizer = SANITIZERS[sanitizer]
        self.flags = flags
        self.includes = (self.tree, self.tree / "cpp", self.emulator.parent, ROOT / "python/ext")

    def _files(self, source):
        """`source` and the headers of this project that it includes, however deep."""
        found, waiting = {}, [source]
        while waiting:
            path = waiting.pop()
            found[path] = path.read_bytes()
            for name in re.findall(rb'^#include ["<]([^">]+)[">]', found[path], re.MULTILINE):
                candidates = (folder / name.decode() for folder in (path.parent, *self.includes))
                header = next((candidate for candidate in candidates if candidate.exists()), None)
                if header is not None and header not in found:
                    waiting.append(header)
        return found

    def _output(self, suffix, *inputs):
        """Where a product of these inputs lies."""
        content = repr((compiler_version(), *inputs)).encode()
        return cache_folder() / f"{hashlib.sha256(content).hexdigest()[:32]}{suffix}"

    def _make(self, output, command):
        """Run a command that writes its output; others may be making the same one."""
        with tempfile.NamedTemporaryFile(dir=output.parent, suffix=output.suffix) as temporary:
            run([*command, "-o", temporary.name])
            os.chmod(temporary.name, 0o755)
            os.link(temporary.name, f"{temporary.name}.done")
            os.replace(f"{temporary.name}.done", output)

    def compile(self, source, *flags):
        """Object file of `source`; .cu files are C++ here."""
        source = Path(source)
        sanitizer = ("-O2",) if source.name in EMULATOR else (*self.sanitizer, *self.flags)
        flags = (*FLAGS, *DEFINITIONS, *sanitizer, *flags)
        output = self._output(".o", source.name, sorted(self._files(source).values()), flags)
        if not output.exists():
            includes = [f"-I{folder}" for folder in self.includes]
            self._make(output, [compiler(), *flags, *includes, "-x", "c++", "-c", source])
        return output

    def compile_all(self, sources):
        """Object files of (source, *flags) tuples and of the emulator. A few at once: the longest should come first."""
        emulator = [(self.emulator / name,) for name in EMULATOR]
        with ThreadPoolExecutor(PROCESSES) as pool:
            return list(pool.map(lambda source: self.compile(*source), [*sources, *emulator]))

    def link(self, suffix, objects, *flags):
        """A program, or with -shared a module."""
        output = self._output(suffix, [o.name for o in objects], flags, self.sanitizer)
        if not output.exists():
            self._make(output, [compiler(), *self.sanitizer, *objects, *flags])
        return output

    def program(self, *sources):
        """A program of these sources and the emulator."""
        return self.link(".exe", self.compile_all([(source,) for source in sources]))

    def kernels(self):
        """Sources of the CUDA part, but for what calls CUDA's runtime, and of what it needs of the core."""
        kernels = sorted((self.tree / "cuda").glob("*.cu"), key=lambda path: -path.stat().st_size)
        return [*kernels, *(self.tree / f"{name}.cpp" for name in ("cuda/choose", "cpp/core/check", "cpp/core/plan"))]

    def module(self):
        """The Python module of this package."""
        import pybind11

        python = (f"-I{sysconfig.get_paths()['include']}", f"-I{pybind11.get_include()}")
        sources = [*((source,) for source in self.kernels()), (HERE / "module.cpp", *python)]
        return self.link(sysconfig.get_config_var("EXT_SUFFIX"), self.compile_all(sources), "-shared")

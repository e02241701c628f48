"""setup.py's choice of CUDA: what it builds, what it says where it cannot, and what it compiles again."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]

NVCC = """\
#!/bin/sh
case "$1" in
--version) echo "Cuda compilation tools, release {release}, V{release}.88" ;;
--list-gpu-arch) for n in {archs}; do echo compute_$n; done ;;
--dryrun) echo '#$ LIBRARIES=  "-L{home}/lib/stubs" "-L{home}/lib"' >&2 ;;
*) echo "$@" >> {home}/calls
   while [ $# -gt 1 ]; do case "$1" in -o) out=$2 ;; -MF) rule=$2 ;; -c) source=$2 ;; esac; shift; done
   grep -q broken "$source" && echo "$source: error: broken" >&2 && exit 2
   echo object > "$out"
   printf '%s : %s \\\\\\n    {home}/with\\\\ space.h\\n' "$out" "$source" > "$rule" ;;
esac
"""


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py as a module; no variable of the caller's has a say."""
    monkeypatch.chdir(ROOT)
    for name in [name for name in os.environ if name.startswith(("SINKLORA_", "CUDA_"))]:
        monkeypatch.delenv(name)
    spec = importlib.util.spec_from_file_location("sinklora_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Machine:
    """A folder that stands for PATH: an nvcc and an nvidia-smi that say what a test wants."""

    def __init__(self, home: Path) -> None:
        self.home = home
        (home / "bin").mkdir()
        (home / "lib").mkdir()
        (home / "with space.h").touch()

    def nvcc(self, release: str = "13.0", archs: str = "75 80 86 89 90 100 120") -> Machine:
        self._script("nvcc", NVCC.format(release=release, archs=archs, home=self.home))
        (self.home / "lib" / "libcudart_static.a").touch()
        return self

    def gpus(self, *capabilities: str) -> Machine:
        lines = " ".join(f"'{line}'" for line in capabilities) or "'No devices were found'"
        self._script("nvidia-smi", f"#!/bin/sh\nprintf '%s\\n' {lines}\n")
        return self

    def _script(self, name: str, text: str) -> None:
        path = self.home / "bin" / name
        path.write_text(text)
        path.chmod(0o755)

    @property
    def calls(self) -> list[str]:
        path = self.home / "calls"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    if not sys.platform.startswith("linux"):
        pytest.skip("CUDA is built on Linux only")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    made = Machine(tmp_path)
    # nvcc and nvidia-smi may be in the system's own folders.
    made.gpus()
    return made


def choose(build: ModuleType, **variables: str) -> Any:
    """What is chosen with these variables; PATH is the environment's."""
    return build.choose_cuda({"PATH": os.environ["PATH"], **variables})


@pytest.mark.parametrize("value", ["yes", "2", "Auto", " "])
def test_refuses_other_modes(build: ModuleType, value: str) -> None:
    with pytest.raises(SystemExit, match=f"SINKLORA_CUDA: expected auto, 0 or 1, got '{value}'"):
        choose(build, SINKLORA_CUDA=value)


@pytest.mark.parametrize("mode", ["auto", "0", "1"])
@pytest.mark.parametrize(
    ("archs", "message"),
    [("sm_80", "got 'sm_80'"), ("8", "got '8'"), ("8.0;9.0a", "got '9.0a'"), ("7.5", "8.0 .* got 7.5")],
)
def test_refuses_other_archs(build: ModuleType, mode: str, archs: str, message: str) -> None:
    with pytest.raises(SystemExit, match=f"SINKLORA_CUDA_ARCHS: expected .*{message}"):
        choose(build, SINKLORA_CUDA=mode, SINKLORA_CUDA_ARCHS=archs)


@pytest.mark.parametrize("text", ["9.0;8.0", "8.0, 9.0", " 8.0 9.0;8.0; "])
def test_archs_are_sorted(build: ModuleType, machine: Machine, text: str) -> None:
    machine.nvcc()
    for mode in ("auto", "1"):
        assert choose(build, SINKLORA_CUDA=mode, SINKLORA_CUDA_ARCHS=text).archs == ("8.0", "9.0")
    assert choose(build, SINKLORA_CUDA_ARCHS="10.0;8.0").archs == ("8.0", "10.0")


def test_auto_builds_for_the_gpus_that_are_there(build: ModuleType, machine: Machine) -> None:
    machine.nvcc().gpus("9.0", " 8.6", "9.0", "7.5")
    for variables in ({}, {"SINKLORA_CUDA": ""}, {"SINKLORA_CUDA": "auto"}):
        assert choose(build, **variables).archs == ("8.6", "9.0")


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        (lambda m: m.nvcc(), "no GPU is visible here (nvidia-smi shows none)"),
        (lambda m: m.nvcc().gpus("7.5", "7.0"), "the GPU here (7.0, 7.5) is older than Ampere (8.0)"),
        (lambda m: m.nvcc(archs="80 90").gpus("8.9"), "nvcc 13.0 does not know compute capability 8.9;"),
        (lambda m: m.nvcc("11.8").gpus("8.0"), "nvcc 11.8 is too old, 12.0 or later is needed"),
        (lambda m: m.nvcc("?").gpus("8.0"), "--version names no release"),
    ],
)
def test_auto_does_without_and_says_why(
    build: ModuleType, machine: Machine, prepare: Any, reason: str
) -> None:
    prepare(machine)
    said = choose(build)
    assert isinstance(said, str)
    assert reason in said
    assert "\n" not in said


def test_auto_without_nvcc(build: ModuleType, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(machine.home / "bin"))
    machine.gpus("8.0")
    assert choose(build) == "no nvcc on PATH, and no CUDA_HOME"
    assert choose(build, CUDA_HOME="/none") == "no nvcc in CUDA_HOME, /none"


def test_cuda_home_comes_first(build: ModuleType, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.nvcc("12.8").gpus("8.0")
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    chosen = choose(build, CUDA_HOME=str(machine.home), SINKLORA_CUDA="1", SINKLORA_CUDA_ARCHS="8.0")
    assert chosen.toolkit.release == "12.8"
    assert chosen.toolkit.nvcc == str(machine.home / "bin" / "nvcc")
    assert chosen.toolkit.cudart == str(machine.home / "lib" / "libcudart_static.a")


def test_mode_0_asks_nobody(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "ask", lambda *command: pytest.fail(f"asked {command}"))
    assert choose(build, SINKLORA_CUDA="0") == "SINKLORA_CUDA=0"


def test_mode_1_builds_the_list_or_fails(build: ModuleType, machine: Machine) -> None:
    machine.nvcc()
    assert choose(build, SINKLORA_CUDA="1").archs == ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
    with pytest.raises(SystemExit, match="SINKLORA_CUDA=1: CUDA does not run under SINKLORA_SANITIZE=1"):
        choose(build, SINKLORA_CUDA="1", SINKLORA_SANITIZE="1")
    machine.nvcc("12.4", "80 86 89 90")
    with pytest.raises(SystemExit, match=r"SINKLORA_CUDA=1: nvcc 12.4 does not know .* 10\.0, 12\.0;"):
        choose(build, SINKLORA_CUDA="1")
    machine.nvcc("11.8")
    with pytest.raises(SystemExit, match=r"SINKLORA_CUDA=1: nvcc 11\.8 is too old"):
        choose(build, SINKLORA_CUDA="1")
    machine.nvcc()
    (machine.home / "lib" / "libcudart_static.a").unlink()
    with pytest.raises(SystemExit, match=r"SINKLORA_CUDA=1: no libcudart_static\.a where"):
        choose(build, SINKLORA_CUDA="1")
    with pytest.raises(SystemExit, match="SINKLORA_CUDA=1: no nvcc in CUDA_HOME"):
        choose(build, SINKLORA_CUDA="1", CUDA_HOME=str(machine.home / "none"))


def test_the_newest_is_there_as_ptx_too(build: ModuleType) -> None:
    flags = build.nvcc_flags(("8.0", "12.0"))
    assert "-gencode=arch=compute_80,code=[sm_80]" in flags
    assert "-gencode=arch=compute_120,code=[sm_120,compute_120]" in flags


def test_warnings_are_errors_for_both_compilers(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "-Werror" not in build.nvcc_flags(("8.0",))
    monkeypatch.setenv("SINKLORA_WERROR", "1")
    assert "-Werror all-warnings" in " ".join(build.nvcc_flags(("8.0",)))
    assert "-Werror" in build.common_flags()


def test_what_the_sources_are_told(build: ModuleType, machine: Machine) -> None:
    cuda, extension = choose(build, SINKLORA_CUDA="1", CUDA_HOME=str(machine.nvcc().home)), _extension()
    build.apply(cuda, extension)
    assert ("SL_WITH_CUDA", None) in extension.define_macros
    assert ("SL_CUDA_TOOLKIT", '"13.0"') in extension.define_macros
    assert cuda.toolkit.cudart in extension.extra_link_args
    assert not [flag for flag in extension.extra_link_args if flag in ("-lcuda", "-lcudart")]
    without = _extension()
    build.apply('no "nvcc"', without)
    assert without.define_macros == [("SL_CUDA_ABSENT", '"no \\"nvcc\\""')]
    assert without.extra_link_args == ["-pthread", "-lm", "-ldl"]


def _extension() -> Any:
    return SimpleNamespace(define_macros=[], extra_link_args=[])


def _age(path: Path, seconds: float) -> None:
    os.utime(path, (time.time() - seconds, time.time() - seconds))


def test_only_what_changed_is_compiled_again(
    build: ModuleType, machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = choose(build, SINKLORA_CUDA="1", CUDA_HOME=str(machine.nvcc().home))
    monkeypatch.chdir(tmp_path)
    sources = [Path("kernels/a.cu"), Path("b.cu")]
    sources[0].parent.mkdir()
    header = tmp_path / "with space.h"
    for path in (*sources, header):
        path.touch()
        _age(path, 100)

    def compiled(cuda: Any = cuda, force: bool = False) -> int:
        before = len(machine.calls)
        objects = build.compile_cuda(cuda, map(str, sources), Path("made"), force)
        assert objects == [str(Path("made", source).with_suffix(".o")) for source in sources]
        assert all(Path(name).read_text() == "object\n" for name in objects)
        return len(machine.calls) - before

    assert compiled() == 2
    assert compiled() == 0
    _age(sources[0], -5)  # as if written after its object
    assert compiled() == 1
    _age(sources[0], 100)
    assert compiled() == 0
    _age(header, -5)
    assert compiled() == 2
    header.unlink()
    assert compiled() == 2
    header.touch()
    _age(header, 100)
    assert compiled() == 0
    assert compiled(cuda._replace(archs=("8.0",))) == 2
    assert compiled(cuda._replace(archs=("8.0",))) == 0
    assert compiled(cuda._replace(archs=("8.0",)), force=True) == 2


def test_a_file_that_does_not_compile(
    build: ModuleType,
    machine: Machine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    cuda = choose(build, SINKLORA_CUDA="1", CUDA_HOME=str(machine.nvcc().home))
    monkeypatch.chdir(tmp_path)
    Path("a.cu").write_text("broken\n")
    for _ in range(2):
        with pytest.raises(build.CompileError, match=r"nvcc failed on a\.cu; SINKLORA_CUDA=0 builds"):
            build.compile_cuda(cuda, ["a.cu"], Path("made"), False)
        assert "a.cu: error: broken" in capfd.readouterr().err


def test_as_many_compilers_as_processors_of_the_process(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert build.processors() >= 1
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5}, raising=False)
    assert build.processors() == 2


def test_a_driver_that_hangs_is_none(
    build: ModuleType, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "ASK_SECONDS", 0.2)
    machine._script("nvidia-smi", "#!/bin/sh\nexec sleep 30\n")
    with pytest.raises(build.NoCudaError, match="no GPU is visible here"):
        build.visible_archs()


@pytest.mark.parametrize("static", [True, False])
def test_the_cpp_library_is_static_where_there_is_one(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, static: bool
) -> None:
    compiler, library = tmp_path / "compiler", tmp_path / "libstdc++.a"
    library.touch()
    # A compiler that does not find a library repeats its name.
    compiler.write_text(f"#!/bin/sh\necho {library if static else library.name}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", f"{compiler} -m64")
    assert build.cpp_library() == (["-Wl,-Bstatic", "-lstdc++", "-Wl,-Bdynamic"] if static else ["-lstdc++"])


def test_the_distribution_holds_every_source(build: ModuleType) -> None:
    listed = {*build.SOURCES, *build.CUDA_SOURCES, *build.ALL_HEADERS}
    suffixes = {".c", ".h", ".def", ".inc", ".cu", ".cuh"}
    found = {str(path) for path in Path("csrc").rglob("*") if path.suffix in suffixes}
    assert found == listed

# SPDX-License-Identifier: Apache-2.0
"""Look into what release.py built, install it in fresh environments, and use it there: `tox -e package`.

The environments: the wheel, installed without a network; and an editable install of the unpacked sdist, whose edits
must be followed. In each, the package is imported, its three command lines are one program, and mypy and pyright find
nothing in typed_use.py and every mistake in mistaken_use.py. Then boxer.py, copied into a package of the user's, must
be clean for both, too.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

TOOLS = Path(__file__).resolve().parent
ROOT = TOOLS.parent
BIN = "Scripts" if os.name == "nt" else "bin"
IN_WHEEL = ["boxer/__init__.py", "boxer/__main__.py", "boxer/py.typed"]
IN_SDIST = [
    *(f".bench/{name}" for name in ("README.md", "bench.py", "calls.svg", "memory.svg")),
    *(f".bench/{name}" for name in ("results.json", "soak.py", "work.py")),
    *(f".examples/{path.name}" for path in sorted((ROOT / ".examples").glob("*.py"))),
    ".gitignore",
    *(f".package/{name}" for name in IN_WHEEL),
    *(f".tools/{path.name}" for path in sorted(TOOLS.glob("*.py"))),
    *("LICENSE", "PKG-INFO", "README.md", "boxer.py", "pyproject.toml", "test_boxer.py", "tox.ini"),
]
VERSIONS = ("3.9", f"3.{sys.version_info.minor}")  # that the types are checked for
PYRIGHT = [sys.executable, "-m", "pyright"]
IMPORT = """
import importlib.metadata, boxer
assert boxer.__version__ == importlib.metadata.version("boxer-sdk")
boxer.BoxerClient().close()
print(boxer.__file__)
"""


def run(*line: object, cwd: Path, path: Path | None = None, status: int = 0) -> str:
    """Run a program, with `path` first on its PATH, and return what it prints; `status` is how it must end."""
    environment = {**os.environ, "PATH": f"{path or ''}{os.pathsep}{os.environ['PATH']}"}
    words = [str(word) for word in line]
    done = subprocess.run(words, check=False, cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE)
    if done.returncode != status:
        sys.exit(f"{done.stdout}\n{' '.join(words)}: exit status {done.returncode}")
    return done.stdout


def pip(python: Path, *arguments: object, cwd: Path) -> None:
    """Run this environment's pip for another one, which needs none of its own."""
    run(sys.executable, "-m", "pip", "--quiet", "--python", python, *arguments, cwd=cwd)


def check_contents(wheel: Path, sdist: Path) -> None:
    """Compare the names and the bytes of what was built with what they should be."""
    with zipfile.ZipFile(wheel) as zipped:
        names = sorted(name for name in zipped.namelist() if ".dist-info/" not in name)
        assert names == IN_WHEEL, names
        assert zipped.read("boxer/__init__.py") == (ROOT / "boxer.py").read_bytes()
    with tarfile.open(sdist) as packed:
        names = sorted(name.partition("/")[2] for name in packed.getnames())
    assert names == sorted(IN_SDIST), names


def check_builds(wheel: Path, sdist: Path, folder: Path) -> None:
    """Check that the checkout and the sdist give the same wheel, to the byte."""
    for name, source in (("from-sdist", sdist), ("from-checkout", ROOT)):
        options = ["--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", name]
        run(sys.executable, "-m", "pip", "wheel", *options, source, cwd=folder)
        assert (folder / name / wheel.name).read_bytes() == wheel.read_bytes(), name


def new_environment(folder: Path) -> Path:
    """Make an environment with nothing in it and return its Python."""
    venv.create(folder)
    return folder / BIN / "python"


def check_use(python: Path, lies_at: Path, folder: Path) -> None:
    """Check that an environment's Python imports one file and that type checkers know its types."""
    printed = run(python, "-W", "error", "-c", IMPORT, cwd=folder)
    assert Path(printed.strip()) == lies_at, printed
    for option in ("--version", "--help"):
        entries = ([python.parent / "boxer"], [python, "-m", "boxer"], [python, ROOT / "boxer.py"])
        texts = {run(*entry, option, cwd=folder) for entry in entries}
        assert len(texts) == 1, texts
    for name in ("typed_use.py", "mistaken_use.py"):
        shutil.copy(TOOLS / name, folder)
    lines = enumerate((folder / "mistaken_use.py").read_text("utf-8").splitlines(), 1)
    mistakes = {("mistaken_use.py", number) for number, line in lines if line.endswith("# mistake")}
    programs = sorted(folder.glob("*_use.py"))
    for version in VERSIONS:
        found = run(*mypy(version), "--python-executable", python, *programs, cwd=folder, status=1)
        errors = re.findall(r"(\w+\.py):(\d+): error: ", found)
        assert {(name, int(number)) for name, number in errors} == mistakes, found
        options = ["--outputjson", "--pythonversion", version, "--pythonpath", python]
        found = run(*PYRIGHT, *options, *programs, cwd=folder, status=1)
        errors = json.loads(found)["generalDiagnostics"]
        assert {(Path(it["file"]).name, it["range"]["start"]["line"] + 1) for it in errors} == mistakes, found
    run(*PYRIGHT, "--ignoreexternal", "--verifytypes", "boxer", cwd=folder, path=python.parent)


def mypy(version: str) -> list[str]:
    """Return the beginning of mypy's command line."""
    return [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--python-version", version]


def check_edits_are_followed(python: Path, boxer: Path, folder: Path) -> None:
    """Edit boxer.py and look for it in an environment that has it as an editable install."""
    boxer.write_text(f"{boxer.read_text('utf-8')}\nEDITED = True\n", "utf-8")
    run(python, "-c", "import boxer; assert boxer.EDITED", cwd=folder)


def check_vendored(folder: Path) -> None:
    """Check that type checkers find nothing in boxer.py where it is a module of a user's package."""
    vendor = folder / "mypkg/_vendor"
    vendor.mkdir(parents=True)
    for package in (vendor, vendor.parent):
        (package / "__init__.py").touch()
    shutil.copy(ROOT / "boxer.py", vendor)
    program = (TOOLS / "typed_use.py").read_text("utf-8").replace("import boxer", "from mypkg._vendor import boxer")
    program = program.replace("from boxer import", "from mypkg._vendor.boxer import")
    (folder / "mypkg/use.py").write_text(program, "utf-8")
    (folder / "pyrightconfig.json").write_text('{"typeCheckingMode": "strict"}', "utf-8")
    for version in VERSIONS:
        run(*mypy(version), "mypkg", cwd=folder)
        run(*PYRIGHT, "--pythonversion", version, "mypkg", cwd=folder)


def main(here: Path) -> None:
    """Check what release.py built into the folder that is named; `here` is an empty folder to work in."""
    dist = Path(sys.argv[1]).resolve()
    [wheel], [sdist] = dist.glob("*.whl"), dist.glob("*.tar.gz")
    if shutil.which("sha256sum"):
        run("sha256sum", "--check", "SHA256SUMS", cwd=dist)
    check_contents(wheel, sdist)
    check_builds(wheel, sdist, here)

    for name in ("wheel", "editable", "vendored"):
        (here / name).mkdir()
    python = new_environment(here / "wheel/env")
    pip(python, "install", "--no-index", "--find-links", dist, "boxer-sdk", cwd=here)
    [lies_at] = (here / "wheel/env").glob("**/site-packages/boxer/__init__.py")
    check_use(python, lies_at, here / "wheel")

    with tarfile.open(sdist) as archive:
        archive.extractall(here / "editable", filter="data")
    [source] = (here / "editable").iterdir()
    python = new_environment(here / "editable/env")
    pip(python, "install", "--editable", source, cwd=here)
    check_use(python, source / ".package/boxer/__init__.py", here / "editable")
    check_edits_are_followed(python, source / "boxer.py", here / "editable")

    check_vendored(here / "vendored")
    print(f"{wheel.name}, {sdist.name}: built, installed and used")


# Not in a folder of tox's own: pyright leaves out what is below a hidden one, such as .tox.
with tempfile.TemporaryDirectory() as temporary:
    main(Path(temporary).resolve())

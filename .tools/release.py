# SPDX-License-Identifier: Apache-2.0
"""Build what is released into a folder: a wheel, an sdist, a copy of boxer.py, and SHA256SUMS, which covers the three.

    tox -e release

The same sources give the same bytes, on every machine.
"""

import argparse
import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

parser = argparse.ArgumentParser(description="Build what is released.")
parser.add_argument("folder", type=Path, help="where to; what was built there before is removed")
folder = parser.parse_args().folder

if (ROOT / ".package/boxer/__init__.py").read_bytes() != (ROOT / "boxer.py").read_bytes():
    sys.exit(".package/boxer/__init__.py is no link to boxer.py: check out with `git -c core.symlinks=true`")
for pattern in ("boxer_sdk-*.whl", "boxer_sdk-*.tar.gz", "boxer.py", "SHA256SUMS"):
    for old in folder.glob(pattern):
        old.unlink()
subprocess.run([sys.executable, "-m", "build", "--outdir", folder, ROOT], check=True)
shutil.copy(ROOT / "boxer.py", folder)
released = sorted([folder / "boxer.py", *folder.glob("boxer_sdk-*")])
sums = "".join(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in released)
(folder / "SHA256SUMS").write_bytes(sums.encode())
print(f"\n{folder / 'SHA256SUMS'}:\n{sums}", end="")

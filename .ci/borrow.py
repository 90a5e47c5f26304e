"""Lets the environment that runs this see what another one has installed; its own packages still come first."""

import sys
import sysconfig
from pathlib import Path

lender = Path(sys.argv[1])
shared = [str(path) for path in (*lender.glob("lib/python3*/site-packages"), *lender.glob("Lib/site-packages"))]
if not shared:
    raise SystemExit(f"{lender} is not there; run `tox -e {lender.name}` first, or add it: `tox -e {lender.name},...`")
Path(sysconfig.get_path("purelib"), "borrowed.pth").write_text("\n".join(shared) + "\n", encoding="utf-8")

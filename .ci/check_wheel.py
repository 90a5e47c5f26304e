"""Installs the wheel that was built from the sdist, and checks that it holds the whole package and nothing else."""

import subprocess
import sys
import zipfile
from pathlib import Path

root = Path(__file__).resolve().parent.parent
[wheel] = Path(sys.argv[1]).glob("*.whl")
packages = [root / "cilnorm", *sorted((root / "plugins").glob("cilnorm_*"))]
SHIPPED = {".py", ".html", ".yaml", ".txt", ".jinja"}
wanted = {
    path.relative_to(home.parent).as_posix()
    for home in packages
    for path in home.rglob("*")
    if path.is_file() and (path.suffix in SHIPPED or path.name == "py.typed")
}
wanted |= {f"cilnorm/shipped/benchmarks/{path.name}" for path in (root / "benchmarks").glob("*.py")}
wanted |= {"cilnorm/registry.yaml"}
with zipfile.ZipFile(wheel) as archive:
    held = {name for name in archive.namelist() if ".dist-info/" not in name}
if held != wanted:
    raise SystemExit(f"{wheel.name}: lacks {sorted(wanted - held)}, holds besides {sorted(held - wanted)}")
subprocess.run([sys.executable, "-m", "pip", "install", "--force-reinstall", "--no-deps", wheel], check=True)
code = "import cilnorm, sys; assert cilnorm.__file__.startswith(sys.prefix), cilnorm.__file__"
subprocess.run([sys.executable, "-c", code], check=True)
print(f"{wheel.name}: {len(held)} files")

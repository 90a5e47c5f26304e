"""Installs the wheel that was built from the sdist, and checks that it holds the whole package and nothing else.

python .ci/check_wheel.py dist
"""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = {".py", ".html", ".yaml", ".txt", ".jinja"}


def wanted() -> set[str]:
    """The files of the wheel."""
    packages = [ROOT / "cilnorm", *sorted((ROOT / "plugins").glob("cilnorm_*"))]
    found = {
        path.relative_to(home.parent).as_posix()
        for home in packages
        for path in home.rglob("*")
        if path.is_file() and (path.suffix in SHIPPED or path.name == "py.typed")
    }
    found |= {f"cilnorm/shipped/benchmarks/{path.name}" for path in (ROOT / "benchmarks").glob("*.py")}
    return found | {"cilnorm/registry.yaml"}


def installed_at() -> str:
    """Where the installed package lies; a folder of its name where the command is given is another one."""
    command = [sys.executable, "-P", "-c", "import cilnorm; print(cilnorm.__file__)"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def check(folder: Path) -> str:
    """A line about the wheel in a folder; SystemExit if it is not what it should be."""
    [wheel] = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    if held != wanted():
        raise SystemExit(f"{wheel.name}: lacks {sorted(wanted() - held)}, holds besides {sorted(held - wanted())}")
    subprocess.run([sys.executable, "-m", "pip", "install", "--force-reinstall", "--no-deps", wheel], check=True)
    if not installed_at().startswith(sys.prefix):
        raise SystemExit(f"cilnorm is {installed_at()}, and not the wheel's")
    return f"{wheel.name}: {len(held)} files"


if __name__ == "__main__":
    print(check(Path(sys.argv[1])))

"""A table, a comparison and a report from Python: what `cilnorm table`, `compare` and `report` do on the command line.

    python examples/table_from_python.py

fills a small table in tables/small and goes on where it was stopped.
"""

import cilnorm

GRID = """\
about: two norms with finetuning, cut short so that it takes a minute
methods: [ft]
norms: [bn, tbbn]
"""
SHORT = {"classes": 4, "tasks": 2, "epochs": 1, "memory": 16}


def main() -> None:
    """Fills the table, then compares its two rows and draws their page."""
    with open("small.yaml", "w", encoding="utf-8") as file:
        file.write(GRID)
    sweep = cilnorm.table("small.yaml", seeds=[0, 1], values=SHORT, out="tables/small", how=cilnorm.Launch(workers=2))
    for entry in sweep.entries:
        print(f"{entry.method} x {entry.norm}: A_f of each seed {entry.values['A_f']}")

    cells = "tables/small/cells"
    contrast = cilnorm.compare(f"{cells}/ft-bn-*", f"{cells}/ft-tbbn-*")
    print(f"the groups differ in {', '.join(contrast.settings)}; {contrast.verdict}")

    print(*cilnorm.report([job.folder for job in sweep.jobs], "small.html"))


if __name__ == "__main__":
    main()

"""``python -m cilnorm`` is the command."""

from cilnorm.cli import main

if __name__ == "__main__":
    main()

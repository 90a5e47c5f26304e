"""Stand-in for PyCIL at commit f3509b8: the modules, names and signatures that the integration meets, and no more."""

import argparse
import json

from trainer import train


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=str)
    with open(parser.parse_args().config, encoding="utf-8") as file:
        train(json.load(file))


if __name__ == "__main__":
    main()

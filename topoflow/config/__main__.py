"""`python -m topoflow.config --print SECTION.KEY CONFIG [section.key=value ...]`: one resolved value, for scripts.

It imports no torch, so that a launch script can check a config and learn the run directory at once.
"""

import argparse
import sys

from topoflow.config import config_to_dict, load_config
from topoflow.errors import ConfigError, Refusal


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m topoflow.config", description=__doc__.splitlines()[0])
    parser.add_argument("--print", required=True, dest="key", metavar="SECTION.KEY", help="the key to print")
    parser.add_argument("config", help="a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_args(arguments)
    try:
        tree = config_to_dict(load_config(options.config, options.overrides))
        section, _, key = options.key.partition(".")
        if key not in tree.get(section, {}):
            raise ConfigError(f"{options.key}: unknown key: expected section.key, such as run.dir")
        value = tree[section][key]
    except Refusal as refusal:
        print(f"topoflow: {refusal}", file=sys.stderr)
        return refusal.exit_status
    print(value)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Write a run for Kubernetes (KubeRay), SkyPilot or dstack, checked, as YAML on stdout.

CONFIG is a YAML file; key=value overrides its keys. What decides where and how the run is placed is set by --set (see
cluster/kube/options.py) and, for Kubernetes, by fragments of manifests merged by name (--override FILE).
"""

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.cli._planning import plan_first
from cluster.cli._runs import add_json, print_json
from elastic.errors import ConfigError
from elastic.paths import expand_home

if TYPE_CHECKING:
    from cluster.kube.manifests import Manifest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Take a configuration, a profile and where to write."""
    add_placement(parser)
    parser.add_argument(
        "--profile", required=True, metavar="P", help="where it will run: gke-spot, generic, skypilot ..."
    )
    parser.add_argument(
        "--kustomize", metavar="DIR", type=Path, help="write a base and an overlay for kustomize instead"
    )
    parser.add_argument(
        "--rights",
        action="store_true",
        help="print what an administrator applies once instead: the Role that submit needs, and the PriorityClasses",
    )
    add_json(parser)


def add_placement(parser: argparse.ArgumentParser) -> None:
    """Declare what `render` and `submit` share."""
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("overrides", metavar="key=value", nargs="*")
    parser.add_argument("--set", dest="options", metavar="key=value", action="append", default=[], help="an option")
    parser.add_argument("--override", metavar="FILE", type=Path, help="fragments of manifests, merged by name")
    parser.add_argument("--plan", action="store_true", help="tell the plan first; exit 4 if nothing keeps to budget.*")


def run(args: argparse.Namespace) -> int:
    """Print the stream, or write the files of kustomize."""
    from cluster.kube.text import dump_documents
    from elastic.config_load import load

    if args.plan:
        plan_first(load(args.config, args.overrides), args)

    documents = render_for(args, args.profile)
    header = get_command(args)
    if args.rights:
        documents, header = get_rights(args, documents)
    if args.kustomize:
        written = write_kustomize(args, documents)
        if args.json:
            print_json({"files": [str(path) for path in written]})
        else:
            print("\n".join(str(path) for path in written))
    elif args.json:
        print_json({"profile": args.profile, "documents": documents})
    else:
        print(dump_documents(documents, header=header), end="")
    return 0


def get_rights(args: argparse.Namespace, documents: "list[Manifest]") -> "tuple[list[Manifest], str]":
    """Return what an administrator applies once, and what is said above it.

    Raises:
        ConfigError: the profile is not for Kubernetes.
    """
    from cluster.kube.api.rights import build_rights, describe_rights
    from cluster.kube.render import is_kubernetes

    if not is_kubernetes(documents) or args.kustomize:
        what = "--kustomize" if args.kustomize else f"--profile {args.profile}"
        raise ConfigError(
            f"--rights writes a Role for Kubernetes, which {what} does not go with. Leave one of them out."
        )
    header = f"{get_command(args)} --rights\n{describe_rights(documents[-1]['metadata']['namespace'])}"
    return build_rights(documents), header


def get_command(args: argparse.Namespace) -> str:
    """Return the command that renders the same again, for the head of the file."""
    words = ["solvent", "render", args.config, *args.overrides, "--profile", args.profile]
    words += [word for option in args.options for word in ("--set", option)]
    words += ["--override", str(args.override)] if args.override else []
    return shlex.join(words)


def render_for(args: argparse.Namespace, profile: str) -> "list[Manifest]":
    """Render what the arguments of `add_placement` describe."""
    from cluster.kube.options import parse_options
    from cluster.kube.override import read_overrides
    from cluster.kube.render import render
    from elastic.config_load import load

    config = load(args.config, args.overrides)
    prices = ""
    if config.cost.price_file:
        from cluster.cost import load_prices

        load_prices(config.cost)
        prices = Path(expand_home(config.cost.price_file)).read_text()
    fragments = read_overrides(args.override) if args.override else []
    return render(config, profile, parse_options(args.options), prices=prices, fragments=fragments)


def write_kustomize(args: argparse.Namespace, documents: "list[Manifest]") -> list[Path]:
    """Write base/ (the generic profile's) and overlays/<profile>/; return the paths written.

    Raises:
        ConfigError: the profile writes no manifests.
    """
    from cluster.kube.kustomize import build_base, build_overlay
    from cluster.kube.render import is_kubernetes

    if not is_kubernetes(documents):
        raise ConfigError(f"--kustomize is for Kubernetes; --profile {args.profile} writes no manifests. Drop it.")
    base_args = argparse.Namespace(**{**vars(args), "override": None})
    base = render_for(base_args, "generic")
    files = {Path("base", name): text for name, text in build_base(base).items()}
    overlay = Path("overlays", args.profile)
    files |= {overlay / name: text for name, text in build_overlay(base, documents).items()}
    for path, text in files.items():
        (args.kustomize / path).parent.mkdir(parents=True, exist_ok=True)
        (args.kustomize / path).write_text(text)
    return [args.kustomize / path for path in files]

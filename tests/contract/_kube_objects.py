"""What an API server of Kubernetes keeps, and the fields that each writer owns, as server-side apply sees them.

As the real one (1.36, with KubeRay 1.7.0's CRD) did: a writer owns the fields that it applied or changed; to apply
another value of somebody else's field is a conflict; a list without keys is one field (`workerGroupSpecs`); defaults
are filled in; `globalDefault: false` is dropped. KubeRay's operator reads a new job, adds its finalizer and writes all
of it back, from types of Go's: quantities become canonical, empty lists go, and what that changes belongs to it.
"""

import copy
import re

KEYS = {"containers": "name", "volumes": "name", "env": "name", "volumeMounts": "mountPath", "imagePullSecrets": "name"}
"""Lists whose items are told apart by a key; all others are atomic."""
OPERATOR = "kuberay-operator"
FINALIZER = "ray.io/rayjob-finalizer"
_QUANTITIES = ("cpu", "memory", "nvidia.com/gpu", "sizeLimit")
_SERVERS_OWN = ("name", "namespace", "resourceVersion", "creationTimestamp", "deletionTimestamp")
_UNOWNED = {("apiVersion",), ("kind",), ("status",), *(("metadata", name) for name in _SERVERS_OWN)}


class ConflictsError(Exception):
    """Who owns which of the fields that were to be changed."""

    def __init__(self, owners):
        """Take {path: manager}."""
        self.owners = owners
        lines = [f'conflict with "{manager}": {show(path)}' for path, manager in owners.items()]
        super().__init__(f"Apply failed with {len(lines)} conflict{'s' * (len(lines) > 1)}: {', '.join(lines)}")


class Fields:
    """Which manager owns which fields of which object."""

    def __init__(self):
        self.owners = {}

    def apply(self, key, live, wanted, *, manager, force):
        """Return what is to be kept once `manager` has applied `wanted` over `live` (None: nothing)."""
        live = copy.deepcopy(live or {})
        owners = self.owners.setdefault(key, {})
        leaves, now = flatten(wanted), flatten(live)
        others = {path: name for name, paths in owners.items() if name != manager for path in paths}
        conflicts = {path: others[path] for path in leaves if path in others and now.get(path) != leaves[path]}
        if conflicts and not force:
            raise ConflictsError(conflicts)
        for paths in owners.values():
            paths.difference_update(conflicts)
        dropped = owners.get(manager, set()) - leaves.keys() - others.keys()
        owners[manager] = set(leaves)
        for path in dropped:
            remove(live, path)
        return prune(default(merge(live, wanted)))

    def update(self, key, live, new, *, manager):
        """Return what is to be kept once `manager` has written all of an object back; it owns what it changed."""
        owners = self.owners.setdefault(key, {})
        leaves, now = flatten(new), flatten(live or {})
        changed = {path for path in leaves.keys() | now.keys() if leaves.get(path) != now.get(path)}
        for paths in owners.values():
            paths.difference_update(changed)
        owners.setdefault(manager, set()).update(changed & leaves.keys())
        return prune(default(copy.deepcopy(new)))


def write_as_operator(job):
    """Return a job as KubeRay writes it back to add its finalizer."""
    job = copy.deepcopy(job)
    job["metadata"]["finalizers"] = [FINALIZER]
    for group in job["spec"]["rayClusterSpec"]["workerGroupSpecs"]:
        group["scaleStrategy"] = {}
    return {**job, "spec": as_go_writes(job["spec"])}


def as_go_writes(value, key=""):
    """Return a value as it comes out of a struct of Go's."""
    if isinstance(value, dict):
        made = {name: as_go_writes(inner, name) for name, inner in value.items()}
        return {name: inner for name, inner in made.items() if inner != [] or name == "args"}
    if isinstance(value, list):
        return [as_go_writes(inner) for inner in value]
    return make_canonical(value) if key in _QUANTITIES else value


def make_canonical(quantity):
    """Return a quantity as Kubernetes writes it: `1024Mi` is `1Gi`, `1000m` is `1`."""
    number, unit = re.fullmatch(r"(\d+)(.*)", quantity).groups()
    number, units = int(number), ["Ki", "Mi", "Gi", "Ti"]
    while unit in units[:-1] and number % 1024 == 0:
        number, unit = number // 1024, units[units.index(unit) + 1]
    if unit == "m" and number % 1000 == 0:
        number, unit = number // 1000, ""
    return f"{number}{unit}"


def default(obj):
    """Fill in what the CRD's defaults say."""
    if obj.get("kind") == "RayJob":
        spec = obj["spec"]
        spec.setdefault("backoffLimit", 0)
        spec.setdefault("ttlSecondsAfterFinished", 0)
        for group in spec["rayClusterSpec"]["workerGroupSpecs"]:
            group.setdefault("numOfHosts", 1)
    return obj


def prune(obj):
    """Drop what the server does not keep."""
    if obj.get("kind") == "PriorityClass" and obj.get("globalDefault") is False:
        del obj["globalDefault"]
    return obj


def flatten(value, path=()):
    """Return {path: value} of the fields that can be owned one by one."""
    if isinstance(value, dict) and value:
        leaves = {}
        for name, inner in value.items():
            if (*path, name) not in _UNOWNED:
                leaves |= flatten(inner, (*path, name))
        return leaves
    if isinstance(value, list) and value and path[-1] in KEYS:
        leaves = {}
        for item in value:
            leaves |= flatten(item, (*path, f"[{item[KEYS[path[-1]]]}]"))
        return leaves
    return {path: value}


def merge(live, wanted, name=""):
    """Return `live` with what is wanted."""
    if isinstance(live, dict) and isinstance(wanted, dict):
        return {**live, **{key: merge(live.get(key), inner, key) for key, inner in wanted.items()}}
    if isinstance(live, list) and isinstance(wanted, list) and name in KEYS:
        kept = {item[KEYS[name]]: item for item in live}
        for item in wanted:
            kept[item[KEYS[name]]] = merge(kept.get(item[KEYS[name]]), item)
        return list(kept.values())
    return copy.deepcopy(wanted)


def remove(obj, path):
    """Take a field out, where it still is."""
    for name in path[:-1]:
        if isinstance(obj, list):
            obj = next((item for item in obj if f"[{next(iter(item.values()))}]" == name), None)
        else:
            obj = obj.get(name) if isinstance(obj, dict) else None
        if obj is None:
            return
    if isinstance(obj, dict):
        obj.pop(path[-1], None)


def show(path):
    """Return a path as the server writes it."""
    return "".join(part if part.startswith("[") else f".{part}" for part in path)


def find_keys(value):
    """Yield every field's path."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        name = f"[{key}]" if isinstance(key, int) else f".{key}"
        yield key, name
        yield from ((found, name + rest) for found, rest in find_keys(inner))

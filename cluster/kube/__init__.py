"""A configuration, described for Kubernetes (KubeRay) or a tool that rents nodes; `apply.py` alone talks to anybody."""

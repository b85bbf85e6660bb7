"""A configuration, described for Kubernetes (KubeRay) or a tool that rents nodes; `server.py` alone talks to one."""

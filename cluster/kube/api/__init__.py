"""Jobs on a Kubernetes cluster, through its API server."""

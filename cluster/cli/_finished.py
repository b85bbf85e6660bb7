"""A run that is finished: said before anything is started for it, wherever its storage can be asked from here."""

import sys
import threading
from collections.abc import Mapping

from cluster.cli._runs import print_json
from elastic.config import RunConfig
from elastic.errors import SolventError
from elastic.storage import is_url, join_url

LOOK_S = 10.0
"""A store that has not answered by then is asked by the run itself."""
_CREDENTIALS = {
    "s3": ("AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE"),
    "gs": ("GOOGLE_SERVICE_ACCOUNT", "GOOGLE_SERVICE_ACCOUNT_PATH", "GOOGLE_APPLICATION_CREDENTIALS"),
    "az": ("AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_SAS_KEY", "AZURE_STORAGE_CLIENT_ID", "AZURE_CLIENT_ID"),
}
"""What lets a machine into a store by its environment, as obstore reads it. Who submits may have none of it."""


def tell_finished(config: RunConfig, reason: str, *, json: bool) -> None:
    """Print the one line."""
    print(f"finished: {reason}", file=sys.stderr if json else sys.stdout)
    if json:
        print_json({"run": join_url(config.storage, config.run), "end": "finished", "reason": reason})


def find_finished_elsewhere(config: RunConfig, env: Mapping[str, str], *, limit_s: float = LOOK_S) -> str:
    """Return why nothing need be submitted; empty if there is something left to train, or nobody here can say.

    A path is another one where the run is trained; a URL is the same everywhere. What this machine may not see, or sees
    otherwise, is for the run itself to tell.
    """
    scheme = config.storage.partition("://")[0]
    if not is_url(config.storage) or not any(env.get(name) for name in _CREDENTIALS.get(scheme, ())):
        return ""
    found: list[str] = []

    def look() -> None:
        from elastic.checkpoint.restore.past import describe_finished, look_back

        try:
            found.append(describe_finished(config, look_back(config)))
        except SolventError:  # the run says it, where it can be mended
            return

    thread = threading.Thread(target=look, name="look-back", daemon=True)
    thread.start()
    thread.join(limit_s)
    return found[0] if found else ""

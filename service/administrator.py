"""The administration of a server, from Python: what serves, and changes of it, each one call.

Before: `service/client.py` speaks HTTP. Unlike inspections, changes are never sent twice: whoever gets no answer looks
at what serves before trying again.
"""

from service.client import Client, read_answer
from service.schemas import (
    AdminLinesAnswer,
    BundleAnswer,
    BundlesAnswer,
    ChangedBundleAnswer,
    ChangedLineAnswer,
    DisagreementsAnswer,
    RescanAnswer,
)

# A version is read, warmed and proved before the answer comes.
DEFAULT_TIMEOUT_S = 300.0


class Administrator:
    """Asks the administration port; every method raises `service.client.ClientFault` where it is refused.

    Args:
        client: with the address of the administration and a key for it.
        timeout_s: for one change.
    """

    def __init__(self, client: Client, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        self._client = client
        self._timeout_s = timeout_s

    def lines(self) -> AdminLinesAnswer:
        """Tell how every line stands and what serves it."""
        return read_answer(AdminLinesAnswer, self._ask("GET", "/v1/lines"))

    def bundles(self) -> BundlesAnswer:
        """List every bundle with its versions."""
        return read_answer(BundlesAnswer, self._ask("GET", "/v1/bundles"))

    def bundle(self, bundle: str) -> BundleAnswer:
        """List the versions of one bundle."""
        return read_answer(BundleAnswer, self._ask("GET", f"/v1/bundles/{bundle}"))

    def activate(self, bundle: str, version: str) -> ChangedBundleAnswer:
        """Prove a version beside the live one, and make it live."""
        return read_answer(ChangedBundleAnswer, self._ask("POST", f"/v1/bundles/{bundle}/activate", version=version))

    def roll_back(self, bundle: str) -> ChangedBundleAnswer:
        """Make the version live that was live before."""
        return read_answer(ChangedBundleAnswer, self._ask("POST", f"/v1/bundles/{bundle}/roll-back"))

    def start_shadow(self, bundle: str, version: str) -> BundleAnswer:
        """Let a version look on and answer nobody."""
        return read_answer(BundleAnswer, self._ask("PUT", f"/v1/bundles/{bundle}/shadow", version=version))

    def stop_shadow(self, bundle: str) -> BundleAnswer:
        """Let no version look on any more."""
        return read_answer(BundleAnswer, self._ask("DELETE", f"/v1/bundles/{bundle}/shadow"))

    def disagreements(self, line: str) -> DisagreementsAnswer:
        """List frames on which the shadow would have said something else."""
        return read_answer(DisagreementsAnswer, self._ask("GET", f"/v1/lines/{line}/disagreements"))

    def activate_policy(self, line: str, version: str) -> ChangedLineAnswer:
        """Judge a line by another of its policies."""
        return read_answer(ChangedLineAnswer, self._ask("POST", f"/v1/lines/{line}/policy", version=version))

    def load(self, line: str) -> ChangedLineAnswer:
        """Serve a line again, or take the newest version that may become live."""
        return read_answer(ChangedLineAnswer, self._ask("POST", f"/v1/lines/{line}/load"))

    def unload(self, line: str) -> ChangedLineAnswer:
        """Serve a line no longer."""
        return read_answer(ChangedLineAnswer, self._ask("POST", f"/v1/lines/{line}/unload"))

    def rescan(self) -> RescanAnswer:
        """Have the store looked at now."""
        return read_answer(RescanAnswer, self._ask("POST", "/v1/rescan"))

    def _ask(self, method: str, path: str, **parameters: str) -> bytes:
        return self._client.ask(method, path, timeout_s=self._timeout_s, **parameters)

"""Which versions stay in memory, and how they leave it: to make room, to be replaced, or with the process.

What leaves is taken out of what may be asked for first, and closed once the last of its frames is answered. `memory.py`
chooses who makes room. `tend`, `drain` and `close` belong where the event loop runs.
"""

import logging
from collections.abc import Iterable
from dataclasses import replace

from service.contract.bundle import MODEL_FILE
from service.errors import BundleNotLoaded
from service.heap import held_bytes
from service.lines.ledger import named
from service.lines.live import LineStatus, LoadedVersion, VersionKey
from service.lines.memory import Resident, make_room
from service.lines.served import State
from service.lines.wanted import WantedVersions
from service.scheduling.batcher import Batcher

_log = logging.getLogger("flawline")


class ResidentVersions(WantedVersions):
    """The versions in memory."""

    # What belongs where the event loop runs.

    def tend(self) -> None:
        """Close what was replaced, as soon as the last of its frames is answered."""
        for version in list(self._retired):
            if version.bundle.batcher.is_idle:
                self._retired.remove(version)
                self._closed_bytes += version.bundle.engine.size_bytes
                try:
                    version.bundle.batcher.close()
                    version.bundle.engine.close()
                except Exception:  # noqa: BLE001 - the edge: whoever tends looks for lost engines too, and must go on
                    _log.exception("an engine could not be closed", extra=named(version.key))
                else:
                    _log.info("version closed", extra=named(version.key))

    async def drain(self) -> None:
        """Admit nothing more, and return when all that was admitted is answered."""
        batchers = self._batchers()
        for batcher in batchers:
            batcher.stop_admitting()
        for batcher in batchers:
            await batcher.drain()

    def close(self) -> None:
        """End every runner; to be called where the event loop runs."""
        for batcher in self._batchers():
            batcher.close()

    def _batchers(self) -> list[Batcher]:
        return [version.bundle.batcher for version in (*self._state.loaded.values(), *self._retired)]

    # What leaves.

    def _become(self, state: State) -> None:
        """Serve what a state says, and tell no more of the lines that nothing serves then."""
        left = self._state.live.keys() - state.live.keys()
        self._state = state
        for line in sorted(left):
            self._telemetry.line_leaves(line)

    def _end_shadow(self, name: str) -> None:
        if name in self._state.shadows:
            shadows = {known: version for known, version in self._state.shadows.items() if known != name}
            self._state = replace(self._state, shadows=shadows)
            _log.info("shadow off", extra={"bundle": name})

    def _keep_only_what_is_needed(self, name: str) -> None:
        """Retire the versions of a bundle that are not live, kept or in the shadow; what is gone is not kept."""
        history, shadow = self._history(name), self._state.shadows.get(name)
        gone = self._gone_of(name)
        history.live = live = [one for one in history.live[:-1] if one not in gone] + history.live[-1:]
        kept = set(live[-2:] if self._options.keeps_previous else live[-1:])
        if shadow is not None:
            kept.add(shadow.key.version)
        self._retire(key for key in self._state.loaded if key.name == name and key.version not in kept)

    def _retire(self, keys: Iterable[VersionKey]) -> None:
        """Take versions out of what may be asked for; they are closed when their last frame is answered."""
        leaving = set(keys)
        state = self._state
        self._state = replace(
            state, loaded={key: version for key, version in state.loaded.items() if key not in leaving}
        )
        for key in leaving:
            self._used_at.pop(key, None)
            self._retired.append(state.loaded[key])
            self._telemetry.engine_closed(*running(state.loaded[key]))

    def _unload(self, keys: Iterable[VersionKey]) -> None:
        """Unload engines whose lines are loaded again as soon as somebody asks for them."""
        for key in keys:
            state = self._state
            lines = {line: serving for line, serving in state.live.items() if serving.key == key}
            reason = "The line makes room for others; it is loaded as soon as a frame comes."
            absent = {
                line: LineStatus(line, key.name, "unloaded", reason, None, serving.card)
                for line, serving in lines.items()
            }
            live = {line: serving for line, serving in state.live.items() if line not in lines}
            shadows = {name: version for name, version in state.shadows.items() if version.key != key}
            self._become(replace(state, live=live, not_live={**state.not_live, **absent}, shadows=shadows))
            self._retire((key,))
            self._telemetry.engine_unloaded(key.name)
            _log.info("engine unloaded for others", extra=named(key))

    # Room.

    def _make_room_for(self, key: VersionKey) -> None:
        """Unload what has to make room for a version, by what its file promises of its size."""
        if self._options.budget_bytes is None:
            return
        file = self._catalogue.folder(*key) / MODEL_FILE
        try:
            file_bytes = file.stat().st_size
        except OSError:  # whoever loads it says what is wrong
            return
        expected = self._sizes.expect(self._networks.get(key), file_bytes)
        self._unload(make_room(self._residents(key.name), self._options.budget_bytes, expected) or ())

    def _refuse_too_large(self, loaded: LoadedVersion) -> None:
        """Unload what has to make room for an engine whose size is known by now.

        Raises:
            BundleNotLoaded: if there can't be room.
        """
        if self._options.budget_bytes is None:
            return
        size = loaded.bundle.engine.size_bytes
        leaving = make_room(self._residents(loaded.key.name), self._options.budget_bytes, size)
        if leaving is None:
            live = {serving.key for serving in self._state.live.values()}
            away = sorted(key.name for key in live if not self._catalogue.is_here(*key))
            raise BundleNotLoaded(
                f"Its engine takes {size} bytes, and the memory budget has no room for it beside what must stay; raise "
                "FLAWLINE_MEMORY_BUDGET_BYTES, or pin fewer lines."
                + (f" What is not in the store stays as well: {', '.join(away)}." if away else "")
            )
        self._unload(leaving)

    def _residents(self, name: str) -> list[Resident]:
        """Return what is loaded.

        The live version of a bundle stays while another one of it is prepared, and where it could not come back.
        """
        state = self._state
        live = {s.key for s in state.live.values()}
        return [
            Resident(
                key=key,
                size_bytes=version.bundle.engine.size_bytes,
                used_at=self._used_at.get(key, 0.0),
                is_live=key in live,
                is_pinned=(key in live and (key.name == name or not self._catalogue.is_here(*key)))
                or not self._options.pinned.isdisjoint(version.lines),
            )
            for key, version in state.loaded.items()
        ]

    def _weigh(self, loaded: LoadedVersion, held_before: int | None, closed_before: int) -> None:
        """Have an engine that was just loaded say what that took, where it can be seen."""
        held = self._held_bytes()
        if held is None or held_before is None:
            return
        bundle = loaded.bundle
        network = bundle.manifest.files[MODEL_FILE]
        grown, closed = held - held_before, self._closed_bytes - closed_before
        try:
            file_bytes = (self._catalogue.folder(*loaded.key) / MODEL_FILE).stat().st_size
        except OSError:  # it was removed meanwhile
            file_bytes = bundle.engine.size_bytes
        self._networks[loaded.key] = network
        bundle.engine.size_bytes = self._sizes.learn(network, file_bytes, bundle.engine.size_bytes, grown, closed)

    def _held_bytes(self) -> int | None:
        return held_bytes() if self._options.weighs_engines else None


def running(version: LoadedVersion) -> tuple[str, str, str, str, str]:
    """Return the labels of a version in memory."""
    bundle = version.bundle
    return *version.key, bundle.device, bundle.provider, bundle.precision

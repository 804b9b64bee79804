"""What the loopback Hub keeps of Spaces beside their files; nothing is built or run."""

import json
from typing import Any


class Spaces:
    """Routes of `loopback`'s handler."""

    hub: Any
    body: bytes
    account: Any

    def variables(self, id: str) -> None:
        kept = self.hub.writable(id, self.account).variables
        if self.command == "POST":
            asked = json.loads(self.body)
            kept[asked["key"]] = asked["value"]
        self.send_json({key: {"value": value} for key, value in kept.items()})

    def space_secrets(self, id: str) -> None:
        kept = self.hub.writable(id, self.account).secrets
        if self.command == "POST":
            asked = json.loads(self.body)
            kept[asked["key"]] = asked["value"]
        self.send_json({key: {} for key in kept})

    def hardware(self, id: str) -> None:
        self.hub.writable(id, self.account).hardware = json.loads(self.body)["flavor"]
        self.runtime(id)

    def runtime(self, id: str) -> None:
        repository = self.hub.readable(id, self.account)
        started = "app.py" in repository.commits[repository.branches["main"]]
        stage = "BUILDING" if started else "NO_APP_FILE"
        hardware = {"current": None, "requested": repository.hardware}
        self.send_json({"stage": stage, "hardware": hardware})

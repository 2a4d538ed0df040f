"""An account as one meets it on a working day: webhooks that take everything, one that fails, one that is paused."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from stage import Stage, until

from dispatcher.core.catalogue import Catalogue

ODD_DATA = '{"name": "Zoe \u202egnp.exe", "html": "<script>alert(1)</script>", "n": 1.0, "emoji": "\U0001f600"}'


@dataclasses.dataclass
class Scene:
    """What there is to look at."""

    good: dict[str, Any]
    failing: dict[str, Any]
    paused: dict[str, Any]
    delivered: str
    retrying: str
    event: str
    discarded: str

    def pages(self) -> dict[str, str]:
        """Every page by a name for its picture."""
        return {
            "overview": "/",
            "webhooks": "/webhooks",
            "webhook-edit": f"/webhooks/{self.paused['id']}/edit",
            "webhook": f"/webhooks/{self.good['id']}",
            "webhook-failing": f"/webhooks/{self.failing['id']}",
            "webhook-log": f"/webhooks/{self.failing['id']}/deliveries",
            "webhook-test": f"/webhooks/{self.good['id']}/test",
            "webhook-replay": f"/webhooks/{self.good['id']}/replay",
            "webhook-rotate": f"/webhooks/{self.good['id']}/rotate",
            "delivery": f"/deliveries/{self.retrying}",
            "delivery-done": f"/deliveries/{self.delivered}",
            "events": "/events",
            "event": f"/events/{self.event}",
            "event-discarded": f"/events/{self.discarded}",
            "event-types": "/event-types",
            "event-type": "/event-types/email.bounced",
            "error": "/webhooks/wh_none",
        }


async def build(stage: Stage) -> Scene:
    """Make it happen, for real."""
    stage.subscriber.answers["/crm/hooks"] = (503, b'{"error": "database is locked", "retry": true}')
    good = await stage.webhook("/ok/app", description="Product database")
    failing = await stage.webhook(
        "/crm/hooks", events=["email.bounced", "email.complained"], retry=["1s", "10m", "1h"], description="CRM"
    )
    paused = await stage.webhook("/ok/warehouse", events=["email.*"], description="Warehouse, moving house")
    await stage.api("POST", f"/webhooks/{paused['id']}/pause")
    bounced = Catalogue.builtin().get("email.bounced")
    assert bounced is not None
    event = await stage.emit(bounced.name, json.dumps(bounced.sample))
    delivered = await stage.delivery(good["id"], "delivered", event)
    retrying = await stage.delivery(failing["id"], "retrying", event)

    async def twice() -> bool:
        return bool((await stage.api("GET", f"/deliveries/{retrying['id']}"))["attempts"][1:])

    async def seen() -> bool:
        return bool((await stage.api("GET", f"/events/{discarded}"))["reason"])

    await until(twice, "a second attempt")
    for kind in [*Catalogue.builtin()] * 3:
        await stage.emit(kind.name, json.dumps(kind.sample))
    await stage.emit("crm.note_added", ODD_DATA)
    discarded = await stage.emit("email.sent", '{"n": 9007199254740993}')
    await until(seen, "the event to be discarded")
    return Scene(good, failing, paused, delivered["id"], retrying["id"], event, discarded)

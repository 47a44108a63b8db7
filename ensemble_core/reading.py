"""From requests to sequences, beside the engine: what refuses cheaply comes first, forms and prompts after it.

Knows admission, permissions, the roster and the workshop; does not know the engine or its thread.
"""

from __future__ import annotations

import asyncio
from collections import abc
from collections.abc import Callable
from typing import TypeVar

from ensemble_core.admission import Admission
from ensemble_core.assembly import Loaded
from ensemble_core.decoding.requests import GenerationRequest
from ensemble_core.decoding.sequence import Sequence
from ensemble_core.decoding.workshop import Workshop
from ensemble_core.members.loading.standstill import DEFAULT_DTYPE
from ensemble_core.roster import Roster

Found = TypeVar("Found")


async def read(
    requests: abc.Sequence[GenerationRequest], loaded: Loaded, roster: Roster, workshop: Workshop
) -> list[Sequence]:
    """A sequence for each request, all or none.

    Raises whatever refuses them: permissions, MemberAwayError, what cannot be served, forms, prompts, in this order.
    """
    leaders = list({each.group or each.request_id: each for each in requests}.values())  # choices choose the same
    for request in leaders:
        loaded.permissions.check(request.model, request.overrides)
    await asyncio.to_thread(_undisturbed, lambda asked: _require_members(asked, loaded.admission, roster), leaders)
    for grammars, form in await asyncio.to_thread(_undisturbed, loaded.admission.forms, leaders):
        await workshop.prepare(grammars, form)
    return await asyncio.to_thread(_undisturbed, loaded.admission.admit_all, requests)


def _require_members(requests: abc.Sequence[GenerationRequest], admission: Admission, roster: Roster) -> None:
    """Raise MemberAwayError where a request asks for a member that is away. It is asked again once it is queued."""
    for request in requests:
        roster.require(request.model, admission.members_of(request), within=request.reserved)


def _undisturbed(
    read: Callable[[abc.Sequence[GenerationRequest]], Found], requests: abc.Sequence[GenerationRequest]
) -> Found:
    """Read requests while no model is being made: one may choose a fusion that is built now."""
    with DEFAULT_DTYPE.computing():
        return read(requests)

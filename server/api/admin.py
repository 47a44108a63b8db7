"""The admin's endpoints: members and recipes that come and go. They exist only with `server.admin_keys`.

An answer comes when the change is made. Nothing here knows how a change is made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import APIRouter, Depends, Request
from starlette.exceptions import HTTPException

from server.api.routes import card_of
from server.api.services import REFUSALS, ServicesOf
from server.edge.auth import ADMIN, ADMIN_PATH
from server.edge.bodies import BodyRoute
from server.schema.admin import (
    AdminBody,
    Deleted,
    LeaveBody,
    LoadBody,
    MemberCard,
    MemberCards,
    RecipeBody,
    RecipeCard,
    SleepBody,
)

if TYPE_CHECKING:
    from ensemble_core.runtime import MemberReport


async def _admins_only(request: Request) -> None:
    """The gate has seen an admin's key; without a gate nobody comes in."""
    if not request.scope.get(ADMIN):
        raise HTTPException(404)


router = APIRouter(
    prefix=ADMIN_PATH,
    responses=REFUSALS,
    route_class=BodyRoute,
    dependencies=[Depends(_admins_only)],
    tags=["admin"],
)


@router.get("/members")
async def list_members(services: ServicesOf) -> MemberCards:
    """Every declared member: how it stands, its memory, and who uses it."""
    report = await services.runtime.changes.report()
    return MemberCards(
        data=[_card(member) for member in report.members], rss_bytes=report.resident, change=report.change
    )


@router.post("/members/{name}/load")
async def load_member(name: str, services: ServicesOf, body: LoadBody | None = None) -> MemberCard:
    """Load a declared member again, or declare one. A member that is there stays as it is."""
    section = None if body is None else body.member
    return _card(await services.runtime.changes.load(name, section))


@router.post("/members/{name}/unload")
async def unload_member(name: str, services: ServicesOf, body: LeaveBody | None = None) -> MemberCard:
    """Give back a member's weights and cache, once the requests that use it have ended."""
    leave = body or LeaveBody()
    return _card(await services.runtime.changes.unload(name, leave.drain_seconds, force=leave.force))


@router.post("/members/{name}/sleep")
async def put_to_sleep(name: str, services: ServicesOf, body: SleepBody | None = None) -> MemberCard:
    """Give back a member's cache and keep its weights, in this machine's memory where they lie on a GPU."""
    leave = body or SleepBody()
    return _card(await services.runtime.changes.sleep(name, leave.drain_seconds, force=leave.force))


@router.post("/members/{name}/wake")
async def wake_member(name: str, services: ServicesOf, _body: AdminBody | None = None) -> MemberCard:
    """Bring back a member that sleeps. One that is awake stays as it is."""
    return _card(await services.runtime.changes.wake(name))


@router.post("/ensembles")
async def put_ensemble(body: RecipeBody, services: ServicesOf) -> RecipeCard:
    """Add a recipe, or replace the one of this name. It is checked as the YAML is."""
    replaced = await services.runtime.changes.put_recipe(body.name, body.recipe)
    model = next(model for model in services.runtime.models() if model.name == body.name)
    return RecipeCard(model=card_of(model, services), replaced=replaced)


@router.delete("/ensembles/{name}")
async def delete_ensemble(name: str, services: ServicesOf) -> Deleted:
    """Take a recipe away. Requests that it has begun go on to their ends."""
    await services.runtime.changes.delete_recipe(name)
    return Deleted(id=name)


def _card(member: MemberReport) -> MemberCard:
    return MemberCard(
        name=member.name,
        state=member.standing.state,
        since=member.standing.since,
        failure=member.standing.failure,
        model=member.model,
        device=member.device,
        memory_bytes=dict(member.memory),
        num_requests=member.num_requests,
        models=list(member.models),
    )

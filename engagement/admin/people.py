"""The page of a person, and the field that finds one, or a message."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette_admin.flash import flash
from starlette_admin.routing import route

from engagement._operating.masking import mask_address
from engagement._operating.person import Person, find_people
from engagement._operating.timeline import timeline
from engagement.admin.shown import Page, message_id_of, path_for
from engagement.messages import InvalidMessage
from engagement.messages.checks import id_typed
from engagement.models import EngagementMessage
from engagement.repository import EngagementMessageRepository

MESSAGES = 50


class PeoplePage(Page):
    """All messages of a person, how each stands, and the next one."""

    path = "/people"
    add_to_menu = False

    @route("", name="find")
    async def index(self, request: Request) -> Response:
        """Go to the message with this number or key, or to the people with this user id or address."""
        sought = request.query_params.get("q", "").strip()
        queue = self.shown.queue

        def look(session: Session) -> tuple[EngagementMessage | None, list[Person]]:
            repository = EngagementMessageRepository(session, schema=queue.schema)
            message = None
            with suppress(InvalidMessage):
                message = repository.get_message(id_typed(sought))
            message = message or repository.get_message_by_key(sought)
            return message, find_people(session, sought, limit=MESSAGES, schema=queue.schema)

        message: EngagementMessage | None = None
        people: list[Person] = []
        with suppress(InvalidMessage):
            message, people = await queue.run(look, if_too_long="Look for a user id, or a message's number or key.")
        # Where users have numbers too, it may name both.
        if message is not None and all(person.user_id != sought for person in people):
            return RedirectResponse(path_for(request, "message", message_id=message.id), 303)
        if not people:
            flash(request, "No message has this number or key, and nobody this user id or address.", "warning")
            return RedirectResponse(path_for(request, "messages"), 303)
        return await self._show(request, people, message)

    @route("/{message_id}", name="person")
    async def person(self, request: Request) -> Response:
        """Show the person that a message is for. So no address of a page holds a user id."""
        sought, schema = str(message_id_of(request)), self.shown.queue.schema

        def look(session: Session) -> list[Person]:
            message = EngagementMessageRepository(session, schema=schema).get_message(int(sought))
            return [] if message is None else find_people(session, message.user_id, limit=MESSAGES, schema=schema)

        if not (people := await self.shown.queue.run(look)):
            raise HTTPException(404, "There is no such message.")
        return await self._show(request, people, None)

    async def _show(self, request: Request, people: Sequence[Person], message: EngagementMessage | None) -> Response:
        reveals = await self.shown.reveals(request)
        if reveals:
            self.log(request, "reveal", "revealed", *(each.id for person in people for each in person.latest))
        return await self.render(
            request,
            "people.html",
            people=people,
            message=message,
            stands=await run_in_threadpool(self._stands, people, reveal=reveals),
            mask=mask_address,
            pseudonym=self.shown.pseudonym,
        )

    def _stands(self, people: Sequence[Person], *, reveal: bool) -> dict[int, str]:
        """Return how each message stands, in a sentence, by its number."""
        return {
            message.id: self.shown.stands(message, timeline(message, reveal=reveal), person.now)
            for person in people
            for message in (*person.latest, *([person.upcoming] if person.upcoming else []))
        }

"""The page of the pauses: each with its reason and a button that lifts it, and a form for another one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sqlalchemy.orm import Session
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette_admin.flash import flash
from starlette_admin.routing import route

from engagement._logging import logger
from engagement._operating.pauses import named
from engagement.admin.actions import moment_typed
from engagement.admin.shown import Page, path_for
from engagement.messages import InvalidMessage
from engagement.pausing import Pauses

_FIELDS = {"reason": "The reason", "message_type": "The type", "sender": "The sender", "until": "The time"}
"""The page's names for the fields of the form."""


class PausesPage(Page):
    """The pauses, and the forms that make and lift them."""

    menu_label = "Pauses"
    path = "/pauses"

    @route("", name="pauses")
    async def index(self, request: Request) -> Response:
        """Show the pauses in force."""
        return await self._page(request, {})

    @route("", methods=["POST"], name="pause")
    async def pause(self, request: Request) -> Response:
        """Pause the type or the sender of the form, or everything, and show it."""
        form = await self._form(request)

        def pause(pauses: Pauses) -> str:
            until = moment_typed("until", form.get("until"), self.shown.tz)
            made = pauses.pause(form.get("reason", ""), **_scope(form), until=until, by=request.state.operator)
            return named(made)

        try:
            paused = await self._run(pause, if_too_long="Nothing was paused. Try again.")
        except InvalidMessage as error:
            page = await self._page(request, form, f"{_FIELDS.get(error.field, error.field)} {error.problem}.")
            page.status_code = 422
            return page
        return self._done(request, "pause", "paused", f"Paused: {paused}.")

    @route("/resume", methods=["POST"], name="resume")
    async def resume(self, request: Request) -> Response:
        """Lift the pause that the form names, and show the others."""
        form = await self._form(request)
        try:
            was_paused = await self._run(
                lambda pauses: pauses.resume(**_scope(form)), if_too_long="Nothing was resumed. Try again."
            )
        except InvalidMessage:
            raise HTTPException(422, "There is no such pause.") from None
        if was_paused:
            return self._done(request, "resume", "resumed", "Resumed: what is due is sent.")
        return self._done(request, "resume", "not_paused", "It was not paused any more.", "warning")

    async def _page(self, request: Request, form: Mapping[str, str], problem: str | None = None) -> Response:
        pauses = await self._run(Pauses.in_force)
        may_act = await self.shown.may_act(request)
        return await self.render(request, "pauses.html", pauses=pauses, form=form, problem=problem, may_act=may_act)

    async def _run(self, work: Callable[[Pauses], Any], *, if_too_long: str = "Try again.") -> Any:
        queue = self.shown.queue

        def on_session(session: Session) -> Any:
            return work(Pauses(session, schema=queue.schema))

        return await queue.run(on_session, if_too_long=if_too_long)

    async def _form(self, request: Request) -> dict[str, str]:
        if not await self.shown.may_act(request):
            raise HTTPException(403, "You may look, and not act.")
        return {name: str(value).strip() for name, value in (await request.form()).items()}

    def _done(self, request: Request, action: str, verdict: str, sentence: str, kind: str = "success") -> Response:
        logger.info("engagement.admin action=%s verdict=%s by=%r", action, verdict, request.state.operator)
        flash(request, sentence, kind)
        return RedirectResponse(path_for(request, "pauses"), 303)


def _scope(form: Mapping[str, str]) -> dict[str, str | None]:
    return {"message_type": form.get("type") or None, "sender": form.get("sender") or None}

"""The page of the suppression list: its entries, one address, and the question before a change."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import urlencode

from sqlalchemy.orm import Session
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette_admin.flash import flash
from starlette_admin.routing import route

from engagement._operating.masking import mask_address
from engagement._operating.suppressed import Entries, list_suppressed
from engagement.admin.shown import Page, path_for
from engagement.admin.suppressing import DEEDS, Asked, Deed, Given, find_asked, longest_reason, perform
from engagement.messages import InvalidMessage, Suppressed, address_hash
from engagement.messages.checks import checked_address, id_typed

PAGE = 50


class SuppressionsPage(Page):
    """The addresses that nothing is sent to. Only their hashes are known, which a list shows as pseudonyms."""

    menu_label = "Suppressed"
    path = "/suppressed"

    @route("", name="suppressed")
    async def index(self, request: Request) -> Response:
        """Show the entry of the address that was typed, or else the newest entries, a page at a time."""
        asked = request.query_params
        try:
            if asked.get("address", "").strip():
                return await self._one(request, _address_typed(asked))
            return await self._list(request, _skip_typed(asked))
        except InvalidMessage as error:
            return await self._render(request, problem=f"{_FIELDS[error.field]} {error.problem}.")

    async def _one(self, request: Request, address: str) -> Response:
        found = await self._find(address)
        if found.entry is not None and await self.shown.reveals(request):
            self.log(request, "reveal", "revealed", self._entry_of(address), of="entry")
        return await self._render(request, found=found)

    async def _list(self, request: Request, skip: int) -> Response:
        schema, reveals = self.shown.queue.schema, await self.shown.reveals(request)

        def look(session: Session) -> Entries:
            return list_suppressed(session, skip=skip, limit=PAGE, schema=schema)

        page = await self.shown.queue.run(look, if_too_long="Look for one address, or try again.")
        until = skip + len(page.entries)
        if page.entries and reveals:
            names = [self.shown.pseudonym(entry.address_hash) for entry in page.entries]
            self.log(request, "reveal", "revealed", *names, of="entry")
        return await self._render(
            request,
            page=page,
            skip=skip,
            newer=_page_link(max(skip - PAGE, 0), reveals=reveals) if skip else None,
            older=_page_link(until, reveals=reveals) if page.entries and until < page.count else None,
        )

    async def _render(self, request: Request, **shown: object) -> Response:
        nothing = {"problem": None, "found": None, "page": None}
        may_act = await self.shown.may_act(request)
        context = {"mask": mask_address, "pseudonym": self.shown.pseudonym, "may_act": may_act}
        return await self.render(request, "suppressed.html", **nothing | context | shown)

    @route("/{deed}", name="ask_suppression")
    async def ask(self, request: Request) -> Response:
        """Ask before an address is put onto the list or taken off."""
        deed = await self._deed(request)
        return await self._question(request, deed, await self._find(_named(request.query_params)))

    @route("/{deed}", methods=["POST"], name="change_suppression")
    async def act(self, request: Request) -> Response:
        """Do it, and show the answer on the message's page or above the list."""
        deed, form = await self._deed(request), await request.form()
        named, by, schema = _named(form), request.state.operator, self.shown.queue.schema
        given = Given(form=form, by=by, tz=self.shown.tz, seal=self._seal)
        try:
            answer = await self.shown.queue.run(
                lambda session: perform(session, deed, named, given, schema), if_too_long="Nothing was done. Try again."
            )
        except InvalidMessage as error:
            problem = f"{_FIELDS[error.field]} {error.problem}."
            page = await self._question(request, deed, await self._find(named), problem, form)
            page.status_code = 422
            return page
        except HTTPException:
            self._log_deed(request, deed, "failed", named)
            raise
        self._log_deed(request, deed, answer.word, named)
        flash(request, answer.sentence, "success" if answer.is_done else "warning")
        if isinstance(named, int) and answer.word != "not_found":
            return RedirectResponse(path_for(request, "message", message_id=named), 303)
        return RedirectResponse(path_for(request, "suppressed"), 303)

    async def _question(
        self,
        request: Request,
        deed: Deed,
        asked: Asked,
        problem: str | None = None,
        filled: Mapping[str, object] | None = None,
    ) -> Response:
        return await self.render(
            request,
            "suppress.html",
            deed=deed,
            asked=asked,
            fits=deed in asked.deeds,
            seal=self._seal(asked.entry),
            mask=mask_address,
            longest_reason=longest_reason(request.state.operator),
            problem=problem,
            filled=filled or {},
        )

    async def _deed(self, request: Request) -> Deed:
        deed = DEEDS.get(request.path_params["deed"])
        if deed is None:
            raise HTTPException(404, "There is no such action.")
        await self.check_may_act(request)
        return deed

    async def _find(self, named: int | str) -> Asked:
        schema = self.shown.queue.schema
        try:
            asked = await self.shown.queue.run(lambda session: find_asked(session, named, schema))
        except InvalidMessage as error:  # A row that was written by hand may hold any text.
            raise HTTPException(404, f"{_FIELDS[error.field]} {error.problem}.") from None
        if asked is None:
            raise HTTPException(404, "There is no such message.")
        return asked

    def _log_deed(self, request: Request, deed: Deed, verdict: str, named: int | str) -> None:
        of, subject = ("message_id", named) if isinstance(named, int) else ("entry", self._entry_of(named))
        self.log(request, deed.name, verdict, subject, of=of)

    def _entry_of(self, address: str) -> str:
        """Return the name of an address's entry, as the list shows it."""
        return self.shown.pseudonym(address_hash(address))

    def _seal(self, entry: Suppressed | None) -> str:
        return "none" if entry is None else self.shown.pseudonym(f"{entry.since} {entry.until} {entry.reason}")


_FIELDS = {"address": "The address", "reason": "The reason", "until": "The end", "skip": "The number of newer entries"}
"""The page's names for the fields of its forms."""


def _named(asked: Mapping[str, object]) -> int | str:
    """Return the number of a message, or an address, that a link or a form is about."""
    try:
        return id_typed(str(asked["message"])) if asked.get("message") else _address_typed(asked)
    except InvalidMessage as error:
        told = f"The address {error.problem}." if error.field == "address" else "There is no such message."
        raise HTTPException(404, told) from None


def _address_typed(asked: Mapping[str, object]) -> str:
    return checked_address(str(asked.get("address") or "").strip())


def _skip_typed(asked: Mapping[str, str]) -> int:
    try:
        return 0 if asked.get("skip", "0") in {"", "0"} else id_typed(asked["skip"])
    except InvalidMessage as error:
        raise InvalidMessage("skip", error.problem) from None


def _page_link(skip: int, *, reveals: bool) -> str:
    return f"?{urlencode({'skip': skip} | ({'reveal': 1} if reveals else {}))}"

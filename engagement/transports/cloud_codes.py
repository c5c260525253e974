"""Meta's error codes, and the proof in each.

From "Error codes" (support/error-codes) of Meta's WhatsApp Business Platform documentation, read as of 2026-09-11: all
codes that can answer a message. 131044, 131062 and 132008 are from pywa (`errors.py` of 2026-08-12), with which the
table was compared. The section "Graph API" is from that API's documentation, "Handling Errors"
(guides/error-handling) and "Rate Limits" (overview/rate-limiting). Meta asks to go by the code and not by the HTTP
status; see `Code.proof_with`.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from engagement.transports.client import Finding
from engagement.transports.http import Answer, Proof, what_it_proves


@dataclass(frozen=True, slots=True)
class Code:
    """An error code of Meta's, and its proof. `wait` holds if the answer names no wait of its own."""

    code: int
    means: str
    proof: Proof
    wait: timedelta | None = None
    last: int = 0
    """The last code of a range."""
    section: str = "other"
    """The section of Meta's "Error codes" page."""
    status: int = 400
    """The HTTP status that the page gives it, if that is a server error."""
    is_lasting: bool = False
    """Whether the code names a state of the sender that a person has to mend (an expired token). Nothing is sent in
    that state, so the code is proof with any status. With another code and a 5xx, one service may have failed after
    another one acted, so the message is in doubt. "Temporary" denies nothing: code 2 with HTTP 500 was seen to have
    posted (arsduo/koala#699).
    docs/decisions.md#2026-11-29--a-success-is-believed-with-its-body-and-temporary-is-no-denial"""

    def __contains__(self, code: object) -> bool:
        return isinstance(code, int) and self.code <= code <= (self.last or self.code)

    def proof_with(self, status: int) -> Proof:
        """Return the proof of the code with an HTTP status. Behind a 2xx, the status that Meta documents is assumed."""
        given = self.status if status < 300 else status  # noqa: PLR2004
        return self.proof if given < 500 or self.is_lasting else Proof.IN_DOUBT  # noqa: PLR2004


_ACCOUNT = timedelta(minutes=15)
"""How often a message tries whether a person has mended the account."""
_LIMIT = timedelta(minutes=1)
"""How often a message tries whether a limit has passed, if the answer names no time. Meta's windows last an hour, in
which three retries would be over, so a limit costs no retry."""


def _lasting(code: int, means: str, *, last: int = 0, section: str = "other", status: int = 400) -> Code:
    return Code(code, means, Proof.STOPPED, _ACCOUNT, last, section, status, is_lasting=True)


# `STOPPED`: the sender is at fault and not the message (a token, an account, a payment, a lasting limit of the account
# or app). The message is postponed. With `NotSent`, three failures would end it, and one expired token the whole queue.
# `WAIT`: a limit of seconds. It counts as a failure, as with any other provider.
# `LATER`: the account is at fault for some messages only (130497: people in one country).
# docs/decisions.md#2026-11-29--an-unknown-code-is-nobodys-end
CODES = (
    _lasting(0, "the app user could not be authenticated", section="authorization"),
    _lasting(3, "capability or permissions issue", section="authorization", status=500),
    _lasting(10, "permission not granted or removed", section="authorization"),
    _lasting(190, "the access token has expired", section="authorization"),
    _lasting(200, "no token, or no permission", last=299, section="authorization"),
    _lasting(368, "the account is restricted for a policy violation", section="integrity"),
    Code(130497, "the account may not message users in this country", Proof.LATER, section="integrity"),
    _lasting(131031, "the account is locked", section="integrity"),
    Code(4, "the app's call rate limit", Proof.STOPPED, _LIMIT, section="throttling"),
    Code(80007, "the account's rate limit", Proof.STOPPED, _LIMIT, section="throttling"),
    Code(130429, "the message throughput is reached", Proof.WAIT, timedelta(seconds=2), section="throttling"),
    Code(131048, "spam rate limit of this phone number", Proof.STOPPED, _ACCOUNT, section="throttling"),
    Code(131056, "too many messages to the same recipient", Proof.NOT_SENT, timedelta(minutes=1), section="throttling"),
    Code(131064, "messaging limit after template violations", Proof.STOPPED, _ACCOUNT, section="throttling"),
    Code(1, "invalid request or possible server error", Proof.IN_DOUBT),
    Code(2, "temporary downtime or overload", Proof.WAIT, timedelta(seconds=30), status=503),
    _lasting(33, "the business phone number has been deleted"),
    Code(100, "invalid parameter", Proof.REFUSED),
    Code(130403, "this business has blocked the user", Proof.REFUSED),
    Code(130472, "not sent as part of an experiment", Proof.REFUSED),
    Code(131000, "unknown error", Proof.IN_DOUBT, status=500),
    _lasting(131005, "permission not granted or removed"),
    Code(131008, "a required parameter is missing", Proof.REFUSED),
    Code(131009, "a parameter value is invalid", Proof.REFUSED),
    Code(131016, "a service is temporarily unavailable", Proof.WAIT, timedelta(seconds=30), status=500),
    Code(131021, "sender and recipient are the same", Proof.REFUSED),
    Code(131026, "undeliverable: no WhatsApp number, old version or terms not accepted", Proof.REFUSED),
    _lasting(131037, "the sender's display name is not approved"),
    _lasting(131042, "payment issue of the account"),
    _lasting(131044, "payment issue of the account"),
    _lasting(131045, "the sender's phone number is not registered", status=500),
    Code(131047, "more than 24 hours since the recipient wrote: needs a template", Proof.REFUSED),
    Code(131049, "not delivered, to maintain healthy ecosystem engagement", Proof.REFUSED),
    Code(131050, "the recipient has stopped marketing messages", Proof.REFUSED),
    Code(131051, "unsupported message type", Proof.REFUSED),
    Code(131053, "the media could not be uploaded", Proof.REFUSED),
    Code(131057, "the account is in maintenance mode", Proof.STOPPED, timedelta(minutes=1), status=500),
    Code(131062, "a business-scoped user id cannot be sent this message: it needs the number", Proof.REFUSED),
    Code(131063, "marketing templates are disabled for the account", Proof.LATER),
    Code(132000, "wrong number of template parameters", Proof.REFUSED),
    Code(132001, "no such approved template in this language", Proof.REFUSED),
    Code(132005, "the translated text is too long", Proof.REFUSED),
    Code(132007, "the template violates a policy", Proof.REFUSED),
    Code(132008, "a template parameter's value is invalid", Proof.REFUSED),
    Code(132012, "template parameter in the wrong format", Proof.REFUSED),
    Code(132015, "the template is paused for low quality", Proof.REFUSED),
    Code(132016, "the template is disabled for low quality", Proof.REFUSED),
    Code(132068, "the flow is blocked", Proof.REFUSED),
    Code(132069, "the flow is throttled: 10 messages an hour", Proof.NOT_SENT, timedelta(hours=1)),
    Code(133004, "the server is temporarily unavailable", Proof.WAIT, timedelta(seconds=30), status=503),
    _lasting(133010, "the sender's phone number is not registered"),
    Code(134011, "payments terms are not accepted", Proof.LATER),
    Code(135000, "unknown error with the request parameters", Proof.IN_DOUBT),
    Code(17, "the user's call rate limit", Proof.STOPPED, _LIMIT, section="Graph API"),
    Code(32, "the page's call rate limit", Proof.STOPPED, _LIMIT, section="Graph API"),
    _lasting(102, "the session is not valid", section="Graph API"),
    Code(341, "the app's limit, by downtime or throttling", Proof.STOPPED, _LIMIT, section="Graph API"),
    Code(613, "a custom rate limit", Proof.STOPPED, _LIMIT, section="Graph API"),
    Code(80000, "rate limit of a business use case", Proof.STOPPED, _LIMIT, last=80006, section="Graph API"),
    Code(80008, "rate limit of a business use case", Proof.STOPPED, _LIMIT, last=80014, section="Graph API"),
)

# Code 100 has a second meaning: a phone number id that is not there or not ours. No message is at fault.
_WRONG_NODE = _lasting(100, "there is no such phone number id for this token")


def code_of(given: int, kind: object) -> Code | None:
    """Return the listed code, by its number and by the `type` beside it."""
    if given == _WRONG_NODE.code and kind == "GraphMethodException":
        return _WRONG_NODE
    return next((code for code in CODES if given in code), None)


def finding_of(provider: str, error: Any, answer: Answer, wait: timedelta | None = None) -> Finding | None:
    """Return the proof in Meta's error object, or None if `error` is none. `wait` comes before the code's own.

    Behind a 2xx the object must have a `type` too: `{"code": 200}` is an envelope of many services, and no error.
    """
    given = _number(error.get("code")) if isinstance(error, dict) else None
    if given is None:
        return None
    kind = error.get("type")
    if answer.is_success and not isinstance(kind, str):
        return None
    code = code_of(given, kind) or Code(given, "not listed", _unknown(answer))
    reason = f"{provider}: {given}, {code.means} (HTTP {answer.status})"
    return Finding(code.proof_with(answer.status), reason, wait or code.wait)


def _number(code: object) -> int | None:
    if isinstance(code, str) and code.isascii() and code.isdecimal() and len(code) < 10:  # noqa: PLR2004
        return int(code)  # Some services write Meta's code as text when they pass it on.
    return code if type(code) is int else None


def _unknown(answer: Answer) -> Proof:
    """Return the proof of a code that is not listed. A new code may blame the app, so it never refuses a message."""
    proof = what_it_proves(answer)
    return Proof.LATER if proof is Proof.REFUSED else proof

"""Whether, where and when: the questions before a send, asked at the moment of the send.

Each policy is a transport around another one. It asks a plain function of the host's, and lets the message through or
answers in its place; nothing has left by then, so a question that fails is never in doubt.
"""

from engagement.policies.frequency_cap import FrequencyCap
from engagement.policies.gates import Gate
from engagement.policies.local_time import TimeZoneOf
from engagement.policies.people import Consent, Route
from engagement.policies.quiet_hours import QuietHours
from engagement.policies.suppression import Suppression

__all__ = ["Consent", "FrequencyCap", "Gate", "QuietHours", "Route", "Suppression", "TimeZoneOf"]

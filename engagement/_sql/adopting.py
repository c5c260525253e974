"""Adopts a table of our name that an earlier service made: its messages become ours, and its keys go on blocking.

The SQL reads each of its rows as JSON, in which a column that there never was is as good as one that is empty.
"""

from __future__ import annotations

from sqlalchemy import Connection, text

from engagement.messages.checks import JID_FORMS
from engagement.models import TABLE_NAME, Destination, qualified_name

SET_ASIDE = "engagement_before"
"""The schema that the earlier table is moved into, with its indexes and constraints, whose names we need."""


def is_anothers(connection: Connection, schema: str | None) -> bool:
    """Whether there is a table of our name that none of our migrations has made."""
    there_is = text(
        "SELECT to_regclass(:queue) IS NOT NULL AND NOT EXISTS ("
        "SELECT FROM pg_catalog.pg_attribute WHERE attrelid = to_regclass(:queue) AND attname = 'next_attempt_at')"
    )
    return bool(connection.scalar(there_is, {"queue": qualified_name(schema)}))


def set_aside(connection: Connection, schema: str | None) -> None:
    """Move the earlier table out of the way. Its users of this moment are waited for, but not for long."""
    connection.exec_driver_sql(f"CREATE SCHEMA {SET_ASIDE}")
    queue = qualified_name(schema).replace("%", "%%")
    # docs/decisions.md#2026-11-29--a-migration-sets-back-what-it-sets
    before = connection.scalar(text("SELECT current_setting('lock_timeout')"))
    connection.exec_driver_sql("SET LOCAL lock_timeout = '5s'")
    connection.exec_driver_sql(f"ALTER TABLE {queue} SET SCHEMA {SET_ASIDE}")
    connection.execute(text("SELECT set_config('lock_timeout', :before, true)"), {"before": before})


def copy(connection: Connection, schema: str | None) -> int:
    """Queue the messages of the earlier table in ours, and return their number."""
    queue = qualified_name(schema).replace(":", r"\:")
    jid = {f"{destination}_jid": f"^({form.pattern})$" for destination, form in JID_FORMS.items()}
    return connection.execute(text(f"INSERT INTO {queue} {_COPY}"), jid).rowcount


def _moment(column: str) -> str:
    # A time without an offset is in UTC: JavaScript's toISOString wrote it so.
    offset = f"CASE WHEN old ->> '{column}' ~ '[+-][0-9]{{2}}(:?[0-9]{{2}})?$' THEN '' ELSE 'Z' END"
    return f"CAST((old ->> '{column}') || {offset} AS timestamptz)"


_COPY = f"""
    (user_id, message_type, message_key, message_params, destination, destination_jid, scheduled_for, next_attempt_at,
     status, attempt, retry_count, sent_at, error_message, history, idempotency_key, created_at)
WITH earlier AS (
    SELECT to_jsonb(earlier) AS old FROM {SET_ASIDE}.{TABLE_NAME} AS earlier
), given AS (
    SELECT old,
           regexp_replace(regexp_replace(lower(old ->> 'message_type'), '[^a-z0-9_]', '_', 'g'), '^([^a-z])', 'm\\1')
               AS message_type,
           regexp_replace(old ->> 'destination_jid', '^[+]?([1-9][0-9]{{6,14}})(@c[.]us)?$', '\\1@s.whatsapp.net')
               AS jid,
           coalesce({_moment("created_at")}, now()) AS created_at,
           coalesce({_moment("scheduled_for")}, {_moment("created_at")}, now()) AS scheduled_for,
           CASE WHEN old ->> 'sent_at' IS NOT NULL THEN least({_moment("sent_at")}, now()) END AS sent_at,
           coalesce(CAST(old ->> 'retry_count' AS integer), 0) AS retry_count
      FROM earlier
), known AS (
    SELECT *,
           jid ~ :group_jid AS is_group,
           coalesce(jid ~ :group_jid OR jid ~ :individual_jid, false) AS has_jid,
           old ->> 'status' IN ('pending', 'scheduled', 'queued') AND retry_count = 0 AND sent_at IS NULL
               AS was_not_tried
      FROM given
), told AS (
    SELECT *,
           CASE WHEN old ->> 'status' = 'sent' THEN 'sent'
                WHEN was_not_tried AND has_jid THEN 'pending'
                WHEN was_not_tried THEN 'failed'
                WHEN old ->> 'status' IN ('failed', 'cancelled', 'expired') AND sent_at IS NULL THEN old ->> 'status'
                ELSE 'in_doubt' END AS now_status
      FROM known
)
SELECT old ->> 'user_id',
       message_type,
       coalesce(old ->> 'message_key', message_type),
       CASE WHEN jsonb_typeof(old -> 'message_params') = 'object' THEN old -> 'message_params' ELSE '{{}}' END,
       CASE WHEN has_jid AND is_group THEN '{Destination.GROUP}' ELSE '{Destination.INDIVIDUAL}' END,
       CASE WHEN has_jid THEN jid END,
       scheduled_for,
       CASE WHEN now_status = 'pending' THEN greatest(scheduled_for, now()) ELSE scheduled_for END,
       now_status,
       CASE WHEN now_status IN ('sent', 'failed', 'in_doubt') THEN retry_count + 1 ELSE retry_count END,
       retry_count,
       CASE WHEN now_status = 'sent' THEN coalesce(sent_at, least(scheduled_for, now())) END,
       CASE WHEN was_not_tried AND NOT has_jid THEN 'its destination_jid is none' ELSE old ->> 'error_message' END,
       CASE WHEN now_status = 'in_doubt'
            THEN jsonb_build_array(jsonb_build_object(
                'at', now(), 'attempt', retry_count + 1, 'event', 'in_doubt',
                'reason', 'the earlier service may have sent it: its status was ' || (old ->> 'status')))
            ELSE '[]' END,
       coalesce(old ->> 'idempotency_key', 'adopted:' || (old ->> 'id')),
       created_at
  FROM told
 ORDER BY created_at, old ->> 'id'
"""  # noqa: S608 - constants of ours

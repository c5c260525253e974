"""Bodies that nobody should send, with a good signature on them."""

from hypothesis import strategies as st

NO_JSON_OBJECTS = [
    b"",
    b"receipts",
    b"null",
    b"7",
    b'"text"',
    b"[]",
    b'[{"object": "whatsapp_business_account"}]',
    b"{",
    b'{"receipts": NaN}',
    b'{"receipts": -Infinity}',
    b'{"receipts": ' + b"9" * 5000 + b"}",
    b'{"receipts": [], "receipts": []}',
    b'{"object": {"a": 1, "a": 1}}',
    b"[" * 200_000,
    b'{"entry":' * 200_000,
    b'\xef\xbb\xbf{"receipts": []}',
    '{"receipts": []}'.encode("utf-16"),
    b'{"receipts": "\xff"}',
    b'{"receipts": []}\x00',
    b'{"receipts": []} {"receipts": []}',
]


def json_values(*words, fields):
    """Return a strategy for any JSON that likes to use these words and field names."""
    scalars = st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.integers(min_value=10**400, max_value=10**400 + 9),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(),
        st.sampled_from(["\x00", "\ud800", "1750030073", "9" * 30, "-1", " ", "x" * 2000]),
        st.sampled_from(words),
    )
    names = st.one_of(st.sampled_from(fields), st.text(max_size=3))
    return st.recursive(
        scalars,
        lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(names, inner, max_size=8)),
        max_leaves=25,
    )
